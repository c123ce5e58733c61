package config

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluicegate/sluice/interceptors"
)

// A guard that was built is not in force before it is told to be: a reload that
// fails half-way leaves calls in flight alone.
func TestEnforce(t *testing.T) {
	const before = `
identity: {insecure: {}, rules: [{principals: [anonymous], methods: [inference], models: [a]}]}
backends: [{name: model, dialect: DIALECT_TRITON, plaintext: true}]
`
	const after = `
identity: {insecure: {}, rules: [{principals: [anonymous], methods: [health]}]}
backends: [{name: model, dialect: DIALECT_TRITON, plaintext: true}]
`
	synctest.Test(t, func(t *testing.T) {
		build := func(text string, before *Guard) *Guard {
			cfg, err := Parse("sluice.yaml", []byte(text))
			if err != nil {
				t.Fatal(err)
			}
			g, err := Build(cfg, before, Options{})
			if err != nil {
				t.Fatal(err)
			}
			return g
		}
		first := build(before, nil)
		call, err := first.Chain.Begin(context.Background(), interceptors.CallInfo{FullMethod: "/inference.GRPCInferenceService/ModelInfer"})
		if err != nil {
			t.Fatal(err)
		}
		second := build(after, first)
		if second.Live().Len() != 1 {
			t.Error("the guards do not share their calls")
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if err := context.Cause(call.Context()); err != nil {
			t.Fatalf("%v before the second guard was in force", err)
		}
		second.Enforce()
		synctest.Wait()
		var d *interceptors.Denial
		if err := context.Cause(call.Context()); !errors.As(err, &d) || d.Reason != interceptors.IdentityMissing {
			t.Errorf("%v when it was", err)
		}
		call.End(nil)
		first.Close()
		second.Enforce() // it still can
		second.Close()
	})
}
