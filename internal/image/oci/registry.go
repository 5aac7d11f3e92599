package oci

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/nestbox/nestbox"
)

// Registry is where images are fetched from.
type Registry struct {
	Transport http.RoundTripper // nil = http.DefaultTransport
	Keychain  authn.Keychain    // who we are, by registry; nil = nobody
	Blobs     string            // a directory in which fetched layers are kept, whole or in part, by digest
	Insecure  bool              // HTTP is spoken with registries on other machines too

	// Patience is how long a registry may send nothing; 0 = 30 s. Pause is how long is
	// waited before a second try, and longer each time; 0 = 1 s.
	Patience, Pause time.Duration
}

// tries is how often one thing is asked for while nothing comes of it.
const tries = 6

// Open finds an image in a registry: name, name:tag or name@digest, as docker pull takes
// them. What is fetched later is what the name stands for now. CodeInvalid: it is no
// reference. CodeNotFound, CodeDenied: so says the registry. CodeUnavailable: it fails.
func (r Registry) Open(ctx context.Context, reference string, o Options) (*Image, error) {
	r = r.withDefaults()
	ctx, cancel := context.WithTimeout(ctx, tries*r.Patience) // for what describes the image
	defer cancel()
	var options []name.Option
	if r.Insecure {
		options = append(options, name.Insecure)
	}
	ref, err := name.ParseReference(reference, options...)
	if err != nil {
		return nil, nestbox.Errorf(nestbox.CodeInvalid, "%.300q is no reference of an image: %w", reference, err)
	}
	desc, err := remote.Get(ref, remote.WithContext(ctx), remote.WithAuthFromKeychain(r.Keychain), remote.WithTransport(r.Transport),
		remote.WithPlatform(o.platform()), remote.WithRetryBackoff(remote.Backoff{Duration: r.Pause, Factor: 2, Jitter: 0.2, Steps: tries}),
		remote.WithRetryStatusCodes(http.StatusTooManyRequests, http.StatusRequestTimeout, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout))
	if err != nil {
		return nil, registryError(reference, err)
	}
	img, err := desc.Image()
	if err != nil {
		return nil, registryError(reference, err)
	}
	auth, err := authn.Resolve(ctx, r.Keychain, ref.Context())
	if err != nil {
		return nil, nestbox.Errorf(nestbox.CodeUnavailable, "the credentials for %s: %w", ref.Context().RegistryStr(), err)
	}
	asUs, err := transport.NewWithContext(ctx, ref.Context().Registry, auth, r.Transport, []string{ref.Scope(transport.PullScope)})
	if err != nil {
		return nil, registryError(reference, err)
	}
	out, err := fromImage(img, reference, func(d v1.Descriptor) func(context.Context, func(int64)) (io.ReadCloser, error) {
		return fetch{r, ref.Context(), &http.Client{Transport: asUs}, d}.open
	})
	if err != nil && nestbox.CodeOf(err) != nestbox.CodeInvalid {
		err = registryError(reference, err)
	}
	return out, err
}

func (r Registry) withDefaults() Registry {
	if r.Transport == nil {
		r.Transport = http.DefaultTransport
	}
	if r.Keychain == nil {
		r.Keychain = authn.NewMultiKeychain()
	}
	if r.Patience == 0 {
		r.Patience = 30 * time.Second
	}
	if r.Pause == 0 {
		r.Pause = time.Second
	}
	return r
}

// registryError says what a registry has answered.
func registryError(reference string, err error) error {
	if nestbox.CodeOf(err) != nestbox.CodeInternal {
		return err
	}
	code := nestbox.CodeUnavailable
	var answer *transport.Error
	if errors.As(err, &answer) {
		switch answer.StatusCode {
		case http.StatusNotFound:
			code = nestbox.CodeNotFound
		case http.StatusUnauthorized, http.StatusForbidden:
			code = nestbox.CodeDenied
		}
	}
	return nestbox.Errorf(code, "fetch %s: %w", reference, err)
}

// fetch is the fetching of one layer.
type fetch struct {
	Registry
	from   name.Repository
	client *http.Client
	v1.Descriptor
}

// partial ends the names of layers that are not there in whole.
const partial = ".part"

// open returns the layer as it is stored, out of a file in which it is, checked. progress
// is called while it comes.
func (f fetch) open(ctx context.Context, progress func(int64)) (io.ReadCloser, error) {
	whole := filepath.Join(f.Blobs, f.Digest.Algorithm+"-"+f.Digest.Hex)
	if file, err := os.Open(whole); err == nil {
		return file, nil
	}
	part, err := os.OpenFile(whole+partial, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := f.complete(ctx, part, progress); err != nil {
		return nil, errors.Join(err, part.Close())
	}
	if err := errors.Join(part.Sync(), os.Rename(part.Name(), whole)); err != nil {
		return nil, errors.Join(err, part.Close())
	}
	_, err = part.Seek(0, io.SeekStart)
	return part, err
}

// complete fetches what is missing, from where the last try ended.
func (f fetch) complete(ctx context.Context, part *os.File, progress func(int64)) error {
	sum := sha256.New()
	have, err := io.Copy(sum, part)
	if err != nil {
		return err
	}
	pauses := backoff.NewExponentialBackOff()
	pauses.InitialInterval, pauses.MaxInterval = f.Pause, 30*f.Pause
	for failed := 0; have < f.Size; {
		got, err := f.more(ctx, part, sum, &have, progress)
		if got {
			failed = 0
			pauses.Reset()
		}
		if err == nil {
			continue
		}
		pause, again := pauses.NextBackOff(), true
		var asked retryAfter
		if errors.As(err, &asked) {
			pause = max(pause, time.Duration(asked))
		} else {
			again = retriable(err)
		}
		if failed++; failed >= tries || !again || ctx.Err() != nil {
			return nestbox.Errorf(codeOfFetch(ctx, err), "fetch layer %s: %w", f.Digest, err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != f.Digest.Hex || have != f.Size {
		// Not to be built on again.
		err := part.Truncate(0)
		return errors.Join(nestbox.Errorf(nestbox.CodeInvalid, "layer %s is not what it should be: its SHA-256 is %s", f.Digest, got), err)
	}
	return nil
}

// retryAfter is how long the registry wants us to wait. It is bounded.
type retryAfter time.Duration

func (r retryAfter) Error() string {
	return "the registry asks to wait for " + time.Duration(r).String()
}

// statusError is another answer than the layer.
type statusError int

func (s statusError) Error() string {
	return fmt.Sprintf("the registry answered %d %s", int(s), http.StatusText(int(s)))
}

func retriable(err error) bool {
	var status statusError
	if errors.As(err, &status) {
		return status >= 500 || status == http.StatusRequestTimeout
	}
	return nestbox.CodeOf(err) == nestbox.CodeInternal && !errors.Is(err, os.ErrPermission) && noSpaceLeft(err) == nil
}

func codeOfFetch(ctx context.Context, err error) nestbox.Code {
	var status statusError
	switch {
	case ctx.Err() != nil:
		return nestbox.CodeCanceled
	case noSpaceLeft(err) != nil:
		return nestbox.CodeExhausted
	case errors.As(err, &status) && (status == http.StatusUnauthorized || status == http.StatusForbidden):
		return nestbox.CodeDenied
	case errors.As(err, &status) && status == http.StatusNotFound:
		return nestbox.CodeNotFound
	}
	return nestbox.CodeUnavailable
}

// more asks once for what is missing and appends what comes.
func (f fetch) more(ctx context.Context, part *os.File, sum hash.Hash, have *int64, progress func(int64)) (got bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silent := time.AfterFunc(f.Patience, func() { cancel(fmt.Errorf("nothing came for %v", f.Patience)) })
	defer silent.Stop()
	body, err := f.ask(ctx, *have)
	if err != nil {
		return false, because(ctx, err)
	}
	defer body.Close()
	buffer := make([]byte, 256<<10)
	for left := f.Size - *have; left > 0; {
		n, err := body.Read(buffer[:min(left, int64(len(buffer)))])
		if n > 0 {
			silent.Reset(f.Patience)
			if _, err := part.WriteAt(buffer[:n], *have); err != nil {
				return got, err
			}
			_, _ = sum.Write(buffer[:n]) // never fails
			*have, left, got = *have+int64(n), left-int64(n), true
			progress(*have)
		}
		if err != nil && left > 0 {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return got, because(ctx, err)
		}
	}
	return got, nil
}

// because returns the reason for which a context was ended, if it was.
func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// ask returns the layer from a byte on.
func (f fetch) ask(ctx context.Context, from int64) (io.ReadCloser, error) {
	u := url.URL{Scheme: f.from.Scheme(), Host: f.from.RegistryStr(), Path: fmt.Sprintf("/v2/%s/blobs/%s", f.from.RepositoryStr(), f.Digest)}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	if from > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", from))
	}
	resp, err := f.client.Do(req)
	if err != nil {
		return nil, err
	}
	switch resp.StatusCode {
	case http.StatusPartialContent:
		// Some answer with another part than was asked for.
		if strings.HasPrefix(resp.Header.Get("Content-Range"), fmt.Sprintf("bytes %d-", from)) {
			return resp.Body, nil
		}
		err = errors.New("the registry sent another part than was asked for")
	case http.StatusOK:
		if _, err = io.CopyN(io.Discard, resp.Body, from); err == nil { // it knows no ranges
			return resp.Body, nil
		}
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		err = retryAfter(waitFor(resp.Header.Get("Retry-After")))
	default:
		err = statusError(resp.StatusCode)
	}
	return nil, errors.Join(err, resp.Body.Close())
}

// longestWait bounds what a registry can ask for.
const longestWait = time.Minute

func waitFor(header string) time.Duration {
	if seconds, err := strconv.Atoi(header); err == nil {
		return min(max(0, time.Duration(seconds)*time.Second), longestWait)
	}
	if at, err := http.ParseTime(header); err == nil {
		return min(max(0, time.Until(at)), longestWait)
	}
	return 0
}
