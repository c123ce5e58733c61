#!/usr/bin/env bash
# Builds the SPIRE server and agent that the tests here run, of the version in spire/go.mod, and prints
# their folder. Nothing is done where they are there already.
#
#   SLUICE_CACHE    where they are kept, in the folder spire; default ~/.cache/sluice (300 MB)
#
# With nothing cached it takes two cores 5 to 9 minutes. Exit status: 0 done; 77 SPIRE's modules are out
# of reach, or there is no C compiler (its database is in C), so there is nothing to test with; 1 anything
# else that failed.
set -euo pipefail

out_of_reach=77
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${SLUICE_CACHE:-$HOME/.cache/sluice}/spire
programs=(spire-server spire-agent)

say() { echo "mesh: $*" >&2; }

cd "$here/spire"
export GOWORK=off CGO_ENABLED=1
version=$(sed -n 's|.*github.com/spiffe/spire \(v[^ ]*\).*|\1|p' go.mod)

# complete: are the programs there, and of the version? They say "1.13.0-dev-unk" for v1.13.0.
complete() {
  local program
  for program in "${programs[@]}"; do
    [[ -x $folder/$program && $("$folder/$program" --version 2>&1) == "${version#v}"* ]] || return 1
  done
}

if ! complete; then
  mkdir -p "$folder"
  exec 9>"$folder/.lock"
  flock 9 # another run may be at it; then nothing is left to do
fi
if ! complete; then
  if ! command -v "$(go env CC)" >/dev/null; then
    say "SKIPPED: no C compiler ($(go env CC)), which SPIRE needs. On Debian: apt-get install gcc libc6-dev"
    exit $out_of_reach
  fi
  half=$(mktemp -d "$folder/build-XXXXXX") # half of a program never counts
  trap 'rm -rf "$half"' EXIT
  if ! go list -deps tool >/dev/null 2>"$half/log"; then
    tail -n 5 "$half/log" >&2
    say "SKIPPED: SPIRE's modules are out of reach, so a real SPIRE cannot be tested with"
    exit $out_of_reach
  fi
  say "building SPIRE $version into $folder, which takes some minutes"
  nice go build -trimpath -o "$half/" tool >&2
  for program in "${programs[@]}"; do
    mv "$half/$program" "$folder/$program"
  done
  if ! complete; then
    say "what was built is not SPIRE $version: $("$folder/spire-server" --version 2>&1)"
    exit 1
  fi
fi
echo "$folder"
