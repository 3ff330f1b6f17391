#!/usr/bin/env bash
# Runs COMMAND on a slice of spot TPU VMs:
# NAME=... ZONE=... TYPE=... IMAGE=... NFS=host:/share launch/tpu_vm.sh COMMAND...
# The script requests the slice and runs COMMAND on all its workers. If the slice is taken away, it does both again, up
# to RESTARTS times (100 by default). The slice still exists, and costs money, after COMMAND has ended. To delete it:
# gcloud compute tpus queued-resources delete NAME --zone=ZONE --force
set -uo pipefail
slice=(gcloud compute tpus queued-resources)
state() { "${slice[@]}" describe "$NAME" --zone="$ZONE" --format='value(state.state)' 2>/dev/null; }

for ((i = 0; i <= ${RESTARTS:-100}; i++)); do
  if [[ $(state) != ACTIVE ]]; then
    "${slice[@]}" delete "$NAME" --zone="$ZONE" --force --quiet 2>/dev/null
    "${slice[@]}" create "$NAME" --node-id="$NAME" --zone="$ZONE" --accelerator-type="$TYPE" \
      --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" --spot || exit
    until now=$(state) && [[ $now == ACTIVE ]]; do
      sleep "${POLL:-60}"
      [[ $now != @(FAILED|SUSPENDED) ]] || continue 2 # taken away before it became active
    done
  fi
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --command="IMAGE='$IMAGE' NFS='$NFS' COMMAND='$*'; $(<"${BASH_SOURCE[0]%/*}/tpu_worker.sh")" 2>&1 |
    tee /dev/stderr | grep 'tpu_worker.sh: ended with 2$' >/dev/null
  codes=("${PIPESTATUS[@]}")
  ((codes[0])) || exit 0
  ((codes[2])) || exit 2 # COMMAND was refused; gcloud does not return its status, so it is read from the output
  echo "launch/tpu_vm.sh: starts again" >&2
done
exit 1
