package identity

import (
	"errors"

	"github.com/sluicegate/sluice/interceptors/internal/expression"
)

// environment is what conditions can ask, beside what the grant knows.
type environment = expression.Scope

// parameters are those of a request by name.
type parameters = expression.Parameters

// holds evaluates a condition: matches, conditionFalse, unknown as long as it asks
// for what is not known yet, or undecided, with the reason.
func (g *grant) holds(c *expression.Condition, e *environment) (answer, error) {
	switch holds, err := c.Holds(g.caller, e); {
	case errors.Is(err, expression.ErrUnknown):
		return unknown, err
	case err != nil:
		return undecided, err
	case holds:
		return matches, nil
	}
	return conditionFalse, nil
}
