package main

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
)

// An operator sees and changes the pools of a real gateway, as whom a rule allows.
func TestPool(t *testing.T) {
	dir := t.TempDir()
	if rc, _, errs := said("", "issue", "--directory", dir, "/gateway", "/ops", "/auditor"); rc != 0 {
		t.Fatal(errs)
	}
	text := strings.ReplaceAll(`
listener: {address: "127.0.0.1:0", admin_api: true}
identity:
  files: {certificate: gateway.pem, key: gateway-key.pem, bundle: bundle.pem}
  rules:
  - principals: [spiffe://sluice.dev/ops]
    methods: [API/ListPools, API/GetPool, API/ResizePool, API/DrainPool, API/ResumePool]
  - {principals: [spiffe://sluice.dev/auditor], methods: [API/ListPools, API/GetPool]}
backends: [{name: model, dialect: DIALECT_TRITON, address: "`+words(t)+`", plaintext: true}]
pools:
- {name: gpu, capacity: 8, queue_length: 4, models: [{model: "*", weight: 2}]}
- {name: small, capacity: 9, models: [{model: tiny}], share: {replicas: 3}}
admin: {address: "127.0.0.1:0"}
`, "API/", "/sluice.admin.v1.PoolsService/")
	s := inProcess(t, write(t, filepath.Join(dir, "sluice.yaml"), text))
	pool := func(who string, args ...string) (int, string, string) {
		t.Helper()
		return said("", append(append([]string{"pool"}, args...), "--address", s.address,
			"--certificate", filepath.Join(dir, who+".pem"), "--key", filepath.Join(dir, who+"-key.pem"), "--bundle", filepath.Join(dir, "bundle.pem"))...)
	}
	table := func(text string) (lines []string) {
		for l := range strings.Lines(text) {
			lines = append(lines, strings.Join(strings.Fields(l), " "))
		}
		return lines
	}
	rc, out, errs := pool("auditor", "list")
	if l := table(out); rc != 0 || len(l) != 3 || l[0] != "POOL CONFIGURED CAPACITY AVAILABLE IN USE WAITING TENANTS REFUSED GATEWAYS STATE" ||
		l[1] != "gpu 8 8 8 0 0 0 0 1 open" || l[2] != "small 3 3 3 0 0 0 0 3 open" {
		t.Errorf("%d %s%s", rc, out, errs)
	}
	rc, out, errs = pool("ops", "resize", "gpu", "5")
	if l := table(out); rc != 0 || len(l) != 2 || l[1] != "gpu 8 5 5 0 0 0 0 1 open" {
		t.Errorf("%d %s%s", rc, out, errs)
	}
	rc, out, errs = pool("ops", "drain", "gpu", "--json")
	var line map[string]any
	if err := json.Unmarshal([]byte(out), &line); rc != 0 || err != nil || line["draining"] != true || line["in_use"] != "0" || strings.Count(out, "\n") != 1 {
		t.Errorf("%d %v %s%s", rc, err, out, errs)
	}
	rc, out, errs = pool("auditor", "show", "gpu")
	if l := table(out); rc != 0 || l[1] != "gpu 8 5 5 0 0 0 0 1 drained" || l[3] != "PERMITS ARE HELD FOR -" || l[6] != "0 0 -" {
		t.Errorf("%d %s%s", rc, out, errs)
	}
	if rc, out, errs = pool("ops", "resume", "gpu"); rc != 0 || !strings.Contains(out, "open") {
		t.Errorf("%d %s%s", rc, out, errs)
	}
	for name, tc := range map[string]struct {
		rc   int
		who  string
		args []string
		errs string
	}{
		"the right to look": {1, "auditor", []string{"resize", "gpu", "5"}, "METHOD_DENIED"},
		"too small":         {1, "ops", []string{"resize", "gpu", "1"}, `model "*" weighs 2 permits`},
		"no such pool":      {1, "ops", []string{"show", "cpu"}, `there is no pool "cpu"`},
		"no pool":           {2, "ops", []string{"show"}, "want 1 argument(s), have 0"},
		"two pools":         {2, "ops", []string{"drain", "a", "b"}, "want 1 argument(s), have 2"},
		"a pool to list":    {2, "ops", []string{"list", "gpu"}, "want 0 argument(s), have 1"},
		"no number":         {2, "ops", []string{"resize", "gpu", "many"}, `"many" is no number`},
		"a bad number":      {2, "ops", []string{"resize", "gpu", "0"}, `"0" is no number`},
		"no such verb":      {2, "ops", []string{"burn"}, `there is no "burn"`},
	} {
		t.Run(name, func(t *testing.T) {
			rc, out, errs := pool(tc.who, tc.args...)
			if rc != tc.rc || out != "" || !strings.Contains(errs, tc.errs) {
				t.Errorf("%d %q %q, want %d and %q", rc, out, errs, tc.rc, tc.errs)
			}
		})
	}
	if rc, _, errs := said("", "pool"); rc != 2 || !strings.Contains(errs, "say what") {
		t.Errorf("%d %q", rc, errs)
	}
	if rc, _, errs := said("", "pool", "list", "--address", "x"); rc != 2 || !strings.Contains(errs, "say who we are") {
		t.Errorf("%d %q", rc, errs)
	}
	if rc, _, errs := said("", "pool", "--help"); rc != 0 || !strings.Contains(errs, "PoolsService/ResumePool") {
		t.Errorf("%d %q", rc, errs)
	}
	s.log.await(t, "a pool was resized", `"capacity":5`, "spiffe://sluice.dev/ops")
}

// A pool with everything that can be shown.
func TestPoolIsShown(t *testing.T) {
	var out strings.Builder
	err := show(&out, &adminv1.Pool{
		Name: "gpu", Configured: 8, Capacity: 6, Available: 3, InUse: 2, Waiting: 1, Draining: true, Hold: durationpb.New(1234567 * time.Microsecond),
		Refused:     []*adminv1.Refused{{Reason: "QUEUE_FULL", Count: 7}},
		Priorities:  []*adminv1.PriorityState{{Priority: -1, Waiting: 1, Wait: durationpb.New(time.Second)}},
		Tenants:     []*adminv1.TenantState{{Tenant: "a\n\x1b[2Jb  1", Weight: 3, Served: 9, Share: .75}, {}},
		TenantCount: 5, Sharing: &adminv1.Sharing{Gateways: 2, InUse: 4},
	})
	want := []string{
		"POOL CONFIGURED CAPACITY AVAILABLE IN USE WAITING TENANTS REFUSED GATEWAYS STATE", "gpu 8 6 3 2 1 5 7 2 draining",
		"", "IN USE IN ALL GATEWAYS 4", "", "PERMITS ARE HELD FOR 1.2346s", "", "PRIORITY WAITING WAIT", "-1 1 1s", "", "REFUSED INFERENCES", "QUEUE_FULL 7",
		"", "TENANT WEIGHT IN USE RESERVED WAITING WAIT SERVED SHARE REFUSED", `"a\n\x1b[2Jb 1" 3 0 0 0 - 9 0.750 0`, `"" 0 0 0 0 - 0 0.000 0`, "and 3 more",
	}
	var got []string
	for l := range strings.Lines(out.String()) {
		got = append(got, strings.Join(strings.Fields(l), " "))
	}
	if err != nil || strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("%v\n%s", err, out.String())
	}
}
