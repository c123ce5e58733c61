package admit

// Weight is the permits that the inference holds, or waits for.
func (p *permit) Weight() int64 {
	p.pool.mu.Lock()
	defer p.pool.mu.Unlock()
	return p.weight
}

// Weight is the most that the inference holds of one pool.
func (v *several) Weight() (most int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, w := range v.parts {
		most = max(most, w.Weight())
	}
	return most
}
