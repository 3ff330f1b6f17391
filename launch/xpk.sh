#!/usr/bin/env bash
# Runs COMMAND on a TPU slice on GKE with XPK:
# CLUSTER=... PROJECT=... ZONE=... IMAGE=... STORAGE=... launch/xpk.sh COMMAND...
set -euo pipefail
# XPK restarts a workload that ends by a signal, and with --restart-on-exit-codes=75 also one that ends with 75; it does
# not restart after other failures. `exec` in --command: XPK sends SIGTERM only to the shell that it starts, so the
# command must replace that shell.
exec xpk workload create --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" --workload="${NAME:-geotoken}" \
  --tpu-type="${TYPE:-v5litepod-256}" --docker-image="$IMAGE" --storage="$STORAGE" \
  --max-restarts=100 --restart-on-exit-codes=75 --termination-grace-period-seconds=120 \
  --command="exec launch/run.sh $*"
