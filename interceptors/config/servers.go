package config

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// servers checks where a back end's model servers are said to be. An error begins
// with the field's name.
func servers(b *configv1.Backend) error {
	if b.GetAddress() != "" && len(b.GetAddresses()) > 0 {
		return errors.New("addresses: there is an address too; leave out one of them")
	}
	for n, a := range b.GetAddresses() {
		host, port, err := net.SplitHostPort(a)
		if k, bad := strconv.Atoi(port); err != nil || host == "" || bad != nil || k < 1 || k > 65535 {
			return fmt.Errorf("addresses[%d]: %q is no host:port, such as 10.0.0.7:8001 or [::1]:8001", n, a)
		}
	}
	if scheme, name, _ := strings.Cut(b.GetAddress(), ":"); strings.EqualFold(scheme, "xds") {
		return controlled(b, name)
	}
	text := b.GetLoad().GetMetricsUrl()
	if text == "" {
		return nil
	}
	u, err := url.Parse(strings.ReplaceAll(text, "{host}", "host"))
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return fmt.Errorf(`load.metrics_url: %q is no URL such as "http://{host}:8002/metrics"`, text)
	}
	if !strings.Contains(text, "{host}") && len(b.GetAddresses()) > 1 {
		return fmt.Errorf("load.metrics_url: each server has metrics of its own; write {host} where its host belongs")
	}
	return nil
}

// controlled checks a back end whose servers a control plane knows and chooses among.
// What is ours to choose by would be set in vain.
func controlled(b *configv1.Backend, name string) error {
	u, err := url.Parse("xds:" + name)
	if err != nil || u.Opaque != "" || strings.Trim(u.Path, "/") == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("address: %q names nothing that a control plane knows, such as xds:///models", b.GetAddress())
	}
	for _, f := range []struct {
		name string
		set  bool
	}{
		{"retries", b.GetRetries() > 0},
		{"outliers", b.GetOutliers() != nil},
		{"load", b.GetLoad() != nil},
		{"readiness", b.GetReadiness() != configv1.Readiness_READINESS_UNSPECIFIED},
	} {
		if f.set {
			return fmt.Errorf("%s: the control plane decides about that for %s; leave it out, and say it there", f.name, b.GetAddress())
		}
	}
	return nil
}
