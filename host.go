package nestbox

// HostInfo describes a machine that runs capsules.
type HostInfo struct {
	ID        string
	Driver    string // "gvisor", "fake"
	Version   string // of Nestbox
	CPUs      int
	MemoryMB  int
	Templates []string // names of the templates it can start
}
