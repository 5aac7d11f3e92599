package client

// Operations names, for each operationId of the API's document, the method of
// this package that carries it out, or does the same in a better form. A test
// of the API holds the two together.
var Operations = map[string]string{
	"health":     "Client.Health",
	"ready":      "Client.Ready",
	"getOpenAPI": "Client.OpenAPI",
	"getDocs":    "Client.Docs",

	"createCapsule":  "Capsules.Create",
	"listCapsules":   "Capsules.List",
	"getCapsule":     "Capsules.Get",
	"destroyCapsule": "Capsules.Destroy",
	"pingCapsule":    "Capsules.Ping",

	"execCommand":   "Capsule.Exec",
	"streamExec":    "Cmd.Start",
	"listProcesses": "Processes.List",
	"getProcess":    "Processes.Get",
	"killProcess":   "Processes.Kill",
	"signalProcess": "Processes.Signal",
	"writeStdin":    "Processes.WriteStdin",
	"resizeProcess": "Processes.Resize",
	"openPty":       "Capsule.Command", // with Cmd.Terminal
	"streamProcess": "Processes.Attach",
	"processLogs":   "Processes.Logs",

	"uploadFile":      "Files.Write",
	"writeFile":       "Files.Write",
	"streamWriteFile": "Files.Write",
	"downloadFile":    "Files.Read",
	"headFile":        "Files.Stat",
	"readFile":        "Files.Read",
	"streamReadFile":  "Files.Read",
	"listFiles":       "Files.List",
	"statFile":        "Files.Stat",
	"makeDirectory":   "Files.Mkdir",
	"removeFile":      "Files.Remove",
	"watchFiles":      "Files.Watch",
	"getArchive":      "Files.Pack",
	"putArchive":      "Files.Unpack",

	"listPorts":   "Ports.List",
	"getPort":     "Ports.Get",
	"setPort":     "Ports.Set",
	"resetPort":   "Ports.Reset",
	"signPortURL": "Ports.URL",
	"forwardPort": "Ports.Tunnel",

	"getNetwork":    "Capsule.Network",
	"setNetwork":    "Capsule.SetNetwork",
	"getNetworkLog": "Capsule.NetworkLog",
}
