package edge

import (
	"net/http"
	"slices"

	"github.com/rs/cors"
)

// corsMethods are those that a page of another origin may use.
var corsMethods = []string{
	http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions,
}

// apiHeaders are those of the API's answers that a page of another origin may read.
var apiHeaders = []string{
	"Content-Disposition", "Content-Encoding", "Content-Range", "ETag", "Last-Modified", "Location", "Retry-After",
	"X-Next-Cursor", "X-Request-Id", errorHeader,
}

// corsFor lets pages of origins read answers (the Fetch standard, CORS protocol). They may
// use cookies of the program where the origins are named; with * they could be anybody's.
func corsFor(origins, exposed []string, credentials bool) *cors.Cors {
	return cors.New(cors.Options{
		AllowedOrigins: origins, AllowedMethods: corsMethods, AllowedHeaders: []string{"*"}, ExposedHeaders: exposed,
		AllowCredentials: credentials && !slices.Contains(origins, "*"), MaxAge: 2 * 60 * 60,
	})
}

// isPreflight tells whether a browser asks what a page may ask.
func isPreflight(r *http.Request) bool {
	return r.Method == http.MethodOptions && r.Header.Get("Origin") != "" && r.Header.Get("Access-Control-Request-Method") != ""
}
