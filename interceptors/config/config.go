// Package config makes a chain of a configuration: the one place that knows
// every policy, and their order.
package config

import (
	"fmt"
	"os"
	"path/filepath"

	"buf.build/go/protovalidate"
	"buf.build/go/protoyaml"
	"google.golang.org/protobuf/proto"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// Read reads a configuration file. An error names the file, the line and the
// field. Relative paths in the file are taken from its folder. What only Check
// and Build can see, Locate finds the line of.
func Read(file string) (*configv1.Config, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	cfg, err := Parse(file, text)
	if err != nil {
		return nil, err
	}
	resolve(cfg, filepath.Dir(file))
	return cfg, nil
}

// Parse is Read of a text; name stands for the file in errors.
func Parse(name string, text []byte) (*configv1.Config, error) {
	cfg := new(configv1.Config)
	if err := unmarshal(name, text, cfg); err != nil {
		return nil, err
	}
	return cfg, nil
}

// unmarshal reads YAML that is about to be relied on.
func unmarshal(name string, text []byte, m proto.Message) (err error) {
	// protoyaml loses count where a line ends in something else than a newline.
	defer func() {
		if recover() != nil {
			err = fmt.Errorf("%s: it cannot be read as YAML; look for line breaks that are no newlines", name)
		}
	}()
	if err := unambiguous(name, text); err != nil {
		return err
	}
	return protoyaml.UnmarshalOptions{Path: name, Validator: validator{}}.Unmarshal(text, m)
}

// validator is protovalidate as protoyaml wants it, without options.
type validator struct{}

func (validator) Validate(m proto.Message) error { return protovalidate.Validate(m) }

// resolve makes the file names of a configuration absolute.
func resolve(cfg *configv1.Config, dir string) {
	at := func(p *string) {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	if f := cfg.GetIdentity().GetFiles(); f != nil {
		at(&f.Certificate)
		at(&f.Key)
		at(&f.Bundle)
		at(&f.JwtBundle)
		for _, other := range f.GetFederated() {
			at(&other.Bundle)
			at(&other.JwtBundle)
		}
	}
	if d := cfg.GetIdentity().GetDevelopment(); d != nil {
		at(&d.Directory)
	}
	switch store := cfg.GetBudgetStore().GetStore().(type) {
	case *configv1.BudgetStore_File:
		at(&store.File)
	case *configv1.BudgetStore_Redis:
		at(&store.Redis.PasswordFile)
		at(&store.Redis.CaFile)
	}
	if r := cfg.GetRedis(); r != nil {
		at(&r.PasswordFile)
		at(&r.CaFile)
	}
	if u := cfg.GetUsage(); u != nil {
		at(&u.File)
	}
	for n := range cfg.GetInspect().GetRuleFiles() {
		at(&cfg.Inspect.RuleFiles[n])
	}
	for _, b := range cfg.GetBackends() {
		at(&b.DescriptorSet)
	}
	for _, t := range cfg.GetTokenizers() {
		at(&t.File)
	}
}
