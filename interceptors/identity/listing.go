package identity

import (
	"strings"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/fields"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// start is the part that the rules take in an inference: nil but for methods
// that list models.
func (g *grant) start(e *environment) interceptors.InferencePolicy {
	if l := g.rules.listing(g.id, e.Inference, e); l != nil {
		return l
	}
	return nil
}

// listing takes the models that the caller may not use out of lists of models.
type listing struct {
	grants      []*grant
	environment environment
	inference   interceptors.Inference
	served      map[string]bool // nil: every model
}

// listing is nil if nothing is to be taken out of the answers. A model is shown,
// version by version, to who may call some method of the same back end for it.
func (r *rules) listing(id spiffeid.ID, i *interceptors.Inference, e *environment) *listing {
	if !i.Call.Method.ListsModels || i.Backend == nil {
		return nil
	}
	l := &listing{environment: *e, served: i.Backend.Models}
	for _, m := range i.Backend.Dialect.Methods {
		if !m.NamesModel {
			continue
		}
		g := r.grant(id, m)
		if l.served == nil && g.everything() {
			return nil
		}
		l.grants = append(l.grants, g)
	}
	l.inference.Call, l.inference.Backend = i.Call, i.Backend
	l.environment.Inference, l.environment.Message, l.environment.Parameters = &l.inference, nil, nil
	return l
}

// everything reports whether each version of each model is allowed, whatever
// else the call is.
func (g *grant) everything() bool {
	if len(g.denials) > 0 {
		return false
	}
	for _, r := range g.permits {
		if r.anyModel && r.versions == nil && r.when == nil {
			return true
		}
	}
	return false
}

// shows reports whether the model could be allowed, where conditions on
// parameters may or may not hold.
func (g *grant) shows(model, version string, e *environment) bool {
	for _, r := range g.denials {
		if r.covers(g.method, model, version) == matches {
			if v := r.holds(g, e); v == matches || v == undecided {
				return false
			}
		}
	}
	for _, r := range g.permits {
		if r.covers(g.method, model, version) == matches {
			if v := r.holds(g, e); v == matches || v == unknown {
				return true
			}
		}
	}
	return false
}

// shows reports whether some method may be called for the model.
func (l *listing) shows(model, version string) bool {
	if model == "" || strings.IndexByte(model, 0) >= 0 || l.served != nil && !l.served[model] {
		return false
	}
	l.inference.Model, l.inference.Version = model, version
	for _, g := range l.grants {
		if g.shows(model, version, &l.environment) {
			return true
		}
	}
	return false
}

// Request has nothing to do.
func (l *listing) Request(*fields.Message) error { return nil }

// Response takes out what is not shown.
func (l *listing) Response(m *fields.Message) error {
	m.Prune(l.shows)
	return nil
}

// End has nothing to give back.
func (l *listing) End(interceptors.Outcome) {}
