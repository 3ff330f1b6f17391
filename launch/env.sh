# shellcheck shell=bash
# Sets the environment of a training process. Every launcher sources it in each process, through run.sh. Variables that
# the caller has set stay. An unknown XLA flag aborts the process, so tests/test_launch.py starts one with all flags
# below.

# Sets the coordinator's address, the number of processes and this process's number from the launcher's variables.
if [[ -n ${SLURM_PROCID-} ]]; then # srun; the batch script has set the address
  export JAX_NUM_PROCESSES=${JAX_NUM_PROCESSES-$SLURM_NTASKS} JAX_PROCESS_ID=${JAX_PROCESS_ID-$SLURM_PROCID}
  if [[ -n ${CUDA_VISIBLE_DEVICES-} ]]; then # all GPUs of the node: give each task an equal share
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    each=$((${#gpus[@]} / ${SLURM_NTASKS_PER_NODE:-1}))
    CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]:SLURM_LOCALID*each:each}")
    JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((each - 1)))
    export CUDA_VISIBLE_DEVICES JAX_LOCAL_DEVICE_IDS
  fi
elif [[ -n ${TPU_WORKER_HOSTNAMES-} && -z ${JAX_COORDINATOR_ADDRESS-} ]]; then # a TPU slice: one process per host
  IFS=, read -ra hosts <<<"$TPU_WORKER_HOSTNAMES"
  # Several slices are one job. Their coordinator is the first host of slice 0; libtpu, not JAX, listens on its port.
  first=${MEGASCALE_COORDINATOR_ADDRESS:-${hosts[0]}}
  export JAX_COORDINATOR_ADDRESS=${first%:*}:8476
  export JAX_NUM_PROCESSES=$((${MEGASCALE_NUM_SLICES:-1} * ${#hosts[@]}))
  export JAX_PROCESS_ID=$((${MEGASCALE_SLICE_ID:-0} * ${#hosts[@]} + TPU_WORKER_ID))
fi

# Stores compiled programs, so that a restart does not compile again; on shared storage, new hosts do not either. Not on
# CPUs: there only the first process finds the programs. The others compile for longer than the 30 s of Gloo's timeout,
# and the first fails.
if [[ ${ACCELERATOR-cpu} != cpu ]]; then
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-$PWD/runs/compiled}
fi

case ${ACCELERATOR-cpu} in
  cpu)
    # Avoids JAX's warning on a host that has CUDA libraries but no driver.
    export JAX_PLATFORMS=${JAX_PLATFORMS-cpu}
    ;;
  cuda)
    # Makes a host with a broken driver fail, instead of training on its CPUs.
    export JAX_PLATFORMS=${JAX_PLATFORMS-cuda,cpu}
    # JAX's default is 75 % of a GPU's memory. `geotoken plan` assumes 90 % (72 of 80 GiB).
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION-0.9}
    # Off by default. Sends the gradients of a layer while the gradients of the next layer are computed.
    export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS-}"
    ;;
  tpu)
    export JAX_PLATFORMS=${JAX_PLATFORMS-tpu,cpu}
    # Off by default. The same for data-parallel training on TPUs, also for gradients of different sizes.
    LIBTPU_INIT_ARGS="--xla_tpu_enable_data_parallel_all_reduce_opt=true ${LIBTPU_INIT_ARGS-}"
    export LIBTPU_INIT_ARGS="--xla_tpu_data_parallel_opt_different_sized_ops=true $LIBTPU_INIT_ARGS"
    ;;
esac
