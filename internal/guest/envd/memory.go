package envd

// This file keeps what the table remembers within its limits. What goes first:
// memory is freed by spilling output to disk, that of ended processes before
// that of live ones; disk by forgetting the output of the process that ended
// first; records when there are too many of them; and the rest of their arguments
// when those are too large.

// retire moves a process whose exit is recorded from the live to the ended
// ones, and forgets the oldest of those if there are too many.
func (t *table) retire(p *process) {
	t.mu.Lock()
	delete(t.live, p.id)
	t.exited = append(t.exited, p)
	var gone []*process
	for i := 0; len(t.exited) > t.limits.Exited && i < len(t.exited); {
		if output, _ := t.exited[i].log.State(); !output.Closed {
			i++ // its tree lives on and writes
			continue
		}
		gone = append(gone, t.exited[i])
		t.exited = append(t.exited[:i], t.exited[i+1:]...)
	}
	t.argsCut = max(0, t.argsCut-len(gone))
	for _, old := range gone {
		t.argBytes -= old.argBytes()
		delete(t.byID, old.id)
		for _, key := range old.requestKeys {
			delete(t.requests, key)
		}
		if t.byPID[old.pid] == old {
			delete(t.byPID, old.pid)
		}
		if t.byTag[old.tag] == old {
			delete(t.byTag, old.tag)
		}
	}
	t.mu.Unlock()
	for _, old := range gone {
		old.log.Forget()
	}
}

// maxArgBytes bounds the arguments of all processes that are remembered.
const maxArgBytes = 16 << 20

// keepArgs counts the arguments of a new process. If all are too many it cuts
// those of processes that ended, the first first, and then those of this one.
// Needs mu.
func (t *table) keepArgs(p *process) {
	t.argBytes += p.argBytes()
	for ; t.argBytes > maxArgBytes && t.argsCut < len(t.exited); t.argsCut++ {
		t.argBytes -= t.exited[t.argsCut].cutArgs()
	}
	if t.argBytes > maxArgBytes {
		t.argBytes -= p.cutArgs()
	}
}

// forgetOldestOutput drops the output on disk of the process that ended first.
// It may be called with the writing lock of a log held.
func (t *table) forgetOldestOutput() bool {
	for _, p := range t.ended() {
		before := t.budget.Disk()
		if p.log.OnDisk() {
			p.log.TryDropAll()
		}
		if t.budget.Disk() < before {
			return true
		}
	}
	return false
}

// relieveMemory brings the output in memory back below its limit. The caller
// holds no lock.
func (t *table) relieveMemory() {
	if !t.budget.OverMemory() || !t.relief.TryLock() {
		return
	}
	defer t.relief.Unlock()
	for _, p := range t.ended() {
		if !t.budget.OverMemory() {
			return
		}
		p.log.Shrink()
	}
	for t.budget.OverMemory() {
		if p := t.biggest(); p == nil || p.log.Shrink() == 0 {
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
		if biggest == nil || p.log.Memory() > biggest.log.Memory() {
			biggest = p
		}
	}
	return biggest
}
