#!/usr/bin/env bash
# Several processes on this host that train as one: [RESTARTS=n] launch/processes.sh N COMMAND...
# Ends with the status of the first that fails; where that is 75 it begins again, RESTARTS times. Where it is asked to
# end itself (SIGTERM, Ctrl-C), it asks them, and does not begin again.
set -uo pipefail
processes=$1 restarts=${RESTARTS:-0} asked=''
shift
export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS-127.0.0.1:$((20000 + $$ % 10000))}
export JAX_NUM_PROCESSES=$processes
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((processes - 1)))}"
trap 'asked=yes; kill -TERM "${!running[@]}" 2>/dev/null' TERM INT

while true; do
  declare -A running=()
  for ((i = 0; i < processes; i++)); do # each with a GPU of its own, where there are any
    CUDA_VISIBLE_DEVICES=${gpus[i]-} JAX_LOCAL_DEVICE_IDS=0 JAX_PROCESS_ID=$i "${BASH_SOURCE[0]%/*}/run.sh" "$@" &
    running[$!]=$i
  done
  status=0
  while ((${#running[@]})); do
    sleep 0.2
    for pid in "${!running[@]}"; do
      kill -0 "$pid" 2>/dev/null && continue
      wait "$pid"
      code=$?
      ((code == 134 || code == 137)) && code=75 # aborted or killed: the others end with 75, but later
      unset "running[$pid]"
      ((code && !status)) && status=$code limit=$((SECONDS + ${GRACE:-120}))
    done
    # Those that are left may be saving, or wait for the one that failed.
    ((status && SECONDS > limit && ${#running[@]})) && kill -KILL "${!running[@]}" 2>/dev/null
  done
  ((status == 75 && restarts > 0)) && [[ -z $asked ]] || exit "$status"
  restarts=$((restarts - 1))
  echo "launch/processes.sh: ended with 75, begins again" >&2
done
