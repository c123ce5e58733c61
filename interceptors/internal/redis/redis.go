// Package redis connects to the Redis or Valkey that gateways share.
package redis

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/redis/rueidis"

	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// DefaultTimeout is how long an answer may take: a hundred times what a round trip
// in a data centre does. Chosen.
const DefaultTimeout = 50 * time.Millisecond

// Client is a connection that is made when it is first needed, and again for as long
// as that fails: a gateway starts also while its store is away. It is safe for
// concurrent use.
type Client struct {
	// Timeout is how long an answer may take.
	Timeout time.Duration

	options rueidis.ClientOption
	mu      sync.Mutex
	client  rueidis.Client // nil until the first connection
}

// New reads the configuration. Nothing is dialed. An error begins with the field
// that is at fault.
func New(c *configv1.Redis) (*Client, error) {
	r := &Client{Timeout: DefaultTimeout, options: rueidis.ClientOption{
		InitAddress: c.GetAddresses(), Username: c.GetUsername(), ClientName: "sluice",
		DisableCache: true, DisableRetry: true,
	}}
	if len(c.GetAddresses()) == 0 {
		return nil, fmt.Errorf("addresses: there are none; say host:port")
	}
	if d := c.GetTimeout(); d != nil {
		r.Timeout = d.AsDuration()
	}
	r.options.ConnWriteTimeout = r.Timeout
	r.options.Dialer.Timeout = r.Timeout
	if file := c.GetPasswordFile(); file != "" {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("password_file: %w", err)
		}
		r.options.Password = strings.TrimRight(string(b), "\r\n")
	}
	if file := c.GetCaFile(); file != "" {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("ca_file: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(b) {
			return nil, fmt.Errorf("ca_file: %s has no certificate in PEM", file)
		}
		r.options.TLSConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	return r, nil
}

// Connect is the connection. It blocks while it is dialed, for Timeout at most.
func (r *Client) Connect() (rueidis.Client, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.client != nil {
		return r.client, nil
	}
	client, err := rueidis.NewClient(r.options)
	if err != nil {
		return nil, err
	}
	r.client = client
	return client, nil
}

// Reset ends the connection, so that the next Connect makes a new one.
func (r *Client) Reset() {
	r.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.client = nil
}

// Close ends the connection.
func (r *Client) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.client != nil {
		r.client.Close()
	}
}
