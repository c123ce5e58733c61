package classify

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
)

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
	table *[Buckets]byte // int8
	scale float32        // what one step of them is worth
	bias  float32
	dense [denseCount]float32
	knots []Knot
	words *Words
}

// Knot ties a sum of weights to the share of benign texts that reach it.
type Knot struct{ Logit, Rate float32 }

// The file is "SLCW", the version, the generator's version, CRC-32 of what
// follows, then the scale, bias, dense weights, the number of knots, the knots, the
// classes of words and the table, all little-endian.
const (
	wordsBytes = 5 * wordSlots
	magic      = "SLCW"
	version    = 3
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
	m.scale, m.bias = float(), float()
	for i := range m.dense {
		m.dense[i] = float()
	}
	knots := 0
	if len(rest) >= 4 {
		knots = int(order.Uint32(rest))
		rest = rest[4:]
	}
	if knots < 2 || knots > 1024 || len(rest) != 8*knots+wordsBytes+Buckets {
		return nil, errors.New("the file is cut short or too long")
	}
	for range knots {
		m.knots = append(m.knots, Knot{float(), float()})
	}
	m.words = new(Words)
	for i := range m.words.tags {
		m.words.tags[i] = order.Uint32(rest[4*i:])
	}
	copy(m.words.classes[:], rest[4*wordSlots:])
	m.table = (*[Buckets]byte)(rest[wordsBytes:])
	return m, nil
}

// Weights are a model as it is trained.
type Weights struct {
	// Buckets are those of the n-grams.
	Buckets []float32
	Bias    float32
	Dense   []float32
	// Knots are in order of rising logits and falling rates.
	Knots []Knot
	Words *Words
}

// NewWeights are zeros.
func NewWeights(words *Words) *Weights {
	return &Weights{Words: words, Buckets: make([]float32, Buckets), Dense: make([]float32, denseCount)}
}

// Encode makes a file of them. Weights become bytes, in steps such that one in
// ten thousand is cut off.
func (w *Weights) Encode(generator uint32) []byte {
	out := make([]byte, headerSize)
	float := func(f float32) { out = order.AppendUint32(out, math.Float32bits(f)) }
	scale := step(w.Buckets)
	float(scale)
	float(w.Bias)
	for _, d := range w.Dense {
		float(d)
	}
	out = order.AppendUint32(out, uint32(len(w.Knots)))
	for _, k := range w.Knots {
		float(k.Logit)
		float(k.Rate)
	}
	for _, t := range w.Words.tags {
		out = order.AppendUint32(out, t)
	}
	out = append(out, w.Words.classes[:]...)
	for _, b := range w.Buckets {
		out = append(out, quantise(b/scale))
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
