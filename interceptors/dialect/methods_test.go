package dialect

import (
	"strings"
	"testing"

	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/sluicegate/sluice/proto/gen/inference"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

func TestWhatIsNotKnownToBeHarmlessIsManagement(t *testing.T) {
	for name, open := range openInferenceServers {
		d, err := open(Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range d.Methods {
			want := Management
			switch m.Name {
			case "/inference.GRPCInferenceService/ServerLive", "/inference.GRPCInferenceService/ServerReady", "/inference.GRPCInferenceService/ModelReady":
				want = Health
			case "/inference.GRPCInferenceService/ServerMetadata", "/inference.GRPCInferenceService/ModelMetadata":
				want = Metadata
			case unary:
				want = Inference
			case streaming:
				if want = Inference; name == "kserve" {
					want = Management
				}
			}
			if m.Kind != want {
				t.Errorf("%s: %s has kind %d, want %d", name, m.Name, m.Kind, want)
			}
		}
	}
}

// MLServer has the repository's methods twice. The second service is in no dialect, so that nobody reaches it.
func TestTheSecondRepositoryServiceIsUnknown(t *testing.T) {
	for name, open := range servers {
		d, err := open(Options{})
		if err != nil {
			t.Fatal(err)
		}
		for m := range d.Methods {
			if strings.Contains(m, "ModelRepositoryService") {
				t.Errorf("%s has %s", name, m)
			}
		}
	}
}

func TestOnlyTritonsStreamsCarryManyInferences(t *testing.T) {
	for name, open := range servers {
		d, err := open(Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range d.Methods {
			if want := name == "triton" && m.Name == streaming; m.Multiplexed != want {
				t.Errorf("%s: %s: multiplexed is %t", name, m.Name, m.Multiplexed)
			}
		}
	}
}

func TestTheStreamOfMLServerAnswersWithBareResponses(t *testing.T) {
	for server, want := range map[string]string{"mlserver": "inference.ModelInferResponse", "triton": "inference.ModelStreamInferResponse"} {
		if got := method(t, server, streaming, Options{}).ResponseType; got != want {
			t.Errorf("%s: %s, want %s", server, got, want)
		}
	}
}

func TestParameterKindsThatAServerDoesNotKnowAreRefused(t *testing.T) {
	for _, c := range []struct {
		name  string
		param *inference.InferParameter
		only  string // the one server that knows it
	}{
		{"bool", boolParam(true), ""}, {"int64", intParam(1), ""}, {"string", stringParam("x"), ""},
		{"double", doubleParam(1), "triton"}, {"uint64", uintParam(1), "triton"},
	} {
		b := marshal(t, &inference.ModelInferRequest{ModelName: "m", Parameters: params{"p": c.param}})
		for server := range openInferenceServers {
			_, err := scan(t, method(t, server, unary, Options{}).Request, b)
			if ok := c.only == "" || c.only == server; (err == nil) != ok {
				t.Errorf("%s parameter to %s: %v", c.name, server, err)
			}
			if c.only != "" && c.only != server && kindOf(err) != fields.Ambiguous {
				t.Errorf("%s parameter to %s: got %v, want it ambiguous", c.name, server, err)
			}
			if _, err := scan(t, method(t, server, unary, Options{Lenient: true}).Request, b); err != nil {
				t.Errorf("%s parameter to lenient %s: %v", c.name, server, err)
			}
		}
	}
}

// The number of model_name in RepositoryModelLoad differs: an authoriser that
// reads the wrong one lets any model be loaded.
func TestTheModelToLoadIsReadAsTheServerReadsIt(t *testing.T) {
	field := func(n protowire.Number, v string) []byte {
		return protowire.AppendString(protowire.AppendTag(nil, n, protowire.BytesType), v)
	}
	for server, number := range map[string]protowire.Number{"triton": 2, "mlserver": 2, "kserve": 1} {
		for _, verb := range []string{"Load", "Unload"} {
			m := method(t, server, "/inference.GRPCInferenceService/RepositoryModel"+verb, Options{})
			msg, err := scan(t, m.Request, field(number, "llama"))
			if err != nil {
				t.Fatalf("%s: %v", server, err)
			}
			if r, err := m.ReadRequest(msg); err != nil || r.Model != "llama" {
				t.Errorf("%s: %s: the model is %q, %v", server, verb, r.Model, err)
			}
		}
	}
}

func TestADialectChangesNothingThatAnotherShares(t *testing.T) {
	before, err := apis()
	if err != nil {
		t.Fatal(err)
	}
	want := proto.CloneOf(before)
	for _, open := range servers {
		if _, err := open(Options{}); err != nil {
			t.Fatal(err)
		}
	}
	if after, _ := apis(); !proto.Equal(after, want) {
		t.Error("the embedded descriptors were changed")
	}
}
