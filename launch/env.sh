# shellcheck shell=bash
# Sets the environment of a training process. Every launcher reads this file in each process, through run.sh. Variables
# that the caller has set are kept. An unknown XLA flag would abort the process, so tests/test_launch.py starts a
# process with all flags below.

# Reads the launcher's variables, and sets the address of the coordinator, the number of processes and the number of
# this process.
if [[ -n ${SLURM_PROCID-} ]]; then # started by srun; the batch script has set the address
  export JAX_NUM_PROCESSES=${JAX_NUM_PROCESSES-$SLURM_NTASKS} JAX_PROCESS_ID=${JAX_PROCESS_ID-$SLURM_PROCID}
  if [[ -n ${CUDA_VISIBLE_DEVICES-} ]]; then # lists all GPUs of the node: each task gets an equal share
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    each=$((${#gpus[@]} / ${SLURM_NTASKS_PER_NODE:-1}))
    CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]:SLURM_LOCALID*each:each}")
    JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((each - 1)))
    export CUDA_VISIBLE_DEVICES JAX_LOCAL_DEVICE_IDS
  fi
elif [[ -n ${TPU_WORKER_HOSTNAMES-} && -z ${JAX_COORDINATOR_ADDRESS-} ]]; then # a TPU slice: one process per host
  IFS=, read -ra hosts <<<"$TPU_WORKER_HOSTNAMES"
  # If several slices are one job, MEGASCALE_COORDINATOR_ADDRESS is the first host of slice 0. libtpu listens on the
  # port in this address, so JAX uses port 8476.
  first=${MEGASCALE_COORDINATOR_ADDRESS:-${hosts[0]}}
  export JAX_COORDINATOR_ADDRESS=${first%:*}:8476
  export JAX_NUM_PROCESSES=$((${MEGASCALE_NUM_SLICES:-1} * ${#hosts[@]}))
  export JAX_PROCESS_ID=$((${MEGASCALE_SLICE_ID:-0} * ${#hosts[@]} + TPU_WORKER_ID))
fi

# Stores compiled programs, so that a restart does not compile again. On shared storage, new hosts find the programs
# too. On CPUs nothing is stored: there only the first process would find the programs. The other processes would
# compile for longer than the 30 s of Gloo's timeout, and the first process would fail.
if [[ ${ACCELERATOR-cpu} != cpu ]]; then
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-$PWD/runs/compiled}
fi

case ${ACCELERATOR-cpu} in
  cpu)
    # Without this, JAX prints a warning on a host that has CUDA libraries but no driver.
    export JAX_PLATFORMS=${JAX_PLATFORMS-cpu}
    ;;
  cuda)
    # A host with a broken driver then fails, instead of training on its CPUs.
    export JAX_PLATFORMS=${JAX_PLATFORMS-cuda,cpu}
    # JAX's default is 75 % of a GPU's memory. `geotoken plan` assumes 90 % (72 of 80 GiB).
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION-0.9}
    # This flag is off by default. It lets XLA send the gradients of a layer while the gradients of the next layer are
    # computed.
    export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS-}"
    ;;
  tpu)
    export JAX_PLATFORMS=${JAX_PLATFORMS-tpu,cpu}
    # These flags are off by default. They do the same for data-parallel training on TPUs, also for gradients of
    # different sizes.
    LIBTPU_INIT_ARGS="--xla_tpu_enable_data_parallel_all_reduce_opt=true ${LIBTPU_INIT_ARGS-}"
    export LIBTPU_INIT_ARGS="--xla_tpu_data_parallel_opt_different_sized_ops=true $LIBTPU_INIT_ARGS"
    ;;
esac
