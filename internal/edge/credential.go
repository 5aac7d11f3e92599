package edge

import (
	"fmt"
	"html"
	"net/http"
	"net/url"
	"regexp"
	"strings"

	"github.com/nestbox/nestbox/internal/control"
)

const (
	keyHeader   = "X-API-Key"
	tokenParam  = "nestbox-token" // in the query of a signed URL
	tokenCookie = "nestbox-token" // set by the first visit of one
)

// ourKey is the form of an API key.
var ourKey = regexp.MustCompile(`^(wrn|e2b)_[0-9a-f]{32,}$`)

// bearer returns the API key of an Authorization header, if it has one of ours:
// programs may have bearers of their own.
func bearer(value string) string {
	scheme, token, _ := strings.Cut(strings.TrimSpace(value), " ")
	if token = strings.TrimSpace(token); strings.EqualFold(scheme, "Bearer") && ourKey.MatchString(token) {
		return token
	}
	return ""
}

// credential finds all that a request shows. inQuery is the token that a signed
// URL carries.
func credential(r *http.Request, p passage) (cred control.PortCredential, inQuery string) {
	for _, key := range r.Header.Values(keyHeader) {
		if key != "" {
			cred.APIKeys = append(cred.APIKeys, key)
		}
	}
	for _, value := range r.Header.Values("Authorization") {
		if key := bearer(value); key != "" {
			cred.APIKeys = append(cred.APIKeys, key)
		}
	}
	_, cred.Tokens = withoutToken(r.URL.RawQuery)
	if len(cred.Tokens) > 0 {
		inQuery = cred.Tokens[0]
	}
	if p.named() && cookiesCount(r, p.visit) { // else other capsules have the same origin
		for _, c := range r.CookiesNamed(tokenCookie) {
			cred.Tokens = append(cred.Tokens, c.Value)
		}
	}
	return cred, inQuery
}

// cookiesCount reports whether the cookies of a request are meant: a browser
// sends them also with what pages of other origins ask for, such as that of
// another capsule. Clients that say neither are no browsers, or on an origin
// where SameSite keeps our cookie from such requests.
func cookiesCount(r *http.Request, v visit) bool {
	if origin := r.Header.Get("Origin"); origin != "" {
		u, err := url.Parse(origin)
		return err == nil && strings.EqualFold(u.Host, v.host)
	}
	switch r.Header.Get("Sec-Fetch-Site") {
	case "", "same-origin", "none": // none: the address bar
		return true
	}
	return false
}

// isNavigation tells whether a browser opens the URL as a page. Other clients
// are not sent elsewhere: they have no place for a cookie.
func isNavigation(r *http.Request) bool {
	return r.Method == http.MethodGet && r.Header.Get("Upgrade") == "" && strings.Contains(r.Header.Get("Accept"), "text/html")
}

// isFramed tells whether a browser opens the URL inside another page.
func isFramed(r *http.Request) bool {
	switch r.Header.Get("Sec-Fetch-Dest") {
	case "iframe", "frame", "embed", "object":
		return true
	}
	return false
}

// rememberToken moves a token from the URL into a cookie of exactly this host
// name, and sends the browser to the URL without it: the page's own requests
// then work, and the token is neither in the history nor in a Referer. It does so
// by a page rather than a redirect, since a redirect would still count as asked
// for by whatever site the link was on, and a cookie does not.
//
// In a frame the cookie is one of that frame in that site alone (CHIPS), which
// browsers take where the connection is safe.
func rememberToken(w http.ResponseWriter, r *http.Request, v visit, token string) {
	cookie := http.Cookie{
		Name: tokenCookie, Value: token, Path: "/", HttpOnly: true, SameSite: http.SameSiteStrictMode, Secure: v.scheme == "https",
	}
	if isFramed(r) && (v.scheme == "https" || strings.HasSuffix(hostname(v.host), ".localhost")) {
		cookie.Secure, cookie.SameSite, cookie.Partitioned = true, http.SameSiteNoneMode, true
	}
	http.SetCookie(w, &cookie)
	query, _ := withoutToken(r.URL.RawQuery)
	clean := url.URL{Path: r.URL.Path, RawPath: r.URL.RawPath, RawQuery: query}
	location := clean.String()
	if strings.HasPrefix(location, "//") { // would be another host
		location = "/" + strings.TrimLeft(location, "/")
	}
	h := w.Header()
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store")
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'")
	_, _ = fmt.Fprintf(w, `<!doctype html><meta http-equiv="refresh" content="0;url=%s"><title>Nestbox</title><a href="%[1]s">Continue</a>`,
		html.EscapeString(strings.ReplaceAll(location, "'", "%27")))
}

// withoutToken removes our parameter from a query, whichever separator is beside
// it, and leaves the rest of it byte for byte as it was.
func withoutToken(query string) (rest string, tokens []string) {
	for len(query) > 0 {
		end := strings.IndexAny(query, "&;")
		part, separator := query, ""
		if end >= 0 {
			part, separator = query[:end], query[end:end+1]
		}
		query = query[len(part)+len(separator):]
		name, value, _ := strings.Cut(part, "=")
		if decoded, err := url.QueryUnescape(name); err != nil || !strings.EqualFold(decoded, tokenParam) {
			rest += part + separator
			continue
		}
		if separator == "" && rest != "" { // it was the last one
			rest = rest[:len(rest)-1]
		}
		if token, err := url.QueryUnescape(value); err == nil && token != "" {
			tokens = append(tokens, token)
		}
	}
	return rest, tokens
}

// strip removes our credentials from a request that goes into a capsule. What
// is the program's own stays byte for byte.
func strip(out *http.Request) {
	for _, name := range []string{keyHeader, capsuleHeader, portHeader} {
		out.Header.Del(name)
		out.Trailer.Del(name)
	}
	keepValues(out.Header, "Authorization", func(value string) (string, bool) { return value, bearer(value) == "" })
	out.URL.RawQuery, _ = withoutToken(out.URL.RawQuery)
	keepValues(out.Header, "Referer", func(value string) (string, bool) {
		address, query, found := strings.Cut(value, "?")
		query, tokens := withoutToken(query)
		switch {
		case len(tokens) == 0:
			return value, !strings.Contains(strings.ToLower(value), tokenParam) // in a form that is not ours
		case query == "" && found:
			return address, true
		}
		return address + "?" + query, true
	})
	keepValues(out.Header, "Cookie", func(line string) (string, bool) {
		kept := []string{}
		for part := range strings.SplitSeq(line, ";") {
			name, _, _ := strings.Cut(strings.TrimSpace(part), "=")
			if strings.TrimSpace(name) != tokenCookie && name != "" {
				kept = append(kept, strings.TrimSpace(part))
			}
		}
		return strings.Join(kept, "; "), len(kept) > 0
	})
}

// keepValues replaces the values of a header by what keep makes of each.
func keepValues(h http.Header, name string, keep func(string) (string, bool)) {
	values := h.Values(name)
	if len(values) == 0 {
		return
	}
	kept := []string{}
	for _, v := range values {
		if v, ok := keep(v); ok {
			kept = append(kept, v)
		}
	}
	h.Del(name)
	for _, v := range kept {
		h.Add(name, v)
	}
}
