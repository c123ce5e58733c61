package interceptors

import (
	"strings"

	"google.golang.org/grpc/metadata"
)

// hopByHop are headers of one connection or of the gRPC protocol itself; every
// transport makes its own.
var hopByHop = map[string]bool{
	"connection":        true,
	"content-length":    true,
	"content-type":      true,
	"host":              true,
	"http2-settings":    true,
	"keep-alive":        true,
	"proxy-connection":  true,
	"te":                true,
	"trailer":           true,
	"transfer-encoding": true,
	"upgrade":           true,
	"user-agent":        true,
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
	"x-auth-request-",       // oauth2-proxy
	"ssl-client-", "x-ssl-", // nginx
	"l5d-",                  // Linkerd
	"triton-grpc-protocol-", // Triton's key to its restricted methods
	"x-sluice-",             // ours
}

// Untrusted reports whether a caller's header is one by which the caller could
// pass for somebody else, or open what is closed to it. Doors do not forward
// it. Case does not matter, nor which of "-", "_" and "." joins the words:
// some servers take them for the same.
func Untrusted(key string) bool {
	for _, prefix := range untrusted {
		if beginsWith(key, prefix) {
			return true
		}
	}
	return false
}

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

// Sanitize is what a door forwards of a caller's metadata: a copy, which shares
// the values, without pseudo-headers, headers of the connection, headers that gRPC reserves for
// itself ("grpc-") and those that are Untrusted. The keys of the copy are in
// lower case.
func Sanitize(md metadata.MD) metadata.MD {
	out := make(metadata.MD, len(md))
	for key, values := range md {
		lower := strings.ToLower(key)
		if key == "" || key[0] == ':' || hopByHop[lower] || strings.HasPrefix(lower, "grpc-") || Untrusted(lower) {
			continue
		}
		if had := out[lower]; had != nil {
			values = append(had[:len(had):len(had)], values...) // the same key in another case
		}
		out[lower] = values
	}
	return out
}
