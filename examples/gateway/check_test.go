// Package gateway tests the example configuration beside it.
package gateway

import (
	"testing"

	"github.com/sluicegate/sluice/interceptors/config"
)

func TestConfigurationIsGood(t *testing.T) {
	cfg, err := config.Read("sluice.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := config.Check(cfg); err != nil {
		t.Fatal(err)
	}
	// What does not fit must be found: else the test above says nothing.
	cfg.Pools[0].Models[0].Weight = cfg.GetPools()[0].GetCapacity() + 1
	if err := config.Check(cfg); err == nil {
		t.Error("a model heavier than its pool passes")
	}
}
