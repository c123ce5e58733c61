#!/usr/bin/env bash
# Prints the path of redis-server (or valkey-server), which it installs from Debian if it must.
#
# Exit status: 0 done; 77 there is none and it cannot be installed here.
set -euo pipefail

find_server() { command -v redis-server || command -v valkey-server; }

if ! find_server; then
  if [[ $EUID == 0 ]] && command -v apt-get >/dev/null && { apt-get update &&
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends redis-server; } >&2 && find_server; then
    exit 0
  fi
  echo "SKIPPED: no redis-server on PATH, and it cannot be installed here" >&2
  exit 77
fi
