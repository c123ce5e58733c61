package classify

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
)

// Every bucket has two weights, side by side: one for windows, one for the text
// as a whole.
const tableBytes = 2 * Buckets

// Dense features, beside the n-grams.
const (
	denseHit    = 0 // a class of rules fired; classBits of them
	denseAny    = denseHit + classBits
	denseMany   = denseAny + 1 // two classes or more
	denseData   = denseMany + 1
	denseSigns  = denseData + 1  // bucket of the share of signs
	denseBeyond = denseSigns + 6 // bucket of the share of bytes beyond ASCII
	denseCount  = denseBeyond + 4
)

// Model is a set of weights. It is immutable and safe for concurrent use.
type Model struct {
	table *[tableBytes]byte // int8, window and whole in turn
	scale [2]float32        // what one step of them is worth
	bias  float32
	dense [denseCount]float32
	knots []Knot
}

// Knot ties a sum of weights to the share of benign texts that reach it.
type Knot struct{ Logit, Rate float32 }

// The file is "SLCW", the version, the generator's version, CRC-32 of what
// follows, then scales, bias, dense weights, the number of knots, the knots and
// the table, all little-endian.
const (
	magic      = "SLCW"
	version    = 1
	headerSize = 16
)

var order = binary.LittleEndian

// Load reads a model. It keeps a view of data.
func Load(data []byte) (*Model, error) {
	if len(data) < headerSize || string(data[:4]) != magic {
		return nil, errors.New("not a file of weights")
	}
	if v := order.Uint32(data[4:]); v != version {
		return nil, fmt.Errorf("version %d of the file, not %d: train again", v, version)
	}
	if crc32.ChecksumIEEE(data[headerSize:]) != order.Uint32(data[12:]) {
		return nil, errors.New("the checksum is wrong: the file is damaged")
	}
	m := new(Model)
	rest := data[headerSize:]
	float := func() float32 {
		if len(rest) < 4 {
			return 0
		}
		f := math.Float32frombits(order.Uint32(rest))
		rest = rest[4:]
		return f
	}
	m.scale[0], m.scale[1], m.bias = float(), float(), float()
	for i := range m.dense {
		m.dense[i] = float()
	}
	knots := 0
	if len(rest) >= 4 {
		knots = int(order.Uint32(rest))
		rest = rest[4:]
	}
	if knots < 2 || knots > 1024 || len(rest) != 8*knots+tableBytes {
		return nil, errors.New("the file is cut short or too long")
	}
	for range knots {
		m.knots = append(m.knots, Knot{float(), float()})
	}
	m.table = (*[tableBytes]byte)(rest)
	return m, nil
}

// Weights are a model as it is trained.
type Weights struct {
	// Local and Global are the weights of the buckets, for windows and for the
	// whole text.
	Local, Global []float32
	Bias          float32
	Dense         []float32
	// Knots are in order of rising logits and falling rates.
	Knots []Knot
}

// NewWeights are zeros.
func NewWeights() *Weights {
	return &Weights{Local: make([]float32, Buckets), Global: make([]float32, Buckets), Dense: make([]float32, denseCount)}
}

// Encode makes a file of them. Weights become bytes, in steps such that one in
// ten thousand is cut off.
func (w *Weights) Encode(generator uint32) []byte {
	out := make([]byte, headerSize)
	float := func(f float32) { out = order.AppendUint32(out, math.Float32bits(f)) }
	scale := [2]float32{step(w.Local), step(w.Global)}
	float(scale[0])
	float(scale[1])
	float(w.Bias)
	for _, d := range w.Dense {
		float(d)
	}
	out = order.AppendUint32(out, uint32(len(w.Knots)))
	for _, k := range w.Knots {
		float(k.Logit)
		float(k.Rate)
	}
	for i := range Buckets {
		out = append(out, quantise(w.Local[i]/scale[0]), quantise(w.Global[i]/scale[1]))
	}
	copy(out, magic)
	order.PutUint32(out[4:], version)
	order.PutUint32(out[8:], generator)
	order.PutUint32(out[12:], crc32.ChecksumIEEE(out[headerSize:]))
	return out
}

func quantise(f float32) byte {
	return byte(int8(max(-127, min(127, math.Round(float64(f))))))
}
