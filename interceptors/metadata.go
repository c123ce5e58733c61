package interceptors

import (
	"context"
	"strings"

	"google.golang.org/grpc/metadata"
)

// hopByHop reports whether a header is one of one connection or of the gRPC protocol
// itself; every transport makes its own.
func hopByHop(key string) bool {
	switch key {
	case "connection", "content-length", "content-type", "host", "http2-settings", "keep-alive", "proxy-connection",
		"te", "trailer", "transfer-encoding", "upgrade", "user-agent":
		return true
	}
	return false
}

// untrusted are the beginnings of headers by which proxies and meshes say who
// a caller is, where it comes from or what it may do. A model server, or
// something between it and us, may believe them.
var untrusted = []string{
	"forwarded",             // RFC 7239
	"x-forwarded-",          // of proxies; Envoy's x-forwarded-client-cert
	"x-real-ip",             // nginx
	"x-envoy-",              // Envoy's internal headers
	"x-gateway-",            // the Gateway API's inference extension: fairness id, destination endpoint
	"x-spiffe-", "x-tenant", // common in meshes
	"x-principal", "x-client-cert",
	"x-remote-", "impersonate-", // Kubernetes
	"remote-user", "x-webauth-", // web servers and Grafana's proxies
	"x-auth-request-",       // oauth2-proxy
	"ssl-client-", "x-ssl-", // nginx
	"x-consumer-", "x-credential-", "x-anonymous-consumer", // Kong
	"x-amzn-oidc-", "x-goog-iap-", "x-goog-authenticated-user-", "x-ms-client-principal", "cf-access-", // clouds
	"l5d-",                  // Linkerd
	"triton-grpc-protocol-", // Triton's key to its restricted methods
	"x-sluice-",             // ours
}

// Untrusted reports whether a caller's header is one by which the caller could
// pass for somebody else, or open what is closed to it. Doors do not forward
// it. Case does not matter, nor which of "-", "_" and "." joins the words:
// some servers take them for the same.
func Untrusted(key string) bool {
	if key == "" {
		return false
	}
	for _, prefix := range untrustedBy[key[0]] {
		if beginsWith(key, prefix) {
			return true
		}
	}
	return false
}

// untrustedBy is untrusted by the first letter, in either case: it is asked for
// every header of every call.
var untrustedBy = func() (by [256][]string) {
	for _, prefix := range untrusted {
		for _, first := range []byte{prefix[0], prefix[0] - 'a' + 'A'} {
			by[first] = append(by[first], prefix)
		}
	}
	return by
}()

func beginsWith(key, prefix string) bool {
	if len(key) < len(prefix) {
		return false
	}
	for n := range len(prefix) {
		c := key[n]
		switch {
		case 'A' <= c && c <= 'Z':
			c += 'a' - 'A'
		case c == '_' || c == '.':
			c = '-'
		}
		if c != prefix[n] {
			return false
		}
	}
	return true
}

// Forwarded is the metadata that goes on to the model server: the caller's, as
// Sanitize leaves it, and what the policies say.
func (c *Call) Forwarded() metadata.MD {
	md := Sanitize(c.Metadata)
	c.send(md)
	return md
}

// send puts what the policies say in the place of what the caller said: two trace
// contexts are none.
func (c *Call) send(md metadata.MD) {
	for key, values := range c.Outgoing {
		if len(values) == 0 {
			delete(md, key)
		} else {
			md[key] = values
		}
	}
}

// incomingContext is the context for a handler that is linked in. It sees of the
// caller's metadata what a model server behind the gateway would, and what is of
// the connection.
func (c *Call) incomingContext() context.Context {
	hidden := 0
	for key := range c.Metadata {
		if c.hides(key) {
			hidden++
		}
	}
	if hidden == 0 {
		return c.ctx
	}
	md := make(metadata.MD, len(c.Metadata)-hidden)
	for key, values := range c.Metadata {
		if !c.hides(key) {
			md[key] = values
		}
	}
	return metadata.NewIncomingContext(c.ctx, md)
}

// hides reports whether a header of the caller is not for the model server.
func (c *Call) hides(key string) bool {
	switch {
	case Untrusted(key):
		return true
	case len(c.Outgoing) == 0:
		return false
	}
	values, said := c.Outgoing[strings.ToLower(key)]
	return said && len(values) == 0
}

// Sanitize is what a door forwards of a caller's metadata: a copy, which shares
// the values, without pseudo-headers, headers of the connection, headers that gRPC reserves for
// itself ("grpc-") and those that are Untrusted. The keys of the copy are in
// lower case.
func Sanitize(md metadata.MD) metadata.MD {
	out := make(metadata.MD, len(md))
	for key, values := range md {
		lower := strings.ToLower(key)
		if key == "" || key[0] == ':' || hopByHop(lower) || strings.HasPrefix(lower, "grpc-") || Untrusted(lower) {
			continue
		}
		if had := out[lower]; had != nil {
			values = append(had[:len(had):len(had)], values...) // the same key in another case
		}
		out[lower] = values
	}
	return out
}
