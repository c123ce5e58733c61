package interceptors

// Holder is an InferencePolicy that may keep responses back until it knows enough
// to decide about them. What is held is delivered in order, before what comes after
// it, and never because time has passed.
type Holder interface {
	// Held is how many of the responses that Response saw last, the one at hand
	// among them, must not be delivered yet. It is asked after every Response that
	// did not refuse. The policy may read and edit what it holds until it says that
	// it holds less, or Finish or End was called.
	Held() int
	// Finish says that no more responses follow: at the last one, at the end of
	// the stream, or because another policy refuses the next one. Then all that is
	// held is delivered, or dropped if Finish refuses it. It is called once at
	// most, and not if the inference is cut from outside or the caller is gone:
	// then what is held is dropped.
	Finish() error
}

// HeldBytes is the size of the responses of the call that are held, in bytes as they
// came. Safe for concurrent use.
func (c *Call) HeldBytes() int { return int(c.held.Load()) }

// keepLocked is how many of the last responses must be held.
func (i *Inference) keepLocked() (keep int, err error) {
	n := 0
	defer func() {
		if v := recover(); v != nil {
			err = Recovered(i.parts[n].name, v)
		}
	}()
	for ; n < len(i.parts); n++ {
		if h, ok := i.parts[n].policy.(Holder); ok {
			keep = max(keep, h.Held())
		}
	}
	return keep, nil
}

// holdLocked takes a response over.
func (i *Inference) holdLocked(e *Envelope) {
	e.size = e.Size()
	i.Call.held.Add(int64(e.size))
	i.held = append(i.held, e)
}

// releaseLocked has all but the last responses that are held delivered.
func (i *Inference) releaseLocked(keep int) {
	n := len(i.held) - keep
	if n <= 0 {
		return
	}
	for _, e := range i.held[:n] {
		i.Call.held.Add(-int64(e.size))
	}
	i.due = append(i.due, i.held[:n]...)
	rest := copy(i.held, i.held[n:])
	clear(i.held[rest:])
	i.held = i.held[:rest]
}

// dropLocked gives up what is held.
func (i *Inference) dropLocked() {
	for _, e := range i.held {
		i.Call.held.Add(-int64(e.size))
		e.Release()
	}
	i.held = nil
}

// finishLocked has the policies decide about what they hold, which is due then, or
// dropped.
func (i *Inference) finishLocked() (err error) {
	if !i.holds {
		return nil
	}
	i.holds = false
	n := len(i.parts) - 1
	defer func() {
		if v := recover(); v != nil {
			err = Recovered(i.parts[n].name, v)
		}
		if err == nil {
			i.releaseLocked(0)
			return
		}
		err = asDenial(i.parts[n].name, err)
		i.dropLocked()
	}()
	for ; n >= 0; n-- {
		if h, ok := i.parts[n].policy.(Holder); ok {
			if err := h.Finish(); err != nil {
				return err
			}
		}
	}
	return nil
}

// holdOrDeliver decides which responses are held: the one at hand, for which the
// verdict stands else, and those before it. The last one of all is never held. The
// error is a *Denial, of the inference.
func (i *Inference) holdOrDeliver(e *Envelope, v Verdict, final bool) (Verdict, error) {
	if final {
		err := i.finishLocked()
		if err != nil {
			i.cut = err
			i.endLocked(err)
		}
		return v, err
	}
	keep, err := i.keepLocked()
	if err != nil {
		i.cut = err
		i.dropLocked()
		if !i.Call.Method.Multiplexed {
			i.endLocked(err)
		}
		return v, err
	}
	if v != Deliver || keep == 0 {
		i.releaseLocked(max(0, keep-1)) // the one at hand is not among those held
		return v, nil
	}
	i.holdLocked(e)
	i.releaseLocked(keep)
	return Hold, nil
}

// refusedLocked decides about what is held when part n has refused what comes
// after: its own doubts were founded, those of others are settled.
func (i *Inference) refusedLocked(n int) {
	if _, ok := i.parts[n].policy.(Holder); ok {
		i.dropLocked()
		i.holds = false
	} else {
		_ = i.finishLocked()
	}
}

// finish ends the responses of an inference that the model server did not end. The
// error is a *Denial.
func (i *Inference) finish() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.ended || i.cut != nil {
		return nil
	}
	err := i.finishLocked()
	if err != nil {
		i.cut = err
	}
	return err
}

// Finish has what is held of the responses delivered, or refused: the model server
// answers no more. The error is what the call ends with. A door calls it when the
// model server's side has ended, whichever way; never beside Response.
func (s *Stream) Finish() (err error) {
	if !s.call.holds.Load() || s.call.ctx.Err() != nil {
		return nil
	}
	defer recovered(&err)
	_, open := s.call.Open()
	for _, i := range open {
		denied := i.finish()
		if err := s.release(i); err != nil {
			return err
		}
		if denied != nil {
			if err := s.refuse(i, denied); err != nil {
				return err
			}
		}
	}
	return nil
}

// release delivers what was held and is due. What cannot be delivered is given up.
func (s *Stream) release(i *Inference) (err error) {
	if len(i.due) == 0 {
		return nil
	}
	defer recovered(&err)
	defer func() {
		for _, e := range i.due {
			if e != nil {
				e.Release()
			}
		}
		clear(i.due)
		i.due = i.due[:0]
	}()
	for n, e := range i.due {
		i.due[n] = nil
		if err := s.deliver(e, i); err != nil {
			return err
		}
		if e.kept && e.raw == nil {
			s.spare = append(s.spare, e)
		}
	}
	return nil
}
