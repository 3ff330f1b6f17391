#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on each worker of a slice, with IMAGE, NFS and COMMAND set.
set -euo pipefail
metadata() {
  curl -sf -H Metadata-Flavor:Google "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
IFS=, read -ra workers <<<"$(metadata worker-network-endpoints)" # name:port:address of each
IFS=: read -r _ _ first <<<"${workers[0]}"
sudo mkdir -p /mnt/work
command -v mount.nfs >/dev/null || sudo apt-get install -qy nfs-common
mountpoint -q /mnt/work || sudo mount -t nfs "$NFS" /mnt/work
sudo docker rm -f geotoken 2>/dev/null || true # of a connection that broke
# --user: the device files of a TPU are root's. COMMAND is words.
# shellcheck disable=SC2086
sudo docker run --rm --name=geotoken --user=root --privileged --net=host --volume=/mnt/work:/workdir \
  --env=JAX_COORDINATOR_ADDRESS="$first:8476" --env=JAX_NUM_PROCESSES="${#workers[@]}" \
  --env=JAX_PROCESS_ID="$(metadata agent-worker-number)" --env=JAX_COMPILATION_CACHE_DIR=/workdir/compiled \
  "$IMAGE" $COMMAND || { code=$? && echo "launch/tpu_worker.sh: ended with $code" && exit "$code"; }
