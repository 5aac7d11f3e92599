//go:build embed_envd

package envdbin

import _ "embed"

//go:embed envd.bin
var embedded []byte
