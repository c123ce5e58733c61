package budget

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"unique"

	"github.com/sluicegate/sluice/interceptors"
	"github.com/sluicegate/sluice/interceptors/internal/expression"
	configv1 "github.com/sluicegate/sluice/proto/gen/sluice/config/v1"
)

// levels is how many names an account has.
func (m *limit) levels() int {
	n := len(m.config.GetPer())
	if m.own != nil {
		n++
	}
	return n
}

// key names an account: a limit and those names that the limit tells apart.
type key struct {
	limit                                      *limit
	trustDomain, tenant, principal, model, own string
}

// key is the account that an inference belongs to. It is called from Start. The error
// is a denial: whom the inference belongs to cannot be told.
func (m *limit) key(i *interceptors.Inference) (k key, err error) {
	k.limit = m
	if m.by[configv1.BudgetKey_BUDGET_KEY_TRUST_DOMAIN] {
		k.trustDomain = i.Call.ID.TrustDomain().Name()
	}
	if m.by[configv1.BudgetKey_BUDGET_KEY_TENANT] {
		k.tenant = short(i.Call.Tenant)
	}
	if m.by[configv1.BudgetKey_BUDGET_KEY_PRINCIPAL] {
		k.principal = short(i.Call.Principal)
	}
	if m.by[configv1.BudgetKey_BUDGET_KEY_MODEL] {
		k.model = short(i.Model)
	}
	if m.own != nil {
		k.own, err = m.text(i)
	}
	return k, err
}

// text is what the limit's own key gives for an inference.
func (m *limit) text(i *interceptors.Inference) (string, error) {
	c := i.Call
	text, err := m.own.Text(nil, &expression.Scope{Call: c, Via: c.Via, Peer: c.Peer.ID, Inference: i, Message: i.First()})
	if err == nil {
		return short(text), nil
	}
	i.Emit(interceptors.Event{Policy: name, Name: "undecided", Attributes: []string{"budget", m.name}})
	d := interceptors.Deny(name, interceptors.PolicyUnavailable,
		"the account of budget %q cannot be told: the request or its caller lacks what the budget goes by", m.name).With("budget", m.name)
	d.RetryAfter, d.Cause = interceptors.NoRetry, err
	return "", d
}

// clone is the key with names of its own: those of an inference may be parts of
// a large message, which must not stay for them. Names that many accounts have are
// kept once.
func (k key) clone() key {
	k.trustDomain, k.tenant, k.model = once(k.trustDomain), once(k.tenant), once(k.model)
	k.principal, k.own = strings.Clone(k.principal), strings.Clone(k.own)
	return k
}

// once is a name of which there is one copy, as a rule.
func once(name string) string {
	if name == "" {
		return ""
	}
	return unique.Make(name).Value()
}

// short is a name, or what stands for one that is too long to keep.
func short(name string) string {
	if len(name) <= maxName {
		return name
	}
	sum := sha256.Sum256([]byte(name))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// subject says whose account it is, for people.
func (m *limit) subject(k key) string {
	var parts []string
	for level, part := range [...]string{
		configv1.BudgetKey_BUDGET_KEY_TRUST_DOMAIN: "trust_domain:" + k.trustDomain,
		configv1.BudgetKey_BUDGET_KEY_TENANT:       "tenant:" + k.tenant,
		configv1.BudgetKey_BUDGET_KEY_PRINCIPAL:    "principal:" + k.principal,
		configv1.BudgetKey_BUDGET_KEY_MODEL:        "model:" + k.model,
	} {
		if m.by[level] {
			parts = append(parts, part)
		}
	}
	if m.own != nil {
		parts = append(parts, "key:"+k.own)
	}
	if parts == nil {
		return "everyone"
	}
	return strings.Join(parts, ",")
}
