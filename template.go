package nestbox

// ImageDefaults are what an image says about the processes that are started from it, as
// far as their caller does not say otherwise. It has the terms of the OCI image
// specification ("Image Configuration").
type ImageDefaults struct {
	Env        map[string]string
	User       string   // as ProcessSpec.User
	Cwd        string   // absolute; "" = the user's home
	Entrypoint []string // with Cmd after it: the image's main program
	Cmd        []string
	Labels     map[string]string
}

// Main returns the image's main program with its arguments; empty = it has none.
func (d ImageDefaults) Main() []string {
	return append(append([]string{}, d.Entrypoint...), d.Cmd...)
}
