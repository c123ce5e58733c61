package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/sluicegate/sluice/interceptors/dialect"
	"github.com/sluicegate/sluice/interceptors/fields"
)

// maxScan is the target for the scan of an 8 MB tensor.
const maxScan = 2 * time.Microsecond

// scanner measures the scan of 8 MB of FP32 in buffers of 16 KiB, as HTTP/2
// frames bring them. The best of many short runs counts: noise only adds.
func (r *report) scanner() error {
	d, err := dialect.Triton(dialect.Options{})
	if err != nil {
		return err
	}
	data, err := proto.Marshal(tensor(8 << 20))
	if err != nil {
		return err
	}
	var buffers mem.BufferSlice
	for len(data) > 0 {
		n := min(len(data), 16<<10)
		buffers, data = append(buffers, mem.SliceBuffer(data[:n])), data[n:]
	}
	scan := d.Methods["/inference.GRPCInferenceService/ModelInfer"].Request.Scan
	var m fields.Message
	again := func() { err = errors.Join(err, scan(&m, buffers)) }
	allocs := testing.AllocsPerRun(100, again)
	best, scans := time.Hour, 200
	for range 2000 {
		began := time.Now()
		for range scans {
			again()
		}
		best = min(best, time.Since(began)/time.Duration(scans))
	}
	r.targets = append(r.targets, target{
		"scan of an 8 MB FP32 tensor", fmt.Sprintf("%v, %v allocations", best, allocs),
		fmt.Sprintf("under %v, none", maxScan), err == nil && best < maxScan && allocs == 0,
	})
	return err
}

// goBenchmarks runs the Go benchmarks of the whole module and takes what they
// print into the report; benchstat reads it there.
func (r *report) goBenchmarks(ctx context.Context, o options) error {
	benchtime := "300ms"
	if o.quick {
		benchtime = "10ms"
	}
	args := []string{"test", "-run=^$", "-bench=" + o.bench, "-benchmem", "-benchtime=" + benchtime,
		"-count=" + strconv.Itoa(o.count), "-timeout=10m", "./..."}
	fmt.Fprintf(&r.micro, "## Go benchmarks\n\n`go")
	for _, a := range args {
		fmt.Fprintf(&r.micro, " %s", a)
	}
	fmt.Fprint(&r.micro, "`\n\n```\n")
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Stdout, cmd.Stderr = io.MultiWriter(&r.micro, os.Stderr), os.Stderr
	err := cmd.Run()
	fmt.Fprint(&r.micro, "```\n")
	return err
}
