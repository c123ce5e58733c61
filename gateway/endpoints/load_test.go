package endpoints

import (
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	orcapb "github.com/cncf/xds/go/xds/data/orca/v3"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
)

func TestReportsInMetadata(t *testing.T) {
	binary := func(m *orcapb.OrcaLoadReport) metadata.MD {
		b, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return metadata.Pairs(binaryKey, string(b))
	}
	text := func(s string) metadata.MD { return metadata.Pairs(textKey, s) }
	for name, c := range map[string]struct {
		md   metadata.MD
		want Load
		none bool
	}{
		"application": {md: binary(&orcapb.OrcaLoadReport{ApplicationUtilization: .7, CpuUtilization: .1}), want: Load{Utilization: .7}},
		"processor":   {md: binary(&orcapb.OrcaLoadReport{CpuUtilization: .1}), want: Load{Utilization: .1}},
		"cache": {md: binary(&orcapb.OrcaLoadReport{CpuUtilization: .1, NamedMetrics: map[string]float64{"kv_cache_utilization": .4}}),
			want: Load{Utilization: .4}},
		"requests": {md: binary(&orcapb.OrcaLoadReport{NamedMetrics: map[string]float64{"num_requests_waiting": 3, "num_requests_running": 8}}),
			want: Load{Waiting: 3, Running: 8}},
		"text": {md: text("TEXT named_metrics.kv_cache_usage_perc=0.5, named_metrics.num_requests_waiting=2.0"),
			want: Load{Utilization: .5, Waiting: 2}},
		"text of Envoy":      {md: text("TEXT cpu_utilization=0.3,mem_utilization=0.8,rps_fractional=10.0"), want: Load{Utilization: .3}},
		"text, other map":    {md: text("TEXT utilization.kv_cache_utilization=0.25"), want: Load{Utilization: .25}},
		"JSON":               {md: text(`JSON {"application_utilization":0.6,"named_metrics":{"num_requests_waiting":4},"new":1}`), want: Load{Utilization: .6, Waiting: 4}},
		"JSON with a colon":  {md: text(`JSON: {"cpuUtilization":0.6}`), want: Load{Utilization: .6}},
		"base64":             {md: text("BIN SeF6FK5H4eQ/"), want: Load{Utilization: .6525}},
		"nothing":            {md: metadata.Pairs("other", "1"), none: true},
		"twice":              {md: metadata.Pairs(binaryKey, "", binaryKey, ""), none: true},
		"broken":             {md: metadata.Pairs(binaryKey, "\xff"), none: true},
		"broken text":        {md: text("TEXT cpu_utilization=much"), none: true},
		"no pair":            {md: text("TEXT cpu_utilization"), none: true},
		"broken JSON":        {md: text("JSON {"), none: true},
		"broken base64":      {md: text("BIN !"), none: true},
		"another form":       {md: text("YAML cpu_utilization: 1"), none: true},
		"far too much":       {md: text("TEXT " + strings.Repeat("a=1,", maxReport) + "b=1"), none: true},
		"far too much, too":  {md: metadata.Pairs(binaryKey, strings.Repeat("\x00", maxReport+1)), none: true},
		"what is not finite": {md: text("TEXT application_utilization=Inf,named_metrics.num_requests_waiting=NaN"), want: Load{}},
		"less than nothing":  {md: text("TEXT application_utilization=-1"), want: Load{}},
	} {
		t.Run(name, func(t *testing.T) {
			l, ok := loadOf(c.md)
			if ok == c.none {
				t.Fatalf("read: %v", ok)
			}
			if l = l.sound(); ok && (math.Abs(l.Utilization-c.want.Utilization) > .001 || l.Waiting != c.want.Waiting || l.Running != c.want.Running) {
				t.Errorf("got %+v, want %+v", l, c.want)
			}
		})
	}
}

func FuzzReports(f *testing.F) {
	f.Add("TEXT a=1,named_metrics.num_requests_waiting=2", true)
	f.Add(`JSON {"cpu_utilization":0.5}`, true)
	f.Add("BIN AAAA", true)
	f.Add("\x09\x00\x00\x00\x00\x00\x00\xf8\x7f", false)
	f.Fuzz(func(t *testing.T, s string, text bool) {
		key := binaryKey
		if text {
			key = textKey
		}
		if l, ok := loadOf(metadata.Pairs(key, s)); ok {
			checkLoad(t, l)
		}
	})
}

// checkLoad checks that nothing that a server says breaks the choice.
func checkLoad(t *testing.T, l Load) {
	t.Helper()
	l = l.sound()
	for _, v := range []float64{l.Waiting, l.Running, l.Utilization} {
		if !(v >= 0) || math.IsInf(v, 0) {
			t.Fatalf("%+v", l)
		}
	}
	if c := l.cost(0); c < unitCost || c > maxCost {
		t.Fatalf("%+v costs %d", l, c)
	}
}

func TestCostOfAPermit(t *testing.T) {
	for name, c := range map[string]struct {
		load    Load
		running float64
		want    float64
	}{
		"nothing said":        {Load{}, 0, 1},
		"half full":           {Load{Utilization: .5}, 0, 2},
		"full":                {Load{Utilization: 1}, 0, 20},
		"more than full":      {Load{Utilization: 7}, 0, 20},
		"as many wait as run": {Load{Waiting: 8, Running: 8}, 0, 2},
		"nobody else runs":    {Load{Waiting: 8}, 4, 3},
		"far too many wait":   {Load{Waiting: 1e12}, 0, 1000},
		"both":                {Load{Waiting: 8, Running: 8, Utilization: .5}, 0, 4},
	} {
		if got := float64(c.load.cost(c.running)) / unitCost; math.Abs(got-c.want) > .01*c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

// A report is told on, counts for a while, and comes no more often than it may.
func TestAReportCountsForAWhile(t *testing.T) {
	bubble(t, nil, 2, func(s *Set, _ *fakeConn) {
		var told []Load
		s.loaded = func(l Load) { told = append(told, l) }
		a, b := s.of("host0"), s.of("host1")
		a.report(Load{Waiting: 3, Running: 4, Utilization: .5}, Metrics)
		a.report(Load{Waiting: 99}, Metrics)
		b.report(Load{Waiting: 1, Running: 2, Utilization: .25}, Metrics)
		if len(told) != 2 || told[1] != (Load{4, 6, .5}) {
			t.Errorf("told %+v", told)
		}
		if a.cost.Load() == unitCost {
			t.Error("it changes nothing")
		}
		wait(time.Second)
		b.report(Load{Waiting: math.NaN(), Running: math.Inf(1), Utilization: -1}, Metrics)
		if told[2] != (Load{3, 4, .5}) || b.cost.Load() != unitCost {
			t.Errorf("told %+v", told[2])
		}
		wait(s.stale() + 2*time.Second)
		if a.cost.Load() != unitCost || a.reported != (Load{}) {
			t.Error("it is not forgotten")
		}
	})
}

const vllm = `# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="1",model_name="m"} 2.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 12.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{le="1.0",model_name="m"} 1
vllm:e2e_request_latency_seconds_bucket{le="+Inf",model_name="m"} 1
vllm:e2e_request_latency_seconds_sum{model_name="m"} 0.5
vllm:e2e_request_latency_seconds_count{model_name="m"} 1
`

const tensorRT = `# TYPE nv_trt_llm_request_metrics gauge
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 5
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 16
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 512
# TYPE nv_trt_llm_kv_cache_block_metrics gauge
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="tensorrt_llm",version="1"} 0.5
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 6239
`

func triton(queued, computed, pending string) string {
	s := "# TYPE nv_inference_queue_duration_us counter\nnv_inference_queue_duration_us{model=\"a\",version=\"1\"} " + queued +
		"\n# TYPE nv_inference_compute_infer_duration_us counter\nnv_inference_compute_infer_duration_us{model=\"a\",version=\"1\"} " + computed + "\n"
	if pending != "" {
		s += "# TYPE nv_inference_pending_request_count gauge\nnv_inference_pending_request_count{model=\"a\",version=\"1\"} " + pending +
			"\nnv_inference_pending_request_count{model=\"b\",version=\"1\"} 1\n"
	}
	return s
}

func TestMetrics(t *testing.T) {
	for name, c := range map[string]struct {
		pages []string // a second apart
		want  Load
		err   string
	}{
		"vLLM":               {pages: []string{vllm}, want: Load{5, 12, .75}},
		"vLLM before 0.10":   {pages: []string{"# TYPE vllm:gpu_cache_usage_perc gauge\nvllm:gpu_cache_usage_perc 0.5\n"}, want: Load{Utilization: .5}},
		"SGLang":             {pages: []string{"sglang:num_queue_reqs 2\nsglang:num_running_reqs 4\nsglang:token_usage 0.5\n"}, want: Load{2, 4, .5}},
		"TensorRT-LLM":       {pages: []string{triton("0", "0", "7") + tensorRT}, want: Load{5, 16, .5}},
		"Triton, once":       {pages: []string{triton("1000", "5000", "")}},
		"Triton, by time":    {pages: []string{triton("1000", "5000", ""), triton("2001000", "4005000", "")}, want: Load{Waiting: 2, Running: 4}},
		"Triton, by count":   {pages: []string{triton("1000", "5000", "6"), triton("2001000", "4005000", "6")}, want: Load{Waiting: 7, Running: 4}},
		"Triton, a long one": {pages: []string{triton("0", "0", "0"), triton("0", "0", "0"), triton("0", "30000000", "0")}, want: Load{Waiting: 1, Running: 30 * (1 - math.Exp(-1.0/15))}},
		"Triton, restarted":  {pages: []string{triton("1000", "5000", ""), triton("0", "0", "")}},
		"nothing about load": {pages: []string{"# TYPE up gauge\nup 1\n"}, err: "none of the metrics"},
		"no metrics":         {pages: []string{"<html>"}, err: "text format parsing error"},
		"too much":           {pages: []string{strings.Repeat("#", maxMetrics+1)}, err: "more than"},
	} {
		t.Run(name, func(t *testing.T) {
			var g gauges
			var got Load
			var err error
			for n, page := range c.pages {
				got, err = g.parse([]byte(page), time.Unix(int64(1000+n), 0))
			}
			switch {
			case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)), c.err == "" && err != nil:
				t.Fatalf("got %v, want %q", err, c.err)
			case got != c.want:
				t.Errorf("got %+v, want %+v", got, c.want)
			}
		})
	}
}

func FuzzMetrics(f *testing.F) {
	for _, page := range []string{vllm, tensorRT, triton("1", "2", "3"), "vllm:num_requests_waiting NaN\n", "sglang:token_usage +Inf\n", "#"} {
		f.Add(page)
	}
	f.Fuzz(func(t *testing.T, page string) {
		var g gauges
		for n := range 2 {
			if l, err := g.parse([]byte(page), time.Unix(int64(n+1), 0)); err == nil {
				checkLoad(t, l)
			}
		}
	})
}

// What a server may do to whoever reads its metrics is bounded.
func TestMetricsAreReadWithBounds(t *testing.T) {
	var asked atomic.Int32
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer elsewhere.Close()
	release := make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/vllm", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(vllm)) })
	mux.HandleFunc("/missing", http.NotFound)
	mux.HandleFunc("/moved", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, elsewhere.URL, http.StatusFound) })
	mux.HandleFunc("/endless", func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			if _, err := w.Write([]byte(strings.Repeat("# a comment\n", 1000))); err != nil {
				return
			}
		}
	})
	mux.HandleFunc("/silent", func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-release:
		}
	})
	server := httptest.NewServer(mux)
	defer server.Close()
	defer close(release)
	client := newMetricsClient()
	defer client.CloseIdleConnections()
	for path, want := range map[string]string{
		"/vllm": "", "/missing": "404", "/moved": "302", "/endless": "more than", "/silent": "exceeded",
	} {
		var g gauges
		l, err := g.read(t.Context(), client, server.URL+path)
		switch {
		case want == "" && (err != nil || l.Waiting != 5), want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("%s: %+v, %v; want %q", path, l, err, want)
		}
	}
	if asked.Load() != 0 {
		t.Error("a redirection was followed")
	}
}
