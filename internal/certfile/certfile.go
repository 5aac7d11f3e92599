// Package certfile serves TLS with a certificate from files that others renew, such as
// certbot or cert-manager, without a restart.
//
// It is a leaf: it imports the standard library only.
package certfile

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// Pair is a certificate and its key, in two PEM files. Its methods are safe for
// concurrent use.
type Pair struct {
	cert, key string
	log       *slog.Logger

	mu      sync.Mutex
	looked  time.Time // when the files were looked at
	tried   version   // of the files, when they were last read
	current *tls.Certificate
}

// version tells the files of one renewal from those of another.
type version struct{ cert, key state }

type state struct {
	modified time.Time
	size     int64
}

// lookEvery is how often the files are looked at, while there are handshakes.
const lookEvery = time.Second

// Open reads the files. The certificate's file may have those in it that signed it.
func Open(cert, key string, log *slog.Logger) (*Pair, error) {
	p := &Pair{cert: cert, key: key, log: log}
	if err := p.load(); err != nil {
		return nil, err
	}
	return p, nil
}

// Config returns how to serve with it: TLS 1.2 and later.
func (p *Pair) Config() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.get(), nil },
	}
}

// get returns the certificate, which is that of the files if they can be used: while
// they are being renewed they may not fit each other.
func (p *Pair) get() *tls.Certificate {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.looked) < lookEvery {
		return p.current
	}
	if now, err := p.version(); err != nil || now != p.tried {
		if err := p.load(); err != nil {
			p.log.Warn("the TLS certificate has changed and cannot be used; the one before is", "error", err)
		} else {
			p.log.Info("the TLS certificate was read anew", "file", p.cert, "expires", p.current.Leaf.NotAfter)
		}
	}
	return p.current
}

// load reads the files. Needs mu, but in Open.
func (p *Pair) load() error {
	p.looked = time.Now()
	tried, err := p.version()
	if err == nil {
		p.tried = tried
	}
	pair, err := tls.LoadX509KeyPair(p.cert, p.key)
	if err != nil {
		return fmt.Errorf("TLS certificate %s with key %s: %w", p.cert, p.key, err)
	}
	p.current = &pair
	return nil
}

func (p *Pair) version() (v version, err error) {
	if v.cert, err = stateOf(p.cert); err != nil {
		return v, err
	}
	v.key, err = stateOf(p.key)
	return v, err
}

// stateOf follows links, by which some renew.
func stateOf(path string) (state, error) {
	info, err := os.Stat(path)
	if err != nil {
		return state{}, err
	}
	return state{info.ModTime(), info.Size()}, nil
}
