// Command sluice guards AI inference over gRPC. See "sluice help".
package main

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	_ "time/tzdata" // the image has no files of time zones, and calendars of budgets need them
)

const manual = `sluice guards AI inference over gRPC.

  sluice serve --config FILE     run the gateway
  sluice demo [--once]           watch a model being guarded, on embedded defaults
  sluice check --config FILE     say whether a configuration is good, and where it is not
  sluice authz explain --config FILE --principal ID --method M
                                 say whether a request is allowed, and by which rule
  sluice authz test FILE...      try authorization rules by cases
  sluice budget list|show|grant|reset --address ADDR
                                 see and change the budgets of a running gateway
  sluice pool list|show|resize|drain|resume --address ADDR
                                 see and change the GPU pools of a running gateway
  sluice endpoint list --address ADDR
                                 see the model servers behind a running gateway
  sluice inspect [--config FILE] judge texts: JSON lines {id,text} in, {id,verdict,score,rules} out
  sluice explain FILE            show how a text, or each text of a request, is judged, and why
  sluice eval --data DIR         measure the inspection with texts whose verdict is known
  sluice scan --method M FILE    show the text in a recorded message, field by field
  sluice model --listen ADDR     run the small model server that the demo uses
  sluice issue --directory D P   write development identities for the SPIFFE ID paths P
  sluice version

"sluice COMMAND --help" says what a command takes. Exit status: 0 done, 1 failed, 2 wrong usage.
`

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

// run is main with its surroundings as arguments, so that tests can be users.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		fmt.Fprint(stderr, manual)
		return 2
	}
	command, args := args[0], args[1:]
	switch command {
	case "serve":
		return serveCommand(args, stdout, stderr)
	case "check":
		return checkCommand(args, stdout, stderr)
	case "authz":
		return authzCommand(args, stdout, stderr)
	case "budget":
		return budgetCommand(args, stdout, stderr)
	case "pool":
		return poolCommand(args, stdout, stderr)
	case "endpoint":
		return endpointCommand(args, stdout, stderr)
	case "inspect":
		return inspectCommand(args, stdin, stdout, stderr)
	case "explain":
		return explainTextCommand(args, stdin, stdout, stderr)
	case "eval":
		return evalCommand(args, stdout, stderr)
	case "scan":
		return scanCommand(args, stdin, stdout, stderr)
	case "demo":
		return demoCommand(args, stdout, stderr)
	case "model":
		return modelCommand(args, stdout, stderr)
	case "issue":
		return issueCommand(args, stdout, stderr)
	case "version", "--version":
		fmt.Fprintln(stdout, version())
		return 0
	case "help", "--help", "-h":
		fmt.Fprint(stdout, manual)
		return 0
	}
	fmt.Fprintf(stderr, "sluice: no command %q\n\n%s", command, manual)
	return 2
}

// version is what the build says of itself.
func version() string {
	v, revision := "devel", ""
	if info, ok := debug.ReadBuildInfo(); ok {
		if info.Main.Version != "" && info.Main.Version != "(devel)" {
			v = info.Main.Version
		}
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				revision = " " + s.Value[:12]
			}
		}
	}
	return fmt.Sprintf("sluice %s%s %s %s/%s", v, revision, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
