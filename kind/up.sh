#!/usr/bin/env bash
# Makes a kind cluster with two gateways and a model server in it, or brings one
# up to date that is there. See README.md; lib.sh lists the variables.
set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
needs

say "building"
mkdir -p "$STATE/bin"
chmod 700 "$STATE" # keys are in it
# no_fs_access: without it Coraza does not start where nothing can be written.
(cd "$KIND_DIR/.." && CGO_ENABLED=0 go build -trimpath -tags=no_fs_access -ldflags='-s -w' -o "$STATE/bin/" \
  ./gateway/cmd/sluice ./examples/client)
# A tag for a content: pods start anew when, and only when, the program changed.
image() { # image NAME PROGRAM
  local tag
  tag=$(cat "$KIND_DIR/$1.Dockerfile" "$STATE/bin/$2" | sha256sum | cut -c1-12)
  # The classic builder: there is nothing to pull, and BuildKit's plugin may be missing.
  DOCKER_BUILDKIT=0 docker build --quiet --label "sluice-kind=$NAME" --tag "localhost/sluice/$1:$tag" \
    --file "$KIND_DIR/$1.Dockerfile" "$STATE/bin" >/dev/null 2>"$STATE/build.log" ||
    { cat "$STATE/build.log" >&2; die "docker build of $1 failed"; }
  echo "$tag"
}
gateway_tag=$(image gateway sluice)
client_tag=$(image client client)

if exists; then
  say "cluster $NAME is there"
  kind export kubeconfig --quiet --name "$NAME" --kubeconfig "$KUBECONFIG"
else
  say "cluster $NAME${KIND_NODE_IMAGE:+ of $KIND_NODE_IMAGE}"
  sed "s/hostPort: .*/hostPort: $PORT/" "$KIND_DIR/cluster.yaml" >"$STATE/cluster.yaml"
  rc=0
  kind create cluster --name "$NAME" --config "$STATE/cluster.yaml" --kubeconfig "$KUBECONFIG" --wait 180s \
    ${KIND_NODE_IMAGE:+--image "$KIND_NODE_IMAGE"} >"$STATE/create.log" 2>&1 </dev/null || rc=$?
  if [ $rc != 0 ]; then
    cat "$STATE/create.log" >&2
    if grep -q 'failed to pull image' "$STATE/create.log"; then
      cannot "the node image is not on this machine and cannot be pulled; KIND_NODE_IMAGE names another"
    fi
    die "kind could not make the cluster"
  fi
fi

say "loading the images"
kind load docker-image --quiet --name "$NAME" "localhost/sluice/gateway:$gateway_tag" "localhost/sluice/client:$client_tag"

# Identities of a development authority whose key is never written. They live
# for a day; after half of it, all are made anew.
if [ -z "$(find "$STATE/bundle.pem" -mmin -720 2>/dev/null)" ]; then
  say "identities"
  "$STATE/bin/sluice" issue --directory "$STATE" \
    /gateway=localhost,127.0.0.1,gateway,gateway.sluice.svc /model /acme/alice /mallory >/dev/null
fi

say "applying the manifests"
cat >"$STATE/kustomization.yaml" <<END
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: sluice
resources: [../../manifests]
images:
  - { name: localhost/sluice/gateway, newTag: $gateway_tag }
  - { name: localhost/sluice/client, newTag: $client_tag }
secretGenerator:
  - name: gateway-identity
    files: [svid.pem=gateway.pem, key.pem=gateway-key.pem, bundle.pem]
  - name: model-identity
    files: [svid.pem=model.pem, key.pem=model-key.pem, bundle.pem]
  - name: client-identity
    files: [alice.pem=acme-alice.pem, alice-key.pem=acme-alice-key.pem, mallory.pem, mallory-key.pem, bundle.pem]
END
kubectl apply -f "$KIND_DIR/manifests/namespace.yaml" >/dev/null # before what is in it
kubectl apply -k "$STATE" >/dev/null

say "waiting for the pods"
for deployment in model gateway; do
  kubectl -n sluice rollout status "deployment/$deployment" --timeout=120s || {
    diagnose
    die "deployment $deployment does not come up: see above"
  }
done
# Pods of before still drain: until they are gone some connections go to them.
kubectl -n sluice get pods -o go-template='{{range .items}}{{if .metadata.deletionTimestamp}}pod/{{.metadata.name}}
{{end}}{{end}}' | xargs --no-run-if-empty kubectl -n sluice wait --for=delete --timeout=60s >/dev/null
# Ready pods are not yet reachable ones: the node's routes to them follow a moment later.
for n in {1..30}; do
  got=$("$STATE/bin/client" --gateway "$(address)" --caller "$STATE/acme-alice" --stranger "$STATE/mallory" 2>/dev/null) || true
  if [[ $got != *Unavailable* ]]; then break; fi
  if [ "$n" = 30 ]; then
    diagnose
    die "the pods are ready, but $(address) does not answer"
  fi
  sleep 1
done
say "the gateway answers on $(address)"
