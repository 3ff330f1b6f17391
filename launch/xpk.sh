#!/usr/bin/env bash
# Runs COMMAND on a TPU slice on GKE with XPK:
# CLUSTER=... PROJECT=... ZONE=... IMAGE=... STORAGE=... launch/xpk.sh COMMAND...
set -euo pipefail
# XPK restarts a workload that was ended by a signal. With --restart-on-exit-codes=75 it also restarts one that ended
# with 75, but not after other failures. The command starts with `exec`, because XPK sends SIGTERM only to the shell
# that it starts: the command must replace this shell.
exec xpk workload create --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" --workload="${NAME:-geotoken}" \
  --tpu-type="${TYPE:-v5litepod-256}" --docker-image="$IMAGE" --storage="$STORAGE" \
  --max-restarts=100 --restart-on-exit-codes=75 --termination-grace-period-seconds=120 \
  --command="exec launch/run.sh $*"
