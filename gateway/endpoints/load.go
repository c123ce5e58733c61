package endpoints

import (
	"encoding/base64"
	"math"
	"strconv"
	"strings"
	"time"

	orcapb "github.com/cncf/xds/go/xds/data/orca/v3"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// Load is what model servers say of themselves.
type Load struct {
	// Waiting and Running are inferences: in the server's own queue, and at work.
	Waiting, Running float64
	// Utilization is how full the server is, 0 to 1: what it calls so, or else how
	// much of its KV cache is in use. Of several servers it is the fullest's.
	Utilization float64
}

// Source is how a model server says how loaded it is.
type Source uint8

// The zero Source is of a server that said nothing.
const (
	// InCall is ORCA in the header or trailer of a call.
	InCall Source = iota + 1
	// OutOfBand is ORCA by a stream of its own.
	OutOfBand
	// Metrics is Prometheus.
	Metrics
)

const (
	// unitCost is the cost of a permit at a server that says nothing.
	unitCost = 1 << 10
	// maxCost bounds it. Chosen: such a server gets nothing unless all are like it.
	maxCost = 1000 * unitCost
	// fullest is the highest utilization that is believed: a server that has no
	// room at all would get nothing for ever.
	fullest = 0.95
	// defaultInterval is how often servers are asked. Triton's gauges are two
	// seconds old by default.
	defaultInterval = 2 * time.Second
	// inBand is how often at most reports in the trailers of calls are taken. Chosen.
	inBand = 100 * time.Millisecond
)

// cost is the cost of a permit at a server with that load. Time at a server grows
// as 1/(1-utilization) where arrivals are random (the M/M/1 queue), and with what
// waits there for each that is at work.
func (l Load) cost(running float64) uint32 {
	c := unitCost / (1 - min(l.Utilization, fullest)) * (1 + l.Waiting/max(1, l.Running, running))
	return uint32(min(c, maxCost))
}

// sound is the load with what cannot be made sense of taken as 0.
func (l Load) sound() Load {
	for _, f := range []*float64{&l.Waiting, &l.Running, &l.Utilization} {
		if !(*f >= 0) || math.IsInf(*f, 0) {
			*f = 0
		}
	}
	return l
}

// stale is how long a report counts. Out of band, ORCA's servers report no more
// often than every 30 s by default, however often they are asked.
func (s *Set) stale() time.Duration {
	if s.config.GetLoad().GetOrca() {
		return max(90*time.Second, 5*s.interval)
	}
	return max(10*time.Second, 5*s.interval)
}

// report takes in what a server says.
func (e *endpoint) report(l Load, by Source) {
	s := e.set
	s.mu.Lock()
	now := time.Now()
	if s.cc == nil || now.Sub(e.heard) < inBand {
		s.mu.Unlock()
		return
	}
	l = l.sound()
	e.heard, e.reported, e.source = now, l, by
	e.cost.Store(l.cost(float64(e.load.Load())))
	var all Load
	for _, o := range s.endpoints {
		all.Waiting += o.reported.Waiting
		all.Running += o.reported.Running
		all.Utilization = max(all.Utilization, o.reported.Utilization)
	}
	s.mu.Unlock()
	if s.loaded != nil {
		s.loaded(all)
	}
}

// reports is where reports out of band go.
type reports struct{ *endpoint }

// OnLoadReport implements orca.OOBListener.
func (r reports) OnLoadReport(m *orcapb.OrcaLoadReport) { r.report(fromORCA(m), OutOfBand) }

// The names under which model servers report in ORCA's maps; of vLLM and Triton.
const (
	kvUsage     = "kv_cache_usage_perc"
	kvUse       = "kv_cache_utilization"
	waitingName = "num_requests_waiting"
	runningName = "num_requests_running"
)

func fromORCA(m *orcapb.OrcaLoadReport) Load {
	named := func(key string) float64 { return max(m.GetNamedMetrics()[key], m.GetUtilization()[key]) }
	l := Load{Waiting: named(waitingName), Running: named(runningName), Utilization: m.GetApplicationUtilization()}
	if l.Utilization == 0 {
		l.Utilization = max(named(kvUsage), named(kvUse))
	}
	if l.Utilization == 0 {
		l.Utilization = m.GetCpuUtilization()
	}
	return l
}

// The metadata that hold a report.
const (
	binaryKey = "endpoint-load-metrics-bin"
	textKey   = "endpoint-load-metrics"
	// maxReport bounds what is read, in bytes. Chosen: a report has some hundred.
	maxReport = 16 << 10
)

// loadOf reads the report in a header or trailer: ORCA's message, or what begins
// with TEXT, JSON or BIN as model servers and Envoy write it.
func loadOf(md metadata.MD) (Load, bool) {
	if v := md[binaryKey]; len(v) == 1 {
		return fromBinary([]byte(v[0]))
	}
	v := md[textKey]
	if len(v) != 1 || len(v[0]) > maxReport {
		return Load{}, false
	}
	form, body, _ := strings.Cut(strings.TrimSpace(v[0]), " ")
	body = strings.TrimSpace(body)
	switch strings.ToUpper(strings.TrimSuffix(form, ":")) {
	case "TEXT":
		return fromText(body)
	case "JSON":
		m := new(orcapb.OrcaLoadReport)
		err := protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal([]byte(body), m)
		return fromORCA(m), err == nil
	case "BIN":
		b, err := base64.StdEncoding.DecodeString(body)
		if err != nil {
			return Load{}, false
		}
		return fromBinary(b)
	}
	return Load{}, false
}

func fromBinary(b []byte) (Load, bool) {
	m := new(orcapb.OrcaLoadReport)
	if len(b) > maxReport || proto.Unmarshal(b, m) != nil {
		return Load{}, false
	}
	return fromORCA(m), true
}

// fromText reads "name=number, name=number"; the names in maps begin with the
// map's and a dot. One that is not a number makes all of it unreadable.
func fromText(text string) (Load, bool) {
	m := &orcapb.OrcaLoadReport{NamedMetrics: make(map[string]float64), Utilization: make(map[string]float64)}
	for pair := range strings.SplitSeq(text, ",") {
		key, value, ok := strings.Cut(pair, "=")
		number, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
		if !ok || err != nil {
			return Load{}, false
		}
		switch key = strings.TrimSpace(key); key {
		case "cpu_utilization":
			m.CpuUtilization = number
		case "application_utilization":
			m.ApplicationUtilization = number
		default:
			if name, ok := strings.CutPrefix(key, "named_metrics."); ok {
				m.NamedMetrics[name] = number
			} else if name, ok := strings.CutPrefix(key, "utilization."); ok {
				m.Utilization[name] = number
			}
		}
	}
	return fromORCA(m), true
}
