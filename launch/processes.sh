#!/usr/bin/env bash
# Runs one training in N processes on this host: [RESTARTS=n] launch/processes.sh N COMMAND...
# Exits with the status of the first process that fails. If this status is 75 (training is saved), the script starts all
# processes again, up to RESTARTS times. On SIGTERM or Ctrl-C the script sends SIGTERM to the processes and does not
# start them again.
set -uo pipefail
processes=$1 restarts=${RESTARTS:-0} terminated=''
shift
export JAX_COORDINATOR_ADDRESS=${JAX_COORDINATOR_ADDRESS-127.0.0.1:$((20000 + $$ % 10000))}
export JAX_NUM_PROCESSES=$processes
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((processes - 1)))}"
trap 'terminated=yes; kill -TERM "${!running[@]}" 2>/dev/null' TERM INT

while true; do
  declare -A running=()
  for ((i = 0; i < processes; i++)); do # one GPU per process, if there are GPUs
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
      ((code == 134 || code == 137)) && code=75 # aborted or killed: the other processes will end with 75
      unset "running[$pid]"
      ((code && !status)) && status=$code limit=$((SECONDS + ${GRACE:-120}))
    done
    # The remaining processes may be saving, or waiting for the failed process. They get GRACE seconds to end.
    ((status && SECONDS > limit && ${#running[@]})) && kill -KILL "${!running[@]}" 2>/dev/null
  done
  ((status == 75 && restarts > 0)) && [[ -z $terminated ]] || exit "$status"
  restarts=$((restarts - 1))
  echo "launch/processes.sh: ended with 75, starts again" >&2
done
