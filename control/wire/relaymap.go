package wire

// DERPMap lists the relays. A node needs at least one region to come up.
type DERPMap struct {
	HomeParams *DERPHomeParams `json:",omitempty"`
	// Regions nil = unchanged; otherwise it replaces what was known. A nil
	// region is ignored.
	Regions            map[int]*DERPRegion
	OmitDefaultRegions bool `json:"omitDefaultRegions,omitempty"`
}

// DERPHomeParams biases the choice of the home region.
type DERPHomeParams struct {
	RegionScore map[int]float64 `json:",omitempty"` // factor on measured latency
}

// DERPRegion is a set of relays that serve as one.
type DERPRegion struct {
	RegionID        int // 1–65535; 900–999 are for private use
	RegionCode      string
	RegionName      string
	Latitude        float64     `json:",omitempty"`
	Longitude       float64     `json:",omitempty"`
	Avoid           bool        `json:",omitempty"`
	NoMeasureNoHome bool        `json:",omitempty"`
	Nodes           []*DERPNode // in order of preference
}

// DERPNode is one relay.
type DERPNode struct {
	Name     string // unique over all regions
	RegionID int
	HostName string // TLS name, and what is dialled when IPv4 and IPv6 are ""
	// CertName "" = verify against HostName; a DNS name = verify against that;
	// "sha256-raw:<64 hex>" = pin of the DER certificate.
	CertName         string `json:",omitempty"`
	IPv4             string `json:",omitempty"` // "" = DNS; "none" = no IPv4
	IPv6             string `json:",omitempty"`
	STUNPort         int    `json:",omitempty"` // 0 = 3478, -1 = no STUN
	STUNOnly         bool   `json:",omitempty"`
	DERPPort         int    `json:",omitempty"` // 0 = 443
	InsecureForTests bool   `json:",omitempty"`
	STUNTestIP       string `json:",omitempty"`
	CanPort80        bool   `json:",omitempty"`
}

// RelayRequest is the body of POST /machine/relay, by which a relay process
// announces itself to the control server and asks for its members. The answer
// is a stream of RelayUpdate messages, framed like a map stream without
// compression. An addition of this project.
type RelayRequest struct {
	Version  int
	RelayKey string      // the secret that admits a relay
	NodeKey  NodeKey     // the relay's DERP key
	Region   *DERPRegion // how nodes reach it: a region with this one node
	// Leaving takes the relay out of the map, and is answered by one empty
	// update: it drains. Its stream goes on until it has.
	Leaving bool `json:",omitempty"`
}

// RelayUpdate tells a relay whom to admit.
type RelayUpdate struct {
	KeepAlive bool       `json:",omitempty"`
	Full      bool       `json:",omitempty"` // Members is everybody; forget the rest
	Members   []NodeKey  `json:",omitempty"` // admit these
	Removed   []NodeKey  `json:",omitempty"` // and cut these
	Mesh      *RelayMesh `json:",omitempty"` // nil = unchanged
	MeshCode  ErrorCode  `json:",omitempty"` // the stream ends for this reason
}

// RelayMesh tells a relay with which others it forwards: those of its region.
type RelayMesh struct {
	// Key is the secret that they share, 64 hexadecimal digits. It changes
	// with the relays of the region. Nodes never see it.
	Key   string
	Peers []RelayPeer // none = the relay is alone
}

// RelayPeer is another relay of the region.
type RelayPeer struct {
	NodeKey NodeKey   // its DERP key
	Node    *DERPNode // how to reach it
}
