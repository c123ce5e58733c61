package model

import (
	"context"
	"encoding/binary"
	"strings"
	"time"

	"github.com/sluicegate/sluice/proto/gen/inference"
)

// words says the prompt again, a word a message. Each but the first begins with
// its space, so that the messages put together are the text.
func (s *Server) words(e *entry) func(context.Context, *request, func(*inference.ModelInferResponse) error) error {
	return func(ctx context.Context, r *request, emit func(*inference.ModelInferResponse) error) error {
		prompt, err := r.texts("text_input")
		if err != nil {
			return err
		}
		if len(prompt) != 1 {
			return invalid("text_input must have one element")
		}
		limit, err := r.limit()
		if err != nil {
			return err
		}
		text, ok := s.options.Answers[string(prompt[0])]
		if !ok {
			text = string(prompt[0])
		}
		delay := r.delay(s.options.Delay)
		asked := uint32(len(strings.Fields(string(prompt[0]))))
		for n, word := range strings.Fields(text) {
			if n == limit {
				break
			}
			if err := wait(ctx, delay); err != nil {
				return err
			}
			if n > 0 {
				word = " " + word
			}
			answer := respond(r.ModelInferRequest)
			addTexts(answer, "text_output", []byte(word))
			if r.flag("return_num_input_tokens") {
				add(answer, "num_input_tokens", "UINT32", 1, binary.LittleEndian.AppendUint32(nil, asked))
			}
			if r.flag("return_num_output_tokens") {
				add(answer, "num_output_tokens", "UINT32", 1, binary.LittleEndian.AppendUint32(nil, 1))
			}
			if err := emit(answer); err != nil {
				return err
			}
			e.said()
		}
		return nil
	}
}

// echo says what it was told.
func (s *Server) echo(ctx context.Context, r *request, emit func(*inference.ModelInferResponse) error) error {
	texts, err := r.texts("text_input")
	if err != nil {
		return err
	}
	if texts == nil {
		return invalid("text_input is missing")
	}
	if err := wait(ctx, r.delay(s.options.Delay)); err != nil {
		return err
	}
	answer := respond(r.ModelInferRequest)
	addTexts(answer, "text_output", texts...)
	return emit(answer)
}

// sum adds numbers up.
func (s *Server) sum(ctx context.Context, r *request, emit func(*inference.ModelInferResponse) error) error {
	values, err := r.ints("values")
	if err != nil {
		return err
	}
	if values == nil {
		return invalid("values is missing")
	}
	if err := wait(ctx, r.delay(s.options.Delay)); err != nil {
		return err
	}
	var sum int64
	for _, v := range values {
		sum += int64(v)
	}
	answer := respond(r.ModelInferRequest)
	add(answer, "sum", "INT64", 1, binary.LittleEndian.AppendUint64(nil, uint64(sum)))
	return emit(answer)
}

// wait waits, but not for a caller that has gone.
func wait(ctx context.Context, d time.Duration) error {
	if d == 0 {
		if ctx.Err() != nil {
			return ended(ctx)
		}
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ended(ctx)
	}
}
