package admit

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/internal/expression"
	"github.com/sluicegate/sluice/interceptors/internal/principals"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// priority names inferences and the level that they queue in.
type priority struct {
	level      int
	principals *principals.Set // nil: everyone
	methods    []string
	models     []string
	when       *expression.Condition // nil: none
	lowers     bool                  // below 0: what cannot be decided has it
}

// addPriorities makes the levels of the queue: one for each priority that is named, and 0.
func (l *pool) addPriorities(list []*configv1.PoolPriority) error {
	values := []int32{0}
	for _, c := range list {
		values = append(values, c.GetPriority())
	}
	slices.SortFunc(values, func(a, b int32) int { return cmp.Compare(b, a) })
	values = slices.Compact(values)
	for _, v := range values {
		l.levels = append(l.levels, newLevel(v))
	}
	l.normal = slices.Index(values, 0)
	for n, c := range list {
		p := priority{level: slices.Index(values, c.GetPriority()), lowers: c.GetPriority() < 0, methods: c.GetMethods(), models: c.GetModels()}
		if len(c.GetPrincipals()) > 0 {
			set, err := principals.Parse(c.GetPrincipals(), true)
			if err != nil {
				return fmt.Errorf("priorities[%d].%w", n, err)
			}
			p.principals = &set
		}
		if text := c.GetWhen(); text != "" {
			var err error
			if p.when, err = expression.NewCondition(text); err != nil {
				return fmt.Errorf("priorities[%d].when: %w", n, err)
			}
		}
		for k, m := range c.GetMethods() {
			if !strings.HasPrefix(m, "/") || strings.Count(m, "/") != 2 {
				return fmt.Errorf("priorities[%d].methods[%d]: %q is no full method; write it as /package.Service/Method", n, k, m)
			}
		}
		l.priorities = append(l.priorities, p)
	}
	return nil
}

// levelOf is the level that an inference queues in. It is called from Start.
func (l *pool) levelOf(i *interceptors.Inference) int {
	for n := range l.priorities {
		p := &l.priorities[n]
		if (len(p.methods) == 0 || slices.Contains(p.methods, i.Call.FullMethod)) &&
			(len(p.models) == 0 || slices.Contains(p.models, i.Model)) &&
			(p.principals == nil || p.principals.Match(i.Call.ID)) && p.holds(i) {
			return p.level
		}
	}
	return l.normal
}

// holds asks the condition. One that cannot be decided is told, and raises nothing.
func (p *priority) holds(i *interceptors.Inference) bool {
	if p.when == nil {
		return true
	}
	c := i.Call
	holds, err := p.when.Holds(nil, &expression.Scope{Call: c, Via: c.Via, Peer: c.Peer.ID, Inference: i, Message: i.First()})
	if err != nil {
		i.Emit(interceptors.Event{Policy: name, Name: "undecided"})
		return p.lowers
	}
	return holds
}
