#!/usr/bin/env bash
# Deletes the cluster and all that up.sh made for it. Does nothing if there is none.
set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
needs
remove
rm -rf "$STATE"
say "cluster $NAME is gone"
