// Package kind_test looks at the manifests of kind/ without a cluster: that they
// are hardened, that they fit together, and that the gateway takes their
// configuration. kind/test.sh looks at what runs.
package kind_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/sluicegate/sluice/interceptors/config"
)

const manifests = "../../kind/manifests"

// object is what the tests need to know of a Kubernetes object.
type object struct {
	Kind     string
	Metadata struct{ Name string }
	Spec     struct {
		Template    template
		JobTemplate struct {
			Spec struct{ Template template }
		} `yaml:"jobTemplate"`
		Suspend      bool
		Replicas     int
		MinAvailable int `yaml:"minAvailable"`
	}
}

type template struct {
	Metadata struct{ Labels map[string]string }
	Spec     pod
}

type pod struct {
	AutomountServiceAccountToken *bool `yaml:"automountServiceAccountToken"`
	HostNetwork                  bool  `yaml:"hostNetwork"`
	HostPID                      bool  `yaml:"hostPID"`
	TerminationGracePeriod       int   `yaml:"terminationGracePeriodSeconds"`
	SecurityContext              struct {
		RunAsNonRoot   bool                  `yaml:"runAsNonRoot"`
		RunAsUser      int                   `yaml:"runAsUser"`
		SeccompProfile struct{ Type string } `yaml:"seccompProfile"`
	} `yaml:"securityContext"`
	Containers []container
	Volumes    []map[string]any
}

type container struct {
	Name            string
	Args            []string
	Env             []struct{ Name, Value string }
	Resources       struct{ Requests, Limits map[string]string }
	SecurityContext struct {
		AllowPrivilegeEscalation *bool `yaml:"allowPrivilegeEscalation"`
		ReadOnlyRootFilesystem   bool  `yaml:"readOnlyRootFilesystem"`
		Capabilities             struct{ Add, Drop []string }
		Privileged               bool
	} `yaml:"securityContext"`
	ReadinessProbe map[string]any `yaml:"readinessProbe"`
	LivenessProbe  map[string]any `yaml:"livenessProbe"`
	Lifecycle      struct {
		PreStop struct{ Sleep struct{ Seconds int } } `yaml:"preStop"`
	}
}

// load reads the objects of all manifests.
func load(t *testing.T) (objects []object) {
	t.Helper()
	files, err := filepath.Glob(manifests + "/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no manifests in %s: %v", manifests, err)
	}
	for _, file := range files {
		if base := filepath.Base(file); base == "sluice.yaml" || base == "kustomization.yaml" {
			continue
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for d := yaml.NewDecoder(bytes.NewReader(text)); ; {
			var o object
			if err := d.Decode(&o); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			objects = append(objects, o)
		}
	}
	return objects
}

// pods are the pods of all that makes pods, by its kind and name.
func pods(objects []object) map[string]pod {
	found := make(map[string]pod)
	for _, o := range objects {
		name := o.Kind + "/" + o.Metadata.Name
		for _, t := range []template{o.Spec.Template, o.Spec.JobTemplate.Spec.Template} {
			if len(t.Spec.Containers) > 0 {
				found[name] = t.Spec
			}
		}
	}
	return found
}

// faults says what is not hardened in a pod.
func faults(p pod) (faults []string) {
	check := func(ok bool, format string, args ...any) {
		if !ok {
			faults = append(faults, fmt.Sprintf(format, args...))
		}
	}
	no := func(b *bool) bool { return b != nil && !*b }
	check(no(p.AutomountServiceAccountToken), "automountServiceAccountToken is not false")
	check(!p.HostNetwork && !p.HostPID, "shares a namespace with the host")
	check(p.SecurityContext.RunAsNonRoot && p.SecurityContext.RunAsUser == 65532, "may run as root, or not as 65532")
	check(p.SecurityContext.SeccompProfile.Type == "RuntimeDefault", "no seccomp profile")
	for _, v := range p.Volumes {
		kinds := slices.DeleteFunc(slices.Collect(maps.Keys(v)), func(k string) bool { return k == "name" })
		check(slices.Equal(kinds, []string{"secret"}) || slices.Equal(kinds, []string{"configMap"}), "volume %v can be written", v["name"])
	}
	for _, c := range p.Containers {
		s := c.SecurityContext
		check(no(s.AllowPrivilegeEscalation) && !s.Privileged, "%s: privileges can grow", c.Name)
		check(s.ReadOnlyRootFilesystem, "%s: the root can be written", c.Name)
		check(slices.Equal(s.Capabilities.Drop, []string{"ALL"}) && len(s.Capabilities.Add) == 0, "%s: has capabilities", c.Name)
		limit, known := mebibytes(c.Resources.Limits["memory"], "Mi"), 0
		for _, e := range c.Env {
			if e.Name == "GOMEMLIMIT" {
				known = mebibytes(e.Value, "MiB")
			}
		}
		check(limit > 0 && c.Resources.Requests["cpu"] != "", "%s: no memory limit or no CPU request", c.Name)
		check(known*100 >= limit*88 && known*100 <= limit*92, "%s: GOMEMLIMIT %d MiB is not 90 %% of %d MiB", c.Name, known, limit)
	}
	return faults
}

func mebibytes(text, unit string) (n int) {
	if number, ok := strings.CutSuffix(text, unit); ok {
		_, _ = fmt.Sscanf(number, "%d", &n)
	}
	return n
}

func TestPodsAreHardened(t *testing.T) {
	found := pods(load(t))
	if names := slices.Sorted(maps.Keys(found)); !slices.Equal(names, []string{"CronJob/client", "Deployment/gateway", "Deployment/model"}) {
		t.Errorf("pods of %v", names)
	}
	for name, p := range found {
		for _, f := range faults(p) {
			t.Errorf("%s: %s", name, f)
		}
	}
}

// TestFaultsAreFound gives the check above what it is there to find.
func TestFaultsAreFound(t *testing.T) {
	yes := true
	for name, spoil := range map[string]func(*pod){
		"token":        func(p *pod) { p.AutomountServiceAccountToken = nil },
		"host network": func(p *pod) { p.HostNetwork = true },
		"root":         func(p *pod) { p.SecurityContext.RunAsNonRoot = false },
		"another user": func(p *pod) { p.SecurityContext.RunAsUser = 0 },
		"seccomp":      func(p *pod) { p.SecurityContext.SeccompProfile.Type = "Unconfined" },
		"volume":       func(p *pod) { p.Volumes = append(p.Volumes, map[string]any{"name": "x", "hostPath": nil}) },
		"escalation":   func(p *pod) { p.Containers[0].SecurityContext.AllowPrivilegeEscalation = &yes },
		"privileged":   func(p *pod) { p.Containers[0].SecurityContext.Privileged = true },
		"writable":     func(p *pod) { p.Containers[0].SecurityContext.ReadOnlyRootFilesystem = false },
		"capabilities": func(p *pod) { p.Containers[0].SecurityContext.Capabilities.Drop = nil },
		"no limit":     func(p *pod) { p.Containers[0].Resources.Limits = nil },
		"GOMEMLIMIT":   func(p *pod) { p.Containers[0].Env = nil },
	} {
		t.Run(name, func(t *testing.T) {
			p := pods(load(t))["Deployment/gateway"]
			spoil(&p)
			if len(faults(p)) == 0 {
				t.Error("not found")
			}
		})
	}
}

func TestNamespaceAdmitsHardenedPodsOnly(t *testing.T) {
	text, err := os.ReadFile(manifests + "/namespace.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "pod-security.kubernetes.io/enforce: restricted") {
		t.Error("the namespace does not enforce the restricted pod security standard")
	}
}

// The gateway must have the time to drain before it is killed, be looked at, and
// outlive the loss of one of its pods.
func TestGatewayFitsItsConfiguration(t *testing.T) {
	cfg, err := config.Read(manifests + "/sluice.yaml")
	if err != nil {
		t.Fatal(err)
	}
	objects := load(t)
	p := pods(objects)["Deployment/gateway"]
	c := p.Containers[0]
	drain := int(cfg.GetListener().GetDrainTimeout().AsDuration().Seconds())
	if drain == 0 || drain+c.Lifecycle.PreStop.Sleep.Seconds >= p.TerminationGracePeriod {
		t.Errorf("preStop %d s and drain_timeout %d s do not fit in terminationGracePeriodSeconds %d",
			c.Lifecycle.PreStop.Sleep.Seconds, drain, p.TerminationGracePeriod)
	}
	if c.ReadinessProbe == nil || c.LivenessProbe == nil || cfg.GetAdmin() == nil {
		t.Error("no probes, or no admin listener that they could look at")
	}
	var replicas, available int
	for _, o := range objects {
		switch o.Kind {
		case "Deployment":
			if o.Metadata.Name == "gateway" {
				replicas = o.Spec.Replicas
			}
		case "PodDisruptionBudget":
			available = o.Spec.MinAvailable
		}
	}
	if available < 1 || replicas <= available {
		t.Errorf("a disruption budget of %d with %d replicas", available, replicas)
	}
}
