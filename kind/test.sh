#!/usr/bin/env bash
# Tests the gateway in a kind cluster of its own, which it makes and deletes.
#
#   KEEP=1  leaves the cluster, and the next run uses it
#
# lib.sh lists the other variables; the cluster's name is sluice-test here and
# its port any that is free. Exit status: 0 passed, 1 failed, 77 cannot run here.
set -euo pipefail
export SLUICE_KIND_NAME=${SLUICE_KIND_NAME:-sluice-test} SLUICE_KIND_PORT=${SLUICE_KIND_PORT:-0}
# shellcheck source=lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
needs

finish() {
  local rc=$?
  trap - EXIT
  if [ $rc = 1 ] && exists; then
    diagnose
    kind export logs --quiet --name "$NAME" "$STATE/logs" && echo "kind: the logs of all are in $STATE/logs" >&2
  fi
  if [ "${KEEP:-0}" = 1 ]; then
    say "cluster $NAME is kept: KUBECONFIG=$KUBECONFIG"
  else
    remove || rc=1
  fi
  exit $rc
}
trap finish EXIT
trap 'exit 130' INT TERM

failed=()
# expect compares what should be with what is.
expect() { # expect WHAT WANT GOT
  if [ "$2" = "$3" ]; then
    echo "  ok    $1"
  else
    printf '  FAIL  %s\n--- expected\n%s\n--- got\n%s\n' "$1" "$2" "$3"
    failed+=("$1")
  fi
}

bash "$KIND_DIR/up.sh"

calls="\
allowed           echo   OK, 1 messages
streamed          words  OK, 9 messages
refused identity  echo   PermissionDenied METHOD_DENIED, 0 messages
refused prompt    echo   PermissionDenied PROMPT_REJECTED, 0 messages"

say "calls from this machine, through $(address)"
got=$("$STATE/bin/client" --gateway "$(address)" --caller "$STATE/acme-alice" --stranger "$STATE/mallory" 2>&1) || true
expect "an allowed call, a streamed one, two refused ones" "$calls" "$got"

say "calls from a pod, through the Service"
kubectl -n sluice delete job client --ignore-not-found >/dev/null
kubectl -n sluice create job client --from=cronjob/client >/dev/null
ended=
for _ in $(seq 60); do
  ended=$(kubectl -n sluice get job client -o 'jsonpath={.status.succeeded}/{.status.failed}')
  if [ "$ended" != / ]; then break; fi
  sleep 1
done
expect "the same calls" "$calls" "$(kubectl -n sluice logs job/client 2>&1)"
expect "the Job succeeded" 1/ "$ended"

say "what the pods are"
for workload in deployment/gateway job/client; do
  image=$(kubectl -n sluice get "$workload" -o 'jsonpath={.spec.template.spec.containers[0].image}')
  expect "the image of $workload: one layer, not root" "1 65532:65532" \
    "$(docker image inspect --format '{{len .RootFS.Layers}} {{.Config.User}}' "$image")"
done

# What the kernel says of the processes, whatever the manifests say.
facts=$(docker exec "$NODE" bash -c '
  for pid in $(pgrep -x sluice); do
    awk "/^(Uid|CapEff|CapBnd|NoNewPrivs|Seccomp):/ { \$1 = \$1; print }" "/proc/$pid/status"
    awk "\$5 == \"/\" { print \"Root: \" substr(\$6, 1, 2) } /serviceaccount/ { print \"Token: \" \$5 }" "/proc/$pid/mountinfo"
  done' | sort -u)
expect "every process: not root, no capability, no new privileges, seccomp, read-only root, no token" "\
CapBnd: 0000000000000000
CapEff: 0000000000000000
NoNewPrivs: 1
Root: ro
Seccomp: 2
Uid: 65532 65532 65532 65532" "$facts"

got=$(kubectl -n sluice run bare --image=localhost/sluice/gateway --dry-run=server 2>&1) || true
expect "a pod that is not hardened is not admitted" yes \
  "$([[ $got == *'violates PodSecurity "restricted'* ]] && echo yes || echo "$got")"
expect "nothing was restarted" "0 0 0" \
  "$(kubectl -n sluice get pods -l 'app.kubernetes.io/name in (gateway, model)' -o 'jsonpath={.items[*].status.containerStatuses[*].restartCount}')"
logs=$(kubectl -n sluice logs --prefix --tail=-1 -l app.kubernetes.io/part-of=sluice)
expect "the refusals are in the log" $'METHOD_DENIED\nPROMPT_REJECTED' \
  "$(grep -oE '"reason":"(METHOD_DENIED|PROMPT_REJECTED)"' <<<"$logs" | cut -d'"' -f4 | sort -u)"
expect "no word of a prompt is" "" "$(grep -iE 'gate opens|previous instructions' <<<"$logs" || true)"

say "calls while the gateways are replaced"
kubectl -n sluice rollout restart deployment/gateway >/dev/null
kubectl -n sluice rollout status deployment/gateway --timeout=120s >/dev/null &
rollout=$!
lost=
while kill -0 $rollout 2>/dev/null; do
  lost+=$("$STATE/bin/client" --gateway "$(address)" --caller "$STATE/acme-alice" --stranger "$STATE/mallory" 2>&1 >/dev/null || true)
done
rc=0
wait $rollout || rc=$?
expect "all are replaced" 0 $rc
expect "no call is lost" "" "$lost"

if [ ${#failed[@]} -gt 0 ]; then
  printf 'kind: FAILED: %s\n' "${failed[@]}" >&2
  exit 1
fi
say "passed"
