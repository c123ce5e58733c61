package main

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc/mem"

	"github.com/sluicegate/sluice/interceptors/config"
	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// found is a line of sluice scan.
type found struct {
	Role     string  `json:"role"`
	Path     string  `json:"path"`
	Text     *string `json:"text,omitempty"`
	Hex      *string `json:"hex,omitempty"`
	Value    *int64  `json:"value,omitempty"`
	Shadowed bool    `json:"shadowed,omitempty"`
}

// scanCommand shows what inspection reads in a recorded message.
func scanCommand(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	flags := newFlags("scan", "--method /package.Service/Method [flags] FILE", stderr,
		"Reads one protobuf message (no gRPC frame; - is standard input) and prints a JSON line for every text in it,\n"+
			"in wire order: {role, path, text}, or hex in place of text that is not UTF-8. Occurrences that decoders drop\n"+
			"have \"shadowed\":true. Exits 1 if the message cannot be parsed.")
	method := flags.String("method", "", "the RPC, such as /inference.GRPCInferenceService/ModelInfer")
	name := flags.String("dialect", "triton", dialectNames)
	descriptors := flags.String("descriptors", "", "descriptor set, for --dialect fields")
	response := flags.Bool("response", false, "the message is a response")
	strict := flags.Bool("strict", false, "refuse what decoders may read differently")
	all := flags.Bool("all", false, "print every field with a role, numbers and names too")
	if code, ok := parse(flags, args, 1); !ok {
		return code
	}
	m, err := openMethod(*method, *name, *descriptors, *strict)
	if err != nil {
		return fail(stderr, "scan", err)
	}
	data, err := readFile(flags.Arg(0), stdin)
	if err != nil {
		return fail(stderr, "scan", err)
	}
	var msg fields.Message
	program := m.Request
	if *response {
		// The dialect's own program leaves out what the chain does not read.
		program, err = fields.Compile(m.Response.Descriptor(), fields.Options{Text: fields.Output, Strict: *strict})
		if err != nil {
			return fail(stderr, "scan", err)
		}
	}
	if err := program.Scan(&msg, mem.BufferSlice{mem.SliceBuffer(data)}); err != nil {
		return fail(stderr, "scan", err)
	}
	if *response {
		m.ReadResponse(&msg)
	} else if _, err := m.ReadRequest(&msg); err != nil && *strict {
		return fail(stderr, "scan", err)
	}
	out := json.NewEncoder(stdout)
	out.SetEscapeHTML(false)
	for n := range msg.Fields {
		f := &msg.Fields[n]
		if !*all && (!fields.IsText(f.Role) || !msg.IsString(f)) {
			continue
		}
		line := found{Role: roleName(f.Role), Path: msg.Path(f), Shadowed: f.Shadowed}
		if msg.IsString(f) {
			if v := msg.Bytes(f); utf8.Valid(v) {
				text := string(v)
				line.Text = &text
			} else {
				text := hex.EncodeToString(v)
				line.Hex = &text
			}
		} else if v, ok := msg.Int(f); ok {
			line.Value = &v
		}
		if err := out.Encode(line); err != nil {
			return fail(stderr, "scan", err)
		}
	}
	return 0
}

const dialectNames = "triton, mlserver, kserve, tgis, vllm, sglang or fields"

// openMethod is what a dialect knows of a method.
func openMethod(method, name, descriptors string, strict bool) (*dialect.Method, error) {
	kind, ok := configv1.Dialect_value["DIALECT_"+strings.ToUpper(name)]
	if !ok || kind == 0 {
		return nil, misuse(fmt.Sprintf("no dialect %q; take %s", name, dialectNames))
	}
	b := &configv1.Backend{Dialect: configv1.Dialect(kind), DescriptorSet: descriptors}
	switch b.GetDialect() {
	case configv1.Dialect_DIALECT_VLLM, configv1.Dialect_DIALECT_SGLANG:
		b.Models = []string{""} // whichever
	}
	d, err := config.Dialect(b, &configv1.MessageLimits{Lenient: !strict})
	if err != nil {
		return nil, err
	}
	m := d.Methods[method]
	if m == nil {
		return nil, misuse(fmt.Sprintf("the %s dialect has no method %q; --method wants /package.Service/Method", name, method))
	}
	return m, nil
}

// roleName is a role as people write it: prompt, max_tokens.
func roleName(r fields.Role) string { return strings.ToLower(strings.TrimPrefix(r.String(), "ROLE_")) }

func readFile(name string, stdin io.Reader) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(stdin)
	}
	return os.ReadFile(name)
}

// newFlags makes a command's flags, with a help text of one shape.
func newFlags(name, synopsis string, stderr io.Writer, text string) *flag.FlagSet {
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprintf(stderr, "usage: sluice %s %s\n\n%s\n\n", name, synopsis, text)
		flags.PrintDefaults()
	}
	return flags
}

// parse parses a command's arguments, of which want are not flags (any number if
// it is negative). If it returns false the command is over, with the exit status beside.
func parse(flags *flag.FlagSet, args []string, want int) (int, bool) {
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0, false
	case err != nil:
		return 2, false
	case want >= 0 && flags.NArg() != want:
		fmt.Fprintf(flags.Output(), "sluice %s: want %d argument(s), have %d\n", flags.Name(), want, flags.NArg())
		flags.Usage()
		return 2, false
	}
	return 0, true
}

func usageError(stderr io.Writer, command, format string, args ...any) int {
	fmt.Fprintf(stderr, "sluice %s: %s\n", command, fmt.Sprintf(format, args...))
	return 2
}

func fail(stderr io.Writer, command string, err error) int {
	fmt.Fprintf(stderr, "sluice %s: %v\n", command, err)
	var wrong misuse
	if errors.As(err, &wrong) {
		return 2
	}
	return 1
}

// misuse is an error in what a command was given.
type misuse string

func (m misuse) Error() string { return string(m) }
