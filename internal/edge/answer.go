package edge

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

// answer is where the program's goes.
type answer struct {
	http.ResponseWriter
	bodyless bool
}

// Unwrap is for http.ResponseController.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// FlushError sends what there is of an answer. The header of one without a body goes
// together with its end: in gRPC it tells how a call ended if it does, and nothing if not.
func (a *answer) FlushError() error {
	if a.bodyless {
		return nil
	}
	return http.NewResponseController(a.ResponseWriter).Flush()
}

// confine takes from an answer what would reach beyond the port that it is of: cookies
// for the whole domain, where other capsules are, cookies of our name, and what only we
// say. Where the port has no host name of its own, what leads to a path leads below the
// port's.
func confine(res *http.Response) error {
	p := passageOf(res.Request.Context())
	p.answer.bodyless = res.ContentLength == 0
	keepValues(res.Header, "Set-Cookie", func(line string) (string, bool) { return ownCookie(line, p.prefix) })
	res.Header.Del("Clear-Site-Data") // it clears cookies of the whole domain
	res.Header.Del(errorHeader)
	if len(p.settings.CORSOrigins) > 0 { // its owner has said so; ours are there already
		res.Header.Del("Access-Control-Allow-Origin")
		res.Header.Del("Access-Control-Allow-Credentials")
	}
	keepValues(res.Header, "Location", func(to string) (string, bool) { return p.locate(to), true })
	if p.prefix != "" {
		// All ports that are reached by a path have the API's origin: a page of one
		// could ask others for whatever the browser may. So it gets an origin that is
		// nobody's.
		res.Header.Add("Content-Security-Policy", "sandbox allow-downloads allow-forms allow-modals allow-popups allow-scripts")
	}
	return nil
}

// ownCookie returns a Set-Cookie line for this host alone, and below prefix.
func ownCookie(line, prefix string) (string, bool) {
	parts := strings.Split(line, ";")
	name, _, _ := strings.Cut(parts[0], "=")
	if strings.TrimSpace(name) == tokenCookie {
		return "", false
	}
	kept := parts[:1]
	path := "/"
	for _, attribute := range parts[1:] {
		key, value, _ := strings.Cut(attribute, "=")
		switch key = strings.TrimSpace(key); {
		case strings.EqualFold(key, "Domain"):
		case strings.EqualFold(key, "Path") && prefix != "":
			if value = strings.TrimSpace(value); strings.HasPrefix(value, "/") {
				path = value
			}
		default:
			kept = append(kept, attribute)
		}
	}
	if prefix != "" {
		kept = append(kept, " Path="+prefix+path)
	}
	return strings.Join(kept, ";"), true
}

// locate returns where a redirect leads to outside. What the program calls its own host
// is the one that the client asked, and its root may be below a prefix, which it may know
// of.
func (p passage) locate(to string) string {
	u, err := url.Parse(to)
	if err != nil || !strings.HasPrefix(u.Path, "/") && u.Host == "" {
		return to
	}
	inside := p.isInside(u)
	own := inside || u.Host == "" || strings.EqualFold(u.Host, p.visit.host)
	switch {
	case !own, p.prefix == "" && !inside:
		return to
	case p.prefix == "":
		u.Scheme, u.Host = p.visit.scheme, p.visit.host
		return u.String()
	}
	u.Scheme, u.Host = "", "" // as the client addresses us, whatever the program thinks
	if !strings.HasPrefix(u.Path, "/") {
		u.Path = "/"
	}
	if path := u.EscapedPath(); path != p.prefix && !strings.HasPrefix(path, p.prefix+"/") {
		return p.prefix + u.String()
	}
	return u.String()
}

// isInside reports whether a program calls itself so: by the host that it was told, or by
// the address that it listens on, as many do whatever they are told.
func (p passage) isInside(u *url.URL) bool {
	if p.settings.HostHeader != "" && strings.EqualFold(u.Host, p.settings.HostHeader) {
		return true
	}
	switch u.Hostname() {
	case "localhost", "127.0.0.1", "0.0.0.0", "::1", "::":
		return u.Port() == strconv.Itoa(int(p.port))
	}
	return false
}
