#!/usr/bin/env bash
# Installs the model servers that the tests here run, one Python environment each, and prints the
# environments' folders: "NAME FOLDER", a line each. Nothing is done where they are there already.
#
# Usage: setup.sh [NAME...]     names: triton mlserver kserve tgis vllm; default all
#
#   SLUICE_CACHE    where they are kept; default ~/.cache/sluice (about 900 MB)
#   SLUICE_PYTHON   the Python 3.11 to use; default the one on PATH, else Debian's, which is
#                   installed if we are root
#
# Exit status: 0 done; 77 the package index is out of reach (or this is not Linux on x86-64), so there
# is nothing to test with; 1 anything else that failed.
set -euo pipefail

out_of_reach=77
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${SLUICE_CACHE:-$HOME/.cache/sluice}

say() { echo "peers: $*" >&2; }

# usable PYTHON: is it 3.11, able to make environments, and with a shared libpython? Triton's Python
# models run in a program that loads that library.
usable() {
  "$1" - 2>/dev/null <<'PYTHON'
import ensurepip, os, sys, sysconfig, venv
library = os.path.join(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME"))
sys.exit(not (sys.version_info[:2] == (3, 11) and ".so" in library and os.path.exists(library)))
PYTHON
}

# find_python prints a usable Python, which it installs if it must.
find_python() {
  local python
  if [[ -n ${SLUICE_PYTHON:-} ]]; then
    if usable "$SLUICE_PYTHON"; then
      echo "$SLUICE_PYTHON"
      return
    fi
    say "SLUICE_PYTHON ($SLUICE_PYTHON) is not a Python 3.11 with venv and a shared libpython"
    return 1
  fi
  for python in python3.11 /usr/bin/python3.11; do
    if usable "$python"; then
      echo "$python"
      return
    fi
  done
  if [[ $EUID == 0 ]] && command -v apt-get >/dev/null; then
    say "installing Debian's Python 3.11"
    if { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      python3.11 python3.11-venv libpython3.11 ca-certificates; } >&2 && usable /usr/bin/python3.11; then
      echo /usr/bin/python3.11
      return
    fi
  fi
  say "no Python 3.11 with venv and a shared libpython. On Debian 12: apt-get install python3.11-venv" \
    "libpython3.11; elsewhere set SLUICE_PYTHON"
  return 1
}

# make_environment NAME FOLDER: half an environment never counts, because its last step is .complete.
make_environment() {
  local name=$1 folder=$2 log=$2.log options=()
  case $name in tgis | vllm) options=(--no-deps) ;; esac
  rm -rf "$folder"
  say "installing $name into $folder"
  if ! { nice "$python" -m venv "$folder" &&
    nice "$folder/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
      "${options[@]}" -r "$here/requirements/$name.txt"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    say "could not install $name; the whole account is $log"
    return 1
  fi
  touch "$folder/.complete"
}

if [[ $(uname -sm) != "Linux x86_64" ]]; then
  say "SKIPPED: there are model servers only for Linux on x86-64, this is $(uname -sm)"
  exit $out_of_reach
fi

names=("$@")
[[ $# != 0 ]] || names=(triton mlserver kserve tgis vllm)
declare -A folders
for name in "${names[@]}"; do
  hash=$(sha256sum "$here/requirements/$name.txt")
  folders[$name]=$cache/venv/$name-${hash:0:12}
done

# missing prints the names whose environment is not there, or has lost its Python.
missing() {
  local name
  for name in "${names[@]}"; do
    [[ -e ${folders[$name]}/.complete && -x ${folders[$name]}/bin/python ]] || echo "$name"
  done
}

if [[ -n $(missing) ]]; then
  mkdir -p "$cache/venv"
  exec 9>"$cache/venv/.lock"
  flock 9 # another run may be at it; then little is left to do
  python=
  for name in $(missing); do
    if [[ -z $python ]]; then
      python=$(find_python)
      probe=$(mktemp -d)
      trap 'rm -rf "$probe"' EXIT
      "$python" -m venv "$probe/venv"
      if ! "$probe/venv/bin/python" -m pip --disable-pip-version-check --no-cache-dir --retries 1 --timeout 15 \
        download --no-deps --quiet --dest "$probe" six==1.17.0 >"$probe/log" 2>&1; then
        tail -n 3 "$probe/log" >&2
        say "SKIPPED: the Python package index is out of reach, so the real model servers cannot be tested"
        exit $out_of_reach
      fi
    fi
    make_environment "$name" "${folders[$name]}"
  done
fi

for name in "${names[@]}"; do
  echo "$name ${folders[$name]}"
done
