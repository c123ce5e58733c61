package gateway

import (
	"context"
	"strings"
	"testing"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

// What the gateway serves itself passes the chain as well.
func TestHealthPassesTheChain(t *testing.T) {
	_, behind := modelServer(t)
	without := strings.Replace(base, ", health", "", 1)
	for name, tc := range map[string]struct{ config, want string }{
		"allowed":     {base, "OK"},
		"not allowed": {without, "Unauthenticated IDENTITY_MISSING"},
	} {
		t.Run(name, func(t *testing.T) {
			g := open(t, tc.config, behind)
			g.eventually("it is ready", func() bool { return g.Ready() == nil })
			c := healthpb.NewHealthClient(g.dial())
			r, err := c.Check(ctx(t), &healthpb.HealthCheckRequest{})
			expect(t, "Check", err, tc.want)
			if err == nil && r.GetStatus() != healthpb.HealthCheckResponse_SERVING {
				t.Errorf("status %v", r.GetStatus())
			}
			watch, cancel := context.WithCancel(ctx(t))
			defer cancel()
			s, err := c.Watch(watch, &healthpb.HealthCheckRequest{})
			if err == nil {
				_, err = s.Recv()
			}
			expect(t, "Watch", err, tc.want)
		})
	}
}

// A reload that takes them away ends streams of the gateway's own, also those
// that wait for the caller.
func TestAReloadEndsOwnStreams(t *testing.T) {
	_, behind := modelServer(t)
	const methods = "methods: [/grpc.reflection.v1.ServerReflection/ServerReflectionInfo, health"
	named := strings.Replace(base, "methods: [inference, metadata, health", methods, 1) + "listener: {address: x, reflection: true}\n"
	g := open(t, named, behind)
	g.eventually("it is ready", func() bool { return g.Ready() == nil })
	conn := g.dial()
	w, err := healthpb.NewHealthClient(conn).Watch(ctx(t), &healthpb.HealthCheckRequest{})
	if err == nil {
		_, err = w.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	r, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx(t))
	if err == nil {
		err = r.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
	}
	if err == nil {
		_, err = r.Recv()
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Reload(parse(t, strings.Replace(named, methods, "methods: [metadata", 1), behind)); err != nil {
		t.Fatal(err)
	}
	_, err = w.Recv()
	expect(t, "Watch", err, "Unauthenticated IDENTITY_MISSING")
	_, err = r.Recv()
	expect(t, "reflection", err, "Unauthenticated IDENTITY_MISSING")
	g.idle()
}

func reflect(t *testing.T, conn *grpc.ClientConn) ([]string, error) {
	t.Helper()
	c, cancel := context.WithCancel(ctx(t))
	defer cancel()
	s, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(c)
	if err != nil {
		return nil, err
	}
	_ = s.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
	r, err := s.Recv()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, service := range r.GetListServicesResponse().GetService() {
		out = append(out, service.GetName())
	}
	return out, nil
}

func TestReflection(t *testing.T) {
	_, behind := modelServer(t)
	const on = "listener: {address: x, reflection: true}\n"
	named := strings.Replace(base, "methods: [", "methods: [/grpc.reflection.v1.ServerReflection/ServerReflectionInfo, ", 1)
	for name, tc := range map[string]struct{ config, want string }{
		"off":              {base, "Unimplemented METHOD_UNKNOWN"},
		"off, with a rule": {named, "Unimplemented METHOD_UNKNOWN"},
		"on, without one":  {base + on, "Unauthenticated IDENTITY_MISSING"},
		"on, with a rule":  {named + on, "OK"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := reflect(t, open(t, tc.config, behind).dial())
			expect(t, "reflection", err, tc.want)
			if err == nil && len(got) == 0 {
				t.Error("it lists nothing")
			}
		})
	}
}

// Two back ends with the same paths, other messages, and other models.
const two = `
identity:
  insecure: {}
  rules: [{principals: [anonymous], methods: [inference], models: ["*"]}]
backends:
- {name: triton, dialect: DIALECT_TRITON, plaintext: true, models: [words, echo]}
- {name: mlserver, dialect: DIALECT_MLSERVER, plaintext: true, models: [text]}
`

func TestRouteByModel(t *testing.T) {
	m, triton := modelServer(t)
	mlserver := script(t, func(method string, ss grpc.ServerStream) error {
		for n := 0; ; n++ {
			var r inference.ModelInferRequest
			if err := ss.RecvMsg(&r); err != nil {
				return nil
			}
			if err := ss.SendMsg(reply(r.GetModelName(), r.GetId(), "from mlserver")); err != nil {
				return err
			}
			if method == modelInfer {
				return nil
			}
		}
	})
	g := open(t, two, triton, mlserver)
	c := g.client()
	for name, want := range map[string]string{"echo": "hello", "text": "from mlserver"} {
		r, err := c.ModelInfer(ctx(t), ask(name, "a", "hello"))
		if err != nil || string(r.GetRawOutputContents()[0][4:]) != want {
			t.Errorf("%s: got %v, %v", name, r, err)
		}
	}
	_, err := c.ModelInfer(ctx(t), ask("nobody", "a", "hello"))
	expect(t, "a model of neither", err, "PermissionDenied MODEL_DENIED")

	t.Run("a stream of the first", func(t *testing.T) {
		s, err := c.ModelStreamInfer(ctx(t))
		if err != nil {
			t.Fatal(err)
		}
		before := m.Seen()
		for _, r := range []*inference.ModelInferRequest{ask("echo", "a", "hello"), ask("text", "b", "hello"), ask("words", "c", "hello")} {
			if err := s.Send(r); err != nil {
				t.Fatal(err)
			}
		}
		_ = s.CloseSend()
		got := make(map[string]string)
		for {
			r, err := s.Recv()
			if err != nil {
				break
			}
			got[r.GetInferResponse().GetId()] += r.GetErrorMessage()
		}
		if len(got) != 3 || got["a"] != "" || !strings.HasPrefix(got["b"], "ROUTE_CONFLICT") || got["c"] != "" {
			t.Errorf("got %q", got)
		}
		if n := m.Seen() - before; n != 2 {
			t.Errorf("the first back end saw %d inferences, want 2", n)
		}
	})
	t.Run("a stream of the second", func(t *testing.T) {
		conn := g.dial()
		s, err := conn.NewStream(ctx(t), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, modelStreamInfer)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SendMsg(ask("text", "a", "hello")); err != nil {
			t.Fatal(err)
		}
		var r inference.ModelInferResponse // bare, as MLServer has it
		if err := s.RecvMsg(&r); err != nil || r.GetId() != "a" || string(r.GetRawOutputContents()[0][4:]) != "from mlserver" {
			t.Errorf("got %v, %v", &r, err)
		}
		if err := s.SendMsg(ask("echo", "b", "hello")); err != nil {
			t.Fatal(err)
		}
		for err == nil {
			err = s.RecvMsg(&r)
		}
		if code := status.Code(err).String(); code != "InvalidArgument" {
			t.Errorf("another model on the stream: %v", err)
		}
	})
}
