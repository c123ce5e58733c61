package main

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
)

// An operator sees the model servers of a real gateway, as whom a rule allows.
func TestEndpoint(t *testing.T) {
	dir := t.TempDir()
	if rc, _, errs := said("", "issue", "--directory", dir, "/gateway", "/ops", "/nobody"); rc != 0 {
		t.Fatal(errs)
	}
	one, two := words(t), words(t)
	s := inProcess(t, write(t, filepath.Join(dir, "sluice.yaml"), `
listener: {address: "127.0.0.1:0", admin_api: true}
identity:
  files: {certificate: gateway.pem, key: gateway-key.pem, bundle: bundle.pem}
  rules: [{principals: [spiffe://sluice.dev/ops], methods: [/sluice.admin.v1.EndpointsService/ListEndpoints]}]
backends:
- {name: model, dialect: DIALECT_TRITON, addresses: ["`+one+`", "`+two+`"], plaintext: true, readiness: READINESS_SERVER_READY}
- {name: quiet, dialect: DIALECT_TRITON, address: "`+two+`", plaintext: true, models: [other]}
admin: {address: "127.0.0.1:0"}
`))
	endpoint := func(who string, args ...string) (int, string, string) {
		t.Helper()
		return said("", append(append([]string{"endpoint"}, args...), "--address", s.address,
			"--certificate", filepath.Join(dir, who+".pem"), "--key", filepath.Join(dir, who+"-key.pem"), "--bundle", filepath.Join(dir, "bundle.pem"))...)
	}
	const head = "BACKEND ADDRESS STATE CALLS PERMITS SEQUENCES FAILURES WAITING RUNNING UTILIZATION REPORTED BY"
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for done := false; !done; {
		rc, out, errs := endpoint("ops", "list")
		var l []string
		for line := range strings.Lines(out) {
			l = append(l, strings.Join(strings.Fields(line), " "))
		}
		if rc != 0 || len(l) != 4 || l[0] != head || l[3] != "quiet "+two+" idle 0 0 0 0 - - - -" {
			t.Fatalf("%d %s%s", rc, out, errs)
		}
		done = strings.Contains(out, one+"  ready  0") && strings.Contains(out, two+"  ready  0")
		select {
		case <-deadline.C:
			t.Fatalf("they are not ready:\n%s", out)
		default:
		}
	}
	rc, out, errs := endpoint("ops", "list", "--json", "--backend", "quiet")
	var line map[string]any
	if err := json.Unmarshal([]byte(out), &line); rc != 0 || err != nil || line["state"] != "ENDPOINT_STATE_IDLE" || line["calls"] != "0" || strings.Count(out, "\n") != 1 {
		t.Errorf("%d %v %s%s", rc, err, out, errs)
	}
	for name, tc := range map[string]struct {
		rc   int
		who  string
		args []string
		errs string
	}{
		"no right to look":      {1, "nobody", []string{"list"}, "METHOD_DENIED"},
		"no such back end":      {1, "ops", []string{"list", "--backend", "none"}, `there is no back end "none"`},
		"a name too many":       {2, "ops", []string{"list", "model"}, "want 0 argument(s), have"},
		"no such verb":          {2, "ops", []string{"burn"}, `there is no "burn"`},
		"a flag without a verb": {2, "ops", nil, `there is no "--address"`},
	} {
		t.Run(name, func(t *testing.T) {
			rc, out, errs := endpoint(tc.who, tc.args...)
			if rc != tc.rc || out != "" || !strings.Contains(errs, tc.errs) {
				t.Errorf("%d %q %q, want %d and %q", rc, out, errs, tc.rc, tc.errs)
			}
		})
	}
	if rc, _, errs := said("", "endpoint"); rc != 2 || !strings.Contains(errs, "say what") {
		t.Errorf("%d %q", rc, errs)
	}
	if rc, _, errs := said("", "endpoint", "--help"); rc != 0 || !strings.Contains(errs, "EndpointsService/ListEndpoints") {
		t.Errorf("%d %q", rc, errs)
	}
}

// Model servers with everything that can be shown.
func TestEndpointsAreShown(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var out strings.Builder
	err := newEndpoint(&out).print(&out, []*adminv1.Endpoint{
		{Backend: "a", Address: "10.0.0.1:8001", State: adminv1.EndpointState_ENDPOINT_STATE_READY, Calls: 3, Permits: 7, Sequences: 2,
			Reported: &adminv1.ReportedLoad{Source: adminv1.LoadSource_LOAD_SOURCE_METRICS, Waiting: 2.25, Running: 4, Utilization: .5}},
		{Backend: "a", Address: "10.0.0.2:8001", State: adminv1.EndpointState_ENDPOINT_STATE_EJECTED, Failures: 5,
			EjectedUntil: timestamppb.New(now.Add(29600 * time.Millisecond))},
		{Backend: "a", Address: "10.0.0.3:8001", State: adminv1.EndpointState_ENDPOINT_STATE_NOT_READY, Failure: "connection\x1b[2J\nrefused"},
		{Backend: "b", Address: "xds:///models", State: adminv1.EndpointState_ENDPOINT_STATE_CONNECTING, Controlled: true},
	}, now)
	want := []string{
		"BACKEND ADDRESS STATE CALLS PERMITS SEQUENCES FAILURES WAITING RUNNING UTILIZATION REPORTED BY",
		"a 10.0.0.1:8001 ready 3 7 2 0 2.2 4 0.50 metrics", "a 10.0.0.2:8001 ejected for 30s 0 0 0 5 - - - -",
		"a 10.0.0.3:8001 not ready 0 0 0 0 - - - -", "b xds:///models connecting - - - - - - - control plane",
		`a 10.0.0.3:8001: "connection\x1b[2J\nrefused"`,
	}
	var got []string
	for l := range strings.Lines(out.String()) {
		got = append(got, strings.Join(strings.Fields(l), " "))
	}
	if err != nil || strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("%v\n%s", err, out.String())
	}
}
