#!/usr/bin/env bash
# A TPU slice on GKE by XPK: CLUSTER=... PROJECT=... ZONE=... IMAGE=... STORAGE=... launch/xpk.sh COMMAND...
set -euo pipefail
# XPK begins again after a signal by itself, after other failures never, and after 75 because it is told to. exec: it
# sends SIGTERM to the shell that it starts this command in, and to nothing below.
exec xpk workload create --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" --workload="${NAME:-geotoken}" \
  --tpu-type="${TYPE:-v5litepod-256}" --docker-image="$IMAGE" --storage="$STORAGE" \
  --max-restarts=100 --restart-on-exit-codes=75 --termination-grace-period-seconds=120 \
  --command="exec launch/run.sh $*"
