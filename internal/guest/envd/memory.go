package envd

// This file keeps what the table remembers within its limits. What goes first:
// memory is freed by spilling output to disk, that of ended processes before
// that of live ones; disk by forgetting the output of the process that ended
// first; and records when there are too many of them.

// retire moves a process whose exit is recorded from the live to the ended
// ones, and forgets the oldest of those if there are too many.
func (t *table) retire(p *process) {
	t.mu.Lock()
	delete(t.live, p.id)
	t.exited = append(t.exited, p)
	var gone []*process
	for i := 0; len(t.exited) > t.limits.Exited && i < len(t.exited); {
		if output, _ := t.exited[i].log.state(); !output.Closed {
			i++ // its tree lives on and writes
			continue
		}
		gone = append(gone, t.exited[i])
		t.exited = append(t.exited[:i], t.exited[i+1:]...)
	}
	for _, old := range gone {
		delete(t.byID, old.id)
		if t.byPID[old.pid] == old {
			delete(t.byPID, old.pid)
		}
		if t.byTag[old.tag] == old {
			delete(t.byTag, old.tag)
		}
	}
	t.mu.Unlock()
	for _, old := range gone {
		old.log.forget()
	}
}

// forgetOldestOutput drops the output on disk of the process that ended first.
// It may be called with the writing lock of a log held.
func (t *table) forgetOldestOutput() bool {
	for _, p := range t.ended() {
		before := t.budget.disk.Load()
		if p.log.onDisk() {
			p.log.tryDropAll()
		}
		if t.budget.disk.Load() < before {
			return true
		}
	}
	return false
}

// relieveMemory brings the output in memory back below its limit. The caller
// holds no lock.
func (t *table) relieveMemory() {
	if !t.budget.overMemory() || !t.relief.TryLock() {
		return
	}
	defer t.relief.Unlock()
	for _, p := range t.ended() {
		if !t.budget.overMemory() {
			return
		}
		p.log.shrink()
	}
	for t.budget.overMemory() {
		if p := t.biggest(); p == nil || p.log.shrink() == 0 {
			return
		}
	}
}

// ended returns the processes that ended, in the order in which they did.
func (t *table) ended() []*process {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]*process(nil), t.exited...)
}

// biggest returns the live process with the most output in memory.
func (t *table) biggest() *process {
	t.mu.Lock()
	defer t.mu.Unlock()
	var biggest *process
	for _, p := range t.live {
		if biggest == nil || p.log.memory.Load() > biggest.log.memory.Load() {
			biggest = p
		}
	}
	return biggest
}
