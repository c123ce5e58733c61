package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/durationpb"

	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
)

// poolVerbs are what can be done with pools: arguments, the method that it takes, and
// what it does.
var poolVerbs = []struct{ verb, arguments, method, text string }{
	{"list", "", "ListPools", "Lists the GPU pools of a running gateway."},
	{"show", "NAME", "GetPool", "Shows a GPU pool of a running gateway, with its queue, its tenants and what it refused."},
	{"resize", "NAME N", "ResizePool", "Sets the permits of a GPU pool of a running gateway. What runs goes on: with fewer permits than are in use\n" +
		"nothing begins until enough have come back."},
	{"drain", "NAME", "DrainPool", "Has a GPU pool of a running gateway refuse what is new, with UNAVAILABLE and DRAINING. What runs and what\n" +
		"waits goes on: the pool is empty when the columns IN USE and WAITING are 0."},
	{"resume", "NAME", "ResumePool", "Has a drained GPU pool take inferences again."},
}

// poolCommand sees and changes the GPU pools of a running gateway.
func poolCommand(args []string, stdout, stderr io.Writer) int {
	const name = "pool"
	const verbs = "list, show, resize, drain or resume"
	if len(args) == 0 {
		return usageError(stderr, name, "say what: %s", verbs)
	}
	verb, args := args[0], args[1:]
	for n, v := range poolVerbs {
		p := newPool(n, stderr)
		switch verb {
		case v.verb:
			return p.command(args, stdout, stderr)
		case "help", "--help", "-h", "-help":
			p.flags.Usage()
			if n == len(poolVerbs)-1 {
				return 0
			}
		}
	}
	return usageError(stderr, name, "there is no %q; there are %s", verb, verbs)
}

// poolFlags are the flags of "pool".
type poolFlags struct {
	verb  string
	want  int // arguments
	flags *flag.FlagSet
	adminFlags

	pool     string
	capacity int64
}

func newPool(n int, stderr io.Writer) *poolFlags {
	v := poolVerbs[n]
	p := &poolFlags{verb: v.verb, want: len(strings.Fields(v.arguments))}
	p.flags = newFlags("pool "+v.verb, space(v.arguments)+adminSynopsis, stderr,
		v.text+"\nThe gateway must have listener.admin_api, and a rule that names the method: /sluice.admin.v1.PoolsService/"+v.method+
			".\nExit status: 0 done, 1 failed, 2 wrong usage.")
	p.add(p.flags)
	return p
}

func (p *poolFlags) command(args []string, stdout, stderr io.Writer) int {
	name := "pool " + p.verb
	// The pool may be named before the flags or after them.
	var named []string
	for len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		named, args = append(named, args[0]), args[1:]
	}
	if code, ok := parse(p.flags, args, p.want-len(named)); !ok {
		return code
	}
	named = append(named, p.flags.Args()...)
	wrong := p.wrong()
	if len(named) != p.want {
		wrong = fmt.Sprintf("want %d argument(s), have %d", p.want, len(named))
	}
	if len(named) > 0 {
		p.pool = named[0]
	}
	if p.want == 2 && len(named) == 2 {
		var err error
		if p.capacity, err = strconv.ParseInt(named[1], 10, 64); err != nil || p.capacity <= 0 {
			wrong = fmt.Sprintf("%q is no number of permits", named[1])
		}
	}
	if wrong != "" {
		return usageError(stderr, name, "%s", wrong)
	}
	err := p.with(func(ctx context.Context, conn grpc.ClientConnInterface) error {
		return p.do(ctx, adminv1.NewPoolsServiceClient(conn), stdout)
	})
	if err != nil {
		if s, ok := status.FromError(err); ok {
			err = errors.New(s.Message())
		}
		return fail(stderr, name, err)
	}
	return 0
}

func (p *poolFlags) do(ctx context.Context, api adminv1.PoolsServiceClient, stdout io.Writer) error {
	var pool *adminv1.Pool
	switch p.verb {
	case "list":
		r, err := api.ListPools(ctx, &adminv1.ListPoolsRequest{})
		if err != nil {
			return err
		}
		return p.print(stdout, r.GetPools())
	case "show":
		r, err := api.GetPool(ctx, &adminv1.GetPoolRequest{Name: p.pool})
		switch {
		case err != nil:
			return err
		case !p.json:
			return show(stdout, r.GetPool())
		}
		pool = r.GetPool()
	case "resize":
		r, err := api.ResizePool(ctx, &adminv1.ResizePoolRequest{Name: p.pool, Capacity: p.capacity})
		if err != nil {
			return err
		}
		pool = r.GetPool()
	case "drain":
		r, err := api.DrainPool(ctx, &adminv1.DrainPoolRequest{Name: p.pool})
		if err != nil {
			return err
		}
		pool = r.GetPool()
	case "resume":
		r, err := api.ResumePool(ctx, &adminv1.ResumePoolRequest{Name: p.pool})
		if err != nil {
			return err
		}
		pool = r.GetPool()
	}
	return p.print(stdout, []*adminv1.Pool{pool})
}

// print writes a line for each pool.
func (p *poolFlags) print(w io.Writer, pools []*adminv1.Pool) error {
	if p.json {
		for _, l := range pools {
			text, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(l)
			if err != nil {
				return err
			}
			var line json.RawMessage = text
			if err := json.NewEncoder(w).Encode(line); err != nil { // protojson's spaces vary
				return err
			}
		}
		return nil
	}
	if len(pools) == 0 {
		_, err := fmt.Fprintln(w, "there are no pools")
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "POOL\tCONFIGURED\tCAPACITY\tAVAILABLE\tIN USE\tWAITING\tTENANTS\tREFUSED\tGATEWAYS\tSTATE")
	for _, l := range pools {
		var refused int64
		for _, r := range l.GetRefused() {
			refused += r.GetCount()
		}
		gateways, state := "1", "open"
		if s := l.GetSharing(); s != nil {
			gateways = strconv.FormatInt(s.GetGateways(), 10)
			if s.GetLost() {
				state = "store lost"
			}
		}
		if l.GetDraining() {
			state = "draining"
			if l.GetInUse() == 0 && l.GetWaiting() == 0 {
				state = "drained"
			}
		}
		fmt.Fprintf(t, "%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%s\t%s\n", l.GetName(), l.GetConfigured(), l.GetCapacity(), l.GetAvailable(),
			l.GetInUse(), l.GetWaiting(), l.GetTenantCount(), refused, gateways, state)
	}
	return t.Flush()
}

// show writes all that is known of a pool.
func show(w io.Writer, l *adminv1.Pool) error {
	if err := new(poolFlags).print(w, []*adminv1.Pool{l}); err != nil {
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if s := l.GetSharing(); s != nil && s.GetInUse() > 0 {
		fmt.Fprintf(t, "\nIN USE IN ALL GATEWAYS\t%d\n", s.GetInUse())
	}
	fmt.Fprintf(t, "\nPERMITS ARE HELD FOR\t%s\n", span(l.GetHold()))
	fmt.Fprintln(t, "\nPRIORITY\tWAITING\tWAIT")
	for _, p := range l.GetPriorities() {
		fmt.Fprintf(t, "%d\t%d\t%s\n", p.GetPriority(), p.GetWaiting(), span(p.GetWait()))
	}
	if len(l.GetRefused()) > 0 {
		fmt.Fprintln(t, "\nREFUSED\tINFERENCES")
	}
	for _, r := range l.GetRefused() {
		fmt.Fprintf(t, "%s\t%d\n", r.GetReason(), r.GetCount())
	}
	if len(l.GetTenants()) > 0 {
		fmt.Fprintln(t, "\nTENANT\tWEIGHT\tIN USE\tRESERVED\tWAITING\tWAIT\tSERVED\tSHARE\tREFUSED")
	}
	for _, n := range l.GetTenants() {
		name := n.GetTenant() // may be a stranger's choice
		if q := strconv.Quote(name); q != `"`+name+`"` || name == "" || strings.Contains(name, " ") {
			name = q
		}
		fmt.Fprintf(t, "%s\t%d\t%d\t%d\t%d\t%s\t%d\t%.3f\t%d\n", name, n.GetWeight(), n.GetInUse(), n.GetReserved(), n.GetWaiting(),
			span(n.GetWait()), n.GetServed(), n.GetShare(), n.GetRefused())
	}
	if more := l.GetTenantCount() - int64(len(l.GetTenants())); more > 0 {
		fmt.Fprintf(t, "and %d more\n", more)
	}
	return t.Flush()
}

// span is a duration for people.
func span(d *durationpb.Duration) string {
	if d == nil {
		return "-"
	}
	return d.AsDuration().Round(100 * time.Microsecond).String()
}
