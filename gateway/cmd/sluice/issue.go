package main

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/sluicegate/sluice/interceptors/identity"
)

// issueCommand writes identities of a development authority that lives as long
// as the command.
func issueCommand(args []string, stdout, stderr io.Writer) int {
	flags := newFlags("issue", "--directory DIR [flags] PATH[=HOST,...]...", stderr,
		"Makes a development authority, has it issue an X.509-SVID for every SPIFFE ID path (such as /gateway), and writes\n"+
			"NAME.pem and NAME-key.pem for each, and bundle.pem. Hosts are names and addresses of a server, for clients that know\n"+
			"nothing of SPIFFE. The authority's key is not kept: to issue more, issue all anew.\n"+
			"For trying things out; use SPIRE for the rest.")
	directory := flags.String("directory", "", "where the files go")
	domain := flags.String("trust-domain", "sluice.dev", "the trust domain")
	ttl := flags.Duration("ttl", 24*time.Hour, "life of the identities")
	if code, ok := parse(flags, args, -1); !ok {
		return code
	}
	if *directory == "" || flags.NArg() == 0 {
		return usageError(stderr, "issue", "--directory and at least one path are needed")
	}
	td, err := spiffeid.TrustDomainFromString(*domain)
	if err != nil {
		return usageError(stderr, "issue", "--trust-domain: %v", err)
	}
	authority, err := identity.NewAuthority(td)
	if err != nil {
		return fail(stderr, "issue", err)
	}
	for _, arg := range flags.Args() {
		path, list, _ := strings.Cut(arg, "=")
		var hosts []string
		if list != "" {
			hosts = strings.Split(list, ",")
		}
		svid, err := authority.Issue(path, *ttl, hosts...)
		if err != nil {
			return fail(stderr, "issue", err)
		}
		name := strings.ReplaceAll(strings.TrimPrefix(path, "/"), "/", "-")
		if err := authority.WriteFiles(*directory, name, svid); err != nil {
			return fail(stderr, "issue", err)
		}
		fmt.Fprintf(stdout, "%s -> %s/%s.pem\n", svid.ID, *directory, name)
	}
	return 0
}
