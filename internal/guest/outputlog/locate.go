package outputlog

import (
	"sort"

	"github.com/nestbox/nestbox"
)

// Locate returns the offset at which since begins, of the bytes of one stream ("" =
// all). It looks at no more of the log than it has to, and holds nobody up.
func (l *Log) Locate(since nestbox.Since, stream nestbox.Stream) (int64, error) {
	l.mu.Lock()
	state := nestbox.OutputState{Start: l.start, End: l.end}
	l.mu.Unlock()
	at := since.Begins(state)
	if !since.After.IsZero() {
		offset, err := l.locateTime(l.tickAt(since.After.Add(nestbox.LogTick - 1)))
		if err != nil {
			return 0, err
		}
		at = max(at, offset)
	}
	if since.Lines > 0 {
		offset, err := l.locateLines(since.Lines, state.End, stream)
		if err != nil {
			return 0, err
		}
		at = max(at, offset)
	}
	return at, nil
}

// locateTime returns the offset of the first byte that was read at a tick or later.
func (l *Log) locateTime(at tick) (int64, error) {
	for {
		l.mu.Lock()
		i := sort.Search(len(l.slabs), func(i int) bool { return l.slabs[i].last >= at })
		if i == len(l.slabs) {
			defer l.mu.Unlock()
			return l.end, nil
		}
		p := l.piece(l.slabs[i])
		l.mu.Unlock()
		if ok, err := p.load(); err != nil {
			return 0, err
		} else if !ok {
			continue // it was dropped or moved meanwhile
		}
		from := 0
		for _, r := range p.runs {
			if r.at >= at {
				break
			}
			from = r.end()
		}
		return p.base + int64(from), nil
	}
}

// locateLines returns the offset at which the last lines before end begin. What ends
// without a newline is a line too.
func (l *Log) locateLines(lines, end int64, stream nestbox.Stream) (int64, error) {
	begun := false // the last byte was seen, whose newline is the end of the last line
	for end > 0 {
		l.mu.Lock()
		if end <= l.start || len(l.slabs) == 0 {
			defer l.mu.Unlock()
			return l.start, nil
		}
		p := l.piece(l.slabs[sort.Search(len(l.slabs), func(i int) bool { return l.slabs[i].end() >= end })])
		l.mu.Unlock()
		if ok, err := p.load(); err != nil {
			return 0, err
		} else if !ok {
			continue
		}
		for i := int(end-p.base) - 1; i >= 0; i-- {
			switch {
			case stream != "" && p.streamAt(i) != stream:
				continue
			case p.buf[i] == '\n' && begun:
				if lines--; lines == 0 {
					return p.base + int64(i) + 1, nil
				}
			}
			begun = true
		}
		end = p.base
	}
	return 0, nil
}

// piece is a slab as it was at one time, to look into without a lock.
type piece struct {
	log  *Log
	slab *slab
	file *spillFile
	disk extent
	base int64
	size int
	buf  []byte // what is in it; nil = on disk
	runs []run
	at   int // index of the run that streamAt found last
}

// piece returns a slab's. Needs mu.
func (l *Log) piece(s *slab) *piece {
	// Bytes and runs that are written do not change, but their arrays are used again once
	// the slab is gone, and the last run grows.
	p := &piece{log: l, slab: s, file: l.spill, disk: s.disk, base: s.base, size: s.size}
	if s.buf != nil {
		p.buf = append([]byte{}, s.buf...)
		p.runs = append([]run{}, s.runs...)
	}
	return p
}

// load reads what is on disk. It returns false if that was dropped or moved.
func (p *piece) load() (bool, error) {
	if p.buf != nil {
		return true, nil
	}
	buf, runs, err := p.file.load(p.disk, p.size, 0, p.size, nil)
	p.log.mu.Lock()
	defer p.log.mu.Unlock()
	switch {
	case p.slab.gone:
		return false, nil
	case err != nil:
		return false, &nestbox.Error{Code: nestbox.CodeGuest, Message: "output that was spilled to disk cannot be read", Err: err}
	}
	p.buf, p.runs = buf, runs
	return true, nil
}

// streamAt returns of which stream a byte is. It is asked from the end on backwards.
func (p *piece) streamAt(i int) nestbox.Stream {
	if p.at >= len(p.runs) || p.runs[p.at].end() <= i {
		p.at = len(p.runs) - 1
	}
	for p.at > 0 && p.runs[p.at-1].end() > i {
		p.at--
	}
	return StreamNames[p.runs[p.at].stream()]
}
