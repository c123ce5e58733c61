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

	adminv1 "github.com/sluicegate/sluice/proto/gen/sluice/admin/v1"
)

// endpointCommand sees the model servers behind a running gateway.
func endpointCommand(args []string, stdout, stderr io.Writer) int {
	const name = "endpoint"
	f := newEndpoint(stderr)
	switch {
	case len(args) == 0:
		return usageError(stderr, name, "say what: list")
	case args[0] == "list":
		return f.command(args[1:], stdout, stderr)
	case args[0] == "help" || args[0] == "--help" || args[0] == "-h" || args[0] == "-help":
		f.flags.Usage()
		return 0
	}
	return usageError(stderr, name, "there is no %q; there is list", args[0])
}

// endpointFlags are the flags of "endpoint list".
type endpointFlags struct {
	flags *flag.FlagSet
	adminFlags
	backend string
}

func newEndpoint(stderr io.Writer) *endpointFlags {
	e := new(endpointFlags)
	e.flags = newFlags("endpoint list", adminSynopsis, stderr,
		"Lists the model servers behind a running gateway: whether each can take calls, what is at work there, and how loaded it\n"+
			"says it is, by a call's ORCA report, by ORCA out of band, or by its metrics.\n"+
			"The gateway must have listener.admin_api, and a rule that names the method: /sluice.admin.v1.EndpointsService/ListEndpoints"+
			".\nExit status: 0 done, 1 failed, 2 wrong usage.")
	e.flags.StringVar(&e.backend, "backend", "", "only the model servers of this back end")
	e.add(e.flags)
	return e
}

func (e *endpointFlags) command(args []string, stdout, stderr io.Writer) int {
	const name = "endpoint list"
	if code, ok := parse(e.flags, args, 0); !ok {
		return code
	}
	if wrong := e.wrong(); wrong != "" {
		return usageError(stderr, name, "%s", wrong)
	}
	err := e.with(func(ctx context.Context, conn grpc.ClientConnInterface) error {
		r, err := adminv1.NewEndpointsServiceClient(conn).ListEndpoints(ctx, &adminv1.ListEndpointsRequest{Backend: e.backend})
		if err != nil {
			return err
		}
		return e.print(stdout, r.GetEndpoints(), time.Now())
	})
	if err != nil {
		if s, ok := status.FromError(err); ok {
			err = errors.New(s.Message())
		}
		return fail(stderr, name, err)
	}
	return 0
}

// print writes a line for each model server.
func (e *endpointFlags) print(w io.Writer, all []*adminv1.Endpoint, now time.Time) error {
	if e.json {
		for _, s := range all {
			text, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(s)
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
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "BACKEND\tADDRESS\tSTATE\tCALLS\tPERMITS\tSEQUENCES\tFAILURES\tWAITING\tRUNNING\tUTILIZATION\tREPORTED BY")
	for _, s := range all {
		state := strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(s.GetState().String(), "ENDPOINT_STATE_"), "_", " "))
		if until := s.GetEjectedUntil(); until != nil {
			state += " for " + max(0, until.AsTime().Sub(now)).Round(time.Second).String()
		}
		ours := fmt.Sprintf("%d\t%d\t%d\t%d", s.GetCalls(), s.GetPermits(), s.GetSequences(), s.GetFailures())
		theirs := "-\t-\t-\t-"
		if r := s.GetReported(); r != nil {
			theirs = fmt.Sprintf("%s\t%s\t%.2f\t%s", number(r.GetWaiting()), number(r.GetRunning()), r.GetUtilization(),
				strings.ToLower(strings.TrimPrefix(r.GetSource().String(), "LOAD_SOURCE_")))
		}
		if s.GetControlled() {
			ours, theirs = "-\t-\t-\t-", "-\t-\t-\tcontrol plane"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", s.GetBackend(), s.GetAddress(), state, ours, theirs)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, s := range all {
		if s.GetFailure() == "" {
			continue
		}
		// What the network says, on one line.
		if _, err := fmt.Fprintf(w, "%s %s: %s\n", s.GetBackend(), s.GetAddress(), strconv.Quote(s.GetFailure())); err != nil {
			return err
		}
	}
	return nil
}

// number is a number of inferences, which may be an average.
func number(v float64) string {
	return strings.TrimSuffix(strconv.FormatFloat(v, 'f', 1, 64), ".0")
}
