#!/usr/bin/env bash
# Builds the proxy of toxiproxy/go.mod, and prints its path. Nothing is done where it is there already.
#
#   SLUICE_CACHE    where it is kept, in the folder toxiproxy; default ~/.cache/sluice (20 MB)
#
# Exit status: 0 done; 77 its modules are out of reach; 1 anything else that failed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/toxiproxy"
export GOWORK=off CGO_ENABLED=0
version=$(sed -n 's|.*github.com/Shopify/toxiproxy/v2 \(v[^ ]*\).*|\1|p' go.mod)
program=${SLUICE_CACHE:-$HOME/.cache/sluice}/toxiproxy/toxiproxy-$version

if [[ ! -x $program ]]; then
  if ! go list -deps tool >/dev/null 2>&1; then
    echo "SKIPPED: toxiproxy's modules are out of reach" >&2
    exit 77
  fi
  mkdir -p "${program%/*}"
  half=$(mktemp "$program-XXXXXX") # half of a program never counts
  trap 'rm -f "$half"' EXIT
  go build -trimpath -o "$half" tool >&2
  mv "$half" "$program"
fi
echo "$program"
