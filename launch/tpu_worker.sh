#!/usr/bin/env bash
# Runs COMMAND in a container on one worker of a slice. launch/tpu_vm.sh starts it, with IMAGE, NFS and COMMAND set.
set -euo pipefail
metadata() {
  curl -sf -H Metadata-Flavor:Google "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
IFS=, read -ra workers <<<"$(metadata worker-network-endpoints)" # name:port:address per worker
IFS=: read -r _ _ first <<<"${workers[0]}"
sudo mkdir -p /mnt/work
command -v mount.nfs >/dev/null || sudo apt-get install -qy nfs-common
mountpoint -q /mnt/work || sudo mount -t nfs "$NFS" /mnt/work
sudo docker stop geotoken 2>/dev/null || true # a container left by a broken connection saves, then ends
sudo docker rm -f geotoken 2>/dev/null || true
# --user=root: only root can open a TPU's device files. --stop-timeout=120: a container has 120 s after SIGTERM to finish
# the step and save; Docker's default is 10 s. COMMAND is unquoted, so that the shell splits it into words.
# shellcheck disable=SC2086
sudo docker run --rm --name=geotoken --user=root --privileged --net=host --volume=/mnt/work:/workdir \
  --stop-timeout=120 \
  --env=JAX_COORDINATOR_ADDRESS="$first:8476" --env=JAX_NUM_PROCESSES="${#workers[@]}" \
  --env=JAX_PROCESS_ID="$(metadata agent-worker-number)" --env=JAX_COMPILATION_CACHE_DIR=/workdir/compiled \
  "$IMAGE" $COMMAND || { code=$? && echo "launch/tpu_worker.sh: ended with $code" && exit "$code"; }
