//go:build !unix

package budget

import "errors"

// lockFile cannot lock here.
func lockFile(string) (func(), error) {
	return nil, errors.New("state files need a Unix system")
}
