package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
)

func TestGuardModel(t *testing.T) {
	const top = `identity: {insecure: {}}
backends:
- {name: model, dialect: DIALECT_TGIS, models: [m], address: "127.0.0.1:1", plaintext: true}
- {name: judges, dialect: DIALECT_KSERVE, models: [judge], address: "127.0.0.1:1", plaintext: true}
inspect:
  guard:
`
	for name, tt := range map[string]struct{ guard, want string }{
		"good":          {"    backend: judges\n    model: judge", ""},
		"no back end":   {"    model: judge\n    backend: nobody", `:8:14 inspect.guard.backend: there is no back end named "nobody"`},
		"no ModelInfer": {"    model: judge\n    backend: model", ":8:14 inspect.guard.backend: its dialect, tgis, has no ModelInfer"},
		"no model":      {"    backend: judges", "inspect.guard.model"},
		"band":          {"    backend: judges\n    model: judge\n    from: .9\n    to: .5", "from is above to"},
		"words":         {"    backend: judges\n    model: judge\n    unsafe: [yes]", "set both of unsafe and safe"},
		"the same word": {"    backend: judges\n    model: judge\n    unsafe: [no]\n    safe: [ok, No]", ":10:16 inspect.guard.safe[1]: "},
		"timeout":       {"    backend: judges\n    model: judge\n    timeout: 5m", "inspect.guard.timeout"},
		"shape":         {"    backend: judges\n    model: judge\n    shape: [2]", "inspect.guard.shape[0]"},
		"role":          {"    backend: judges\n    model: judge\n    roles: [ROLE_MODEL]", "inspect.guard.roles[0]"},
		"on failure":    {"    backend: judges\n    model: judge\n    on_failure: GUARD_FAILURE_ALLOW", ""},
		"an empty band": {"    backend: judges\n    model: judge\n    to: .1", ":7:5 inspect.guard.from: the band would be empty"},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "sluice.yaml")
			if err := os.WriteFile(file, []byte(top+tt.guard+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			cfg, err := Read(file)
			if err == nil {
				err = Check(cfg)
				if err != nil {
					err = Locate(file, err)
				}
			}
			if (err == nil) != (tt.want == "") || err != nil && (!strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "sluice.yaml:")) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if err != nil {
				return
			}
			// A linked chain is given the connection.
			if _, err := Build(cfg, nil, Options{}); err == nil || !strings.HasPrefix(err.Error(), "inspect.guard.backend: ") {
				t.Errorf("without a connection: %v", err)
			}
			g, err := Build(cfg, nil, Options{GuardModel: new(grpc.ClientConn)})
			if err != nil {
				t.Fatal(err)
			}
			g.Close()
		})
	}
}
