package budget

import (
	"math"
	"time"
)

// soonest is how soon it is looked again whether GPU time was used up. Chosen.
const soonest = time.Millisecond

// watch has an inference topped up, or cut, when the GPU time that it was granted is
// used up and no message has come to say so.
func (v *reservation) watch() {
	v.timer = time.AfterFunc(math.MaxInt64, func() { v.inference.Check(v.look) })
	v.timer.Reset(v.left())
}

// look is Response without one.
func (v *reservation) look() error {
	if err := v.cover(nil); err != nil {
		return err
	}
	v.timer.Reset(v.left())
	return nil
}

// left is how long what was granted of GPU time lasts; of an inference that was not
// handed on yet, as if it were now.
func (v *reservation) left() time.Duration {
	left, u := int64(math.MaxInt64), v.used()
	for n := range v.holds {
		if h := &v.holds[n]; h.tariff.time > 0 {
			left = min(left, (h.granted()-h.tariff.cost(u))/h.tariff.time)
		}
	}
	return max(soonest, time.Duration(min(left, math.MaxInt64/int64(time.Microsecond))+1)*time.Microsecond)
}
