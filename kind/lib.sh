# What up.sh, test.sh and down.sh share. Sourced, with the shell already set -euo pipefail.
#
#   SLUICE_KIND_NAME  the cluster's name (default sluice)
#   SLUICE_KIND_PORT  the gateway's port on 127.0.0.1 (default 30443; 0: any that is free)
#   KIND_NODE_IMAGE   the node image (default: the one that kind was released with)
KIND_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
NAME=${SLUICE_KIND_NAME:-sluice}
PORT=${SLUICE_KIND_PORT:-30443}
NODE=$NAME-control-plane
# All that is made at run time. The user's own kubeconfig is not touched.
STATE=$KIND_DIR/.state/$NAME
export KUBECONFIG=$STATE/kubeconfig

say() { printf '[%3ds] %s\n' "$SECONDS" "$*"; }
die() { echo "kind: $*" >&2; exit 1; }
cannot() { echo "kind: cannot run here: $*" >&2; exit 77; }

# needs ends with 77 where something is missing that only the user can bring.
needs() {
  command -v docker >/dev/null || cannot "docker is not installed"
  docker info >/dev/null 2>&1 || cannot "docker does not answer: is its daemon running, and may $(id -un) use it?"
  command -v kind >/dev/null || cannot "kind is not on PATH: go install sigs.k8s.io/kind@v0.33.0"
  command -v kubectl >/dev/null || cannot "kubectl is not on PATH: see https://kubernetes.io/docs/tasks/tools"
}

exists() { kind get clusters 2>/dev/null | grep -qxF "$NAME"; }

# remove deletes the cluster, the images that were built for it, and its state, but for logs.
remove() {
  local images
  kind delete cluster --quiet --name "$NAME"
  images=$(docker image ls --quiet --filter "label=sluice-kind=$NAME" | sort -u)
  if [ -n "$images" ]; then
    # shellcheck disable=SC2086 # one word an image
    docker image rm --force $images >/dev/null
  fi
  if [ -d "$STATE" ]; then
    find "$STATE" -mindepth 1 -maxdepth 1 ! -name logs -exec rm -rf {} +
    rmdir --ignore-fail-on-non-empty "$STATE" "$KIND_DIR/.state"
  fi
}

# diagnose shows what Kubernetes knows of pods that do not do what they should.
diagnose() {
  {
    kubectl -n sluice get pods -o wide
    kubectl -n sluice get events --field-selector type=Warning --sort-by=.lastTimestamp | tail -20
    kubectl -n sluice logs --all-containers --prefix --tail=20 -l app.kubernetes.io/part-of=sluice
  } >&2 || true
}

# address is where the gateway answers on this machine.
address() { docker port "$NODE" 30443/tcp; }
