package main

import (
	"testing"

	"github.com/sluicegate/sluice/interceptors/config"
)

// What README.md runs with it, test/mesh does with a real SPIRE.
func TestConfigurationIsGood(t *testing.T) {
	cfg, err := config.Read("sluice.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := config.Check(cfg); err != nil {
		t.Fatal(err)
	}
	// What does not fit must be found: else the test above says nothing.
	cfg.GetBackends()[0].SpiffeId = "example.org/model"
	if err := config.Check(cfg); err == nil {
		t.Error("a SPIFFE ID that is none passes")
	}
}
