package edge

import (
	"net/http"
	"net/url"
	"strings"

	"github.com/nestbox/nestbox/internal/control"
)

const (
	keyHeader   = "X-API-Key"
	tokenParam  = "nestbox-token" // in the query of a signed URL
	tokenCookie = "nestbox-token" // set by the first visit of one
)

// source is where a credential was found.
type source int

const (
	fromNowhere source = iota
	fromHeader
	fromQuery
	fromCookie
)

// credential finds what a request shows. A header wins over a token in the
// URL, which wins over the cookie of an earlier visit.
func credential(r *http.Request) (control.PortCredential, source) {
	if key := r.Header.Get(keyHeader); key != "" {
		return control.PortCredential{APIKey: key}, fromHeader
	}
	if token := r.URL.Query().Get(tokenParam); token != "" {
		return control.PortCredential{Token: token}, fromQuery
	}
	if c, err := r.Cookie(tokenCookie); err == nil && c.Value != "" {
		return control.PortCredential{Token: c.Value}, fromCookie
	}
	return control.PortCredential{}, fromNowhere
}

// isNavigation tells whether a browser opens the URL as a page. Other clients
// are not sent elsewhere: they have no place for a cookie.
func isNavigation(r *http.Request) bool {
	return r.Method == http.MethodGet && r.Header.Get("Upgrade") == "" && strings.Contains(r.Header.Get("Accept"), "text/html")
}

// rememberToken moves a token from the URL into a cookie of exactly this host
// name, and sends the browser to the URL without it: the page's own requests
// then work, and the token is neither in the history nor in a Referer.
func rememberToken(w http.ResponseWriter, r *http.Request, token string) {
	http.SetCookie(w, &http.Cookie{
		Name: tokenCookie, Value: token, Path: "/", HttpOnly: true, SameSite: http.SameSiteLaxMode, Secure: r.TLS != nil,
	})
	clean := url.URL{Path: r.URL.Path, RawPath: r.URL.RawPath, RawQuery: withoutToken(r.URL.RawQuery)}
	location := clean.String()
	if strings.HasPrefix(location, "//") { // would be another host
		location = "/" + strings.TrimLeft(location, "/")
	}
	w.Header().Set("Referrer-Policy", "no-referrer")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Location", location)
	w.WriteHeader(http.StatusFound)
}

// withoutToken removes our parameter from a query and leaves the rest of it
// byte for byte as it was.
func withoutToken(query string) string {
	kept := []string{}
	for part := range strings.SplitSeq(query, "&") {
		name, _, _ := strings.Cut(part, "=")
		if decoded, err := url.QueryUnescape(name); err == nil && decoded == tokenParam {
			continue
		}
		kept = append(kept, part)
	}
	return strings.Join(kept, "&")
}

// strip removes our credentials from a request that goes into a capsule. What
// is the program's own stays byte for byte.
func strip(out *http.Request) {
	out.Header.Del(keyHeader)
	out.URL.RawQuery = withoutToken(out.URL.RawQuery)
	lines := out.Header.Values("Cookie")
	out.Header.Del("Cookie")
	for _, line := range lines {
		kept := []string{}
		for part := range strings.SplitSeq(line, ";") {
			name, _, _ := strings.Cut(strings.TrimSpace(part), "=")
			if name != tokenCookie && name != "" {
				kept = append(kept, strings.TrimSpace(part))
			}
		}
		if len(kept) > 0 {
			out.Header.Add("Cookie", strings.Join(kept, "; "))
		}
	}
}
