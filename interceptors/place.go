package interceptors

// Place notes the address of the model server that the inference was handed to, and
// what is to be called when it ends, before its parts are ended; nil for nothing. It
// reports whether it does so: not if it has before, or if the inference has ended.
// Doors call it.
func (i *Inference) Place(server string, ended func()) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.ended || i.placed {
		return false
	}
	i.Server, i.placed, i.leave = server, true, ended
	return true
}
