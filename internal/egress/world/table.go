package world

import "github.com/nestbox/nestbox"

// Row is a policy, what a program in a capsule tries under it, and what the world answers.
type Row struct {
	What   string
	Policy nestbox.NetworkPolicy
	Try    Try
	Want   string // Refused, or the answer
}

// Refused is the answer of a Row that gets none.
const Refused = ""

// Try is an attempt of a program.
type Try struct {
	Kind    string `json:"kind"` // http, https, tcp or udp; the last two get "hello" back
	Name    string `json:"name"` // as which http and https show the site
	Address string `json:"address"`
}

// Table has every way out under every kind of policy.
func Table() []Row {
	onlyName := nestbox.NetworkPolicy{Allow: []string{"allowed.test"}}
	e2b := nestbox.NetworkPolicy{Internet: true, Allow: []string{"*.allowed.test"}, Deny: []string{"0.0.0.0/0"}}
	all := nestbox.NetworkPolicy{Internet: true}
	only := func(allow ...string) nestbox.NetworkPolicy { return nestbox.NetworkPolicy{Allow: allow} }
	but := func(deny ...string) nestbox.NetworkPolicy { return nestbox.NetworkPolicy{Internet: true, Deny: deny} }
	return []Row{
		{"all: http", all, Try{"http", "allowed.test", Site}, Site + " allowed.test"},
		{"all: https", all, Try{"https", "allowed.test", Site}, Site + " allowed.test"},
		{"all: another port", all, Try{"tcp", "", Site + ":7777"}, "hello"},
		{"all: UDP", all, Try{"udp", "", Site + ":7777"}, "hello"},
		{"all: QUIC", all, Try{"udp", "", Site + ":443"}, "hello"},
		{"all: nobody listens", all, Try{"tcp", "", Site + ":9"}, Refused},
		{"all: a private address", all, Try{"tcp", "", Private + ":7777"}, Refused},
		{"all: a private address, UDP", all, Try{"udp", "", Private + ":7777"}, Refused},
		{"all: Metadata", all, Try{"http", "metadata.test", Metadata}, Refused},
		{"all: the host", all, Try{"tcp", "", Host + ":7777"}, Refused},
		{"nothing: http", nestbox.NetworkPolicy{}, Try{"http", "allowed.test", Site}, Refused},
		{"nothing: UDP", nestbox.NetworkPolicy{}, Try{"udp", "", Site + ":7777"}, Refused},
		{"a range: in it", only("203.0.113.0/24"), Try{"tcp", "", Site + ":7777"}, "hello"},
		{"a range: in it, UDP", only("203.0.113.0/24"), Try{"udp", "", Site + ":7777"}, "hello"},
		{"a range: outside", only("203.0.113.0/24"), Try{"tcp", "", Site2 + ":7777"}, Refused},
		{"a range: a Private one", only("10.0.0.0/8"), Try{"tcp", "", Private + ":7777"}, Refused},
		{"all but a range: in it", but("203.0.113.0/24"), Try{"tcp", "", Site + ":7777"}, Refused},
		{"all but a range: outside", but("203.0.113.0/24"), Try{"tcp", "", Site2 + ":7777"}, "hello"},
		{"all but a name: http", but("other.test"), Try{"http", "other.test", Site2}, Refused},
		{"all but a name: https", but("other.test"), Try{"https", "other.test", Site2}, Refused},
		{"all but a name: another", but("other.test"), Try{"https", "allowed.test", Site}, Site + " allowed.test"},
		{"all but a name: QUIC", but("other.test"), Try{"udp", "", Site + ":443"}, Refused},
		{"a name: http", onlyName, Try{"http", "allowed.test", Site}, Site + " allowed.test"},
		{"a name: https", onlyName, Try{"https", "allowed.test", Site}, Site + " allowed.test"},
		{"a name: below it", onlyName, Try{"https", "www.allowed.test", Site}, Refused},
		{"a name: another", onlyName, Try{"https", "other.test", Site2}, Refused},
		{"a name: no name", onlyName, Try{"http", Site, Site}, Refused},
		{"a name: another port", onlyName, Try{"tcp", "", Site + ":7777"}, Refused},
		{"a name: UDP", onlyName, Try{"udp", "", Site + ":443"}, Refused},
		{"a name: shown to a foreign address", onlyName, Try{"http", "allowed.test", Site2}, Site + " allowed.test"},
		{"a name: shown to a foreign one, https", onlyName, Try{"https", "allowed.test", Site2}, Site + " allowed.test"},
		{"a name: shown to a private address", onlyName, Try{"http", "allowed.test", Private}, Site + " allowed.test"},
		{"a name: that is a private address", only("rebind.test"), Try{"http", "rebind.test", Site}, Refused},
		{"a name: that is the host", only("host.test"), Try{"http", "host.test", Site}, Refused},
		{"a name: that is Metadata", only("*"), Try{"http", "metadata.test", Site}, Refused},
		{"a name: that is a private address too", only("both.test"), Try{"http", "both.test", Site}, Site + " both.test"},
		{"a name: that is another's", only("alias.test"), Try{"http", "alias.test", Site2}, Site2 + " alias.test"},
		{"a name: that does not exist", only("*"), Try{"http", "nowhere.test", Site}, Refused},
		{"E2B: below a name", e2b, Try{"https", "www.allowed.test", Site}, Site + " www.allowed.test"},
		{"E2B: the name itself", e2b, Try{"https", "allowed.test", Site}, Refused},
	}
}
