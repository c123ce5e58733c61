package endpoints

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

const (
	// maxMetrics bounds a page of metrics, in bytes; metricsTimeout how long it may
	// take. Chosen: a server with a hundred models has some 200 KB.
	maxMetrics     = 1 << 20
	metricsTimeout = time.Second
)

func newMetricsClient() *http.Client {
	return &http.Client{
		Timeout:   metricsTimeout,
		Transport: &http.Transport{DialContext: new(net.Dialer).DialContext, MaxIdleConnsPerHost: 1, IdleConnTimeout: time.Minute},
		CheckRedirect: func(*http.Request, []*http.Request) error { // what is configured is asked, and nothing else
			return http.ErrUseLastResponse
		},
	}
}

// readMetrics reads the server's metrics until it is told to stop.
func (e *endpoint) readMetrics() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	host := e.host()
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	url := strings.ReplaceAll(e.set.config.GetLoad().GetMetricsUrl(), "{host}", host)
	go func() {
		defer close(ended)
		tick := time.NewTicker(e.set.interval)
		defer tick.Stop()
		var g gauges
		failed := false
		for {
			l, err := g.read(ctx, e.set.metrics, url)
			switch {
			case ctx.Err() != nil:
				return
			case err == nil:
				e.report(l, Metrics)
			case !failed: // once, not every few seconds
				e.set.log.Warn("a model server's metrics cannot be read", "backend", e.set.config.GetName(), "address", e.address, "error", err)
			}
			failed = err != nil
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	}()
	return func() { cancel(); <-ended }
}

// gauges reads metrics of one server. Triton counts time: how many wait follows
// from how much more of it there is than the last time.
type gauges struct {
	at               time.Time
	queued, computed float64 // microseconds
	averaged         bool
	waiting, running float64 // averages
}

// memory is over how long Triton's times are averaged: it counts those of an inference
// when that ends, so that what took long comes all at once. Chosen: some times what
// an inference takes, and much less than load lasts.
const memory = 15 * time.Second

func (g *gauges) read(ctx context.Context, client *http.Client, url string) (Load, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return Load{}, err
	}
	r.Header.Set("Accept", "text/plain; version=0.0.4")
	resp, err := client.Do(r)
	if err != nil {
		return Load{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return Load{}, fmt.Errorf("the answer is %s", resp.Status)
	}
	page, err := io.ReadAll(io.LimitReader(resp.Body, maxMetrics+1))
	if err != nil {
		return Load{}, err
	}
	return g.parse(page, time.Now())
}

var (
	errMetricsLarge = fmt.Errorf("there are more than %d bytes of metrics", maxMetrics)
	errNoMetrics    = errors.New("none of the metrics says how loaded the server is")
)

// parse reads a page of metrics: those of vLLM and SGLang, and Triton's with or
// without TensorRT-LLM. Several models of one server add up.
func (g *gauges) parse(page []byte, now time.Time) (l Load, err error) {
	if len(page) > maxMetrics {
		return Load{}, errMetricsLarge
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	all, err := parser.TextToMetricFamilies(bytes.NewReader(page))
	if err != nil {
		return Load{}, err
	}
	found := false
	each := func(f func(float64), name string, where ...string) {
		for _, m := range all[name].GetMetric() {
			if len(where) == 0 || labelled(m, where[0], where[1]) {
				found = true
				f(m.GetGauge().GetValue() + m.GetCounter().GetValue() + m.GetUntyped().GetValue()) // two of them are nil
			}
		}
	}
	waiting := func(v float64) { l.Waiting += v }
	running := func(v float64) { l.Running += v }
	use := func(v float64) { l.Utilization = max(l.Utilization, v) }
	each(waiting, "vllm:num_requests_waiting")
	each(running, "vllm:num_requests_running")
	each(use, "vllm:kv_cache_usage_perc")
	each(use, "vllm:gpu_cache_usage_perc") // before vLLM 0.10
	each(waiting, "sglang:num_queue_reqs")
	each(running, "sglang:num_running_reqs")
	each(use, "sglang:token_usage")
	each(waiting, "nv_trt_llm_request_metrics", "request_type", "waiting")
	each(running, "nv_trt_llm_request_metrics", "request_type", "active")
	each(use, "nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type", "fraction")
	if !found {
		found = g.triton(each, &l, now)
	}
	if !found {
		return Load{}, errNoMetrics
	}
	return l, nil
}

// triton reads Triton's own metrics: how many requests wait, if it says so; else
// an average (Little's law: what waits at once is the time that was waited in a
// second). What a model does in threads of its own, as those that stream do, it does
// not count.
func (g *gauges) triton(each func(func(float64), string, ...string), l *Load, now time.Time) bool {
	var queued, computed float64
	counted, pending := false, false
	each(func(v float64) { counted, queued = true, queued+v }, "nv_inference_queue_duration_us")
	each(func(v float64) { counted, computed = true, computed+v }, "nv_inference_compute_infer_duration_us")
	each(func(v float64) { pending, l.Waiting = true, l.Waiting+v }, "nv_inference_pending_request_count")
	if since := now.Sub(g.at); !g.at.IsZero() && since > 0 {
		part := 1.0
		if g.averaged {
			part = 1 - math.Exp(-since.Seconds()/memory.Seconds())
		}
		g.averaged = true
		per := func(now, before float64) float64 {
			x := (now - before) / (since.Seconds() * 1e6)
			if !(x >= 0) || math.IsInf(x, 0) {
				return 0 // it began anew
			}
			return x
		}
		g.waiting += part * (per(queued, g.queued) - g.waiting)
		g.running += part * (per(computed, g.computed) - g.running)
		if !pending {
			l.Waiting = g.waiting
		}
		l.Running = g.running
	}
	g.at, g.queued, g.computed = now, queued, computed
	return counted || pending
}

func labelled(m *dto.Metric, name, value string) bool {
	for _, p := range m.GetLabel() {
		if p.GetName() == name && p.GetValue() == value {
			return true
		}
	}
	return false
}
