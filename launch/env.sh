# shellcheck shell=bash
# The environment of a training process, in one place: every launcher sources it, in each process, through run.sh.
# What the caller has set stays. An XLA flag that this jaxlib does not know aborts the process: tests/test_launch.py
# starts with every one of them.

# Who this process is, from what its launcher says: one address for all, how many there are, and which one it is.
if [[ -n ${SLURM_PROCID-} ]]; then # srun; the batch script has set the address
  export JAX_NUM_PROCESSES=${JAX_NUM_PROCESSES-$SLURM_NTASKS} JAX_PROCESS_ID=${JAX_PROCESS_ID-$SLURM_PROCID}
  if [[ -n ${CUDA_VISIBLE_DEVICES-} ]]; then # those of the node: each task has its share, and uses all of it
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
    each=$((${#gpus[@]} / ${SLURM_NTASKS_PER_NODE:-1}))
    CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]:SLURM_LOCALID*each:each}")
    JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((each - 1)))
    export CUDA_VISIBLE_DEVICES JAX_LOCAL_DEVICE_IDS
  fi
elif [[ -n ${TPU_WORKER_HOSTNAMES-} && -z ${JAX_COORDINATOR_ADDRESS-} ]]; then # a TPU slice: one process a host
  IFS=, read -ra hosts <<<"$TPU_WORKER_HOSTNAMES"
  export JAX_COORDINATOR_ADDRESS=${hosts[0]}:8476 JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$TPU_WORKER_ID
fi

# A restart finds its programs compiled; on storage that all hosts see, new hosts do too. Not on CPUs: there only the
# first process finds them, and gives up on the others, which compile, after the 30 s that Gloo waits.
if [[ ${ACCELERATOR-cpu} != cpu ]]; then
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-$PWD/runs/compiled}
fi

case ${ACCELERATOR-cpu} in
  cpu)
    # Where a GPU's libraries are installed too, and no driver, JAX would complain.
    export JAX_PLATFORMS=${JAX_PLATFORMS-cpu}
    ;;
  cuda)
    # Without it a host whose driver is broken would train on its CPUs.
    export JAX_PLATFORMS=${JAX_PLATFORMS-cuda,cpu}
    # JAX takes 75 % of a GPU's memory; `geotoken plan` reckons with 90 % (72 of 80 GiB).
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION-0.9}
    # Off by default: sends each layer's gradients while the next layer's are computed.
    export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS-}"
    ;;
  tpu)
    export JAX_PLATFORMS=${JAX_PLATFORMS-tpu,cpu}
    # Off by default: the same for the gradients of data parallel training, which differ in size.
    LIBTPU_INIT_ARGS="--xla_tpu_enable_data_parallel_all_reduce_opt=true ${LIBTPU_INIT_ARGS-}"
    export LIBTPU_INIT_ARGS="--xla_tpu_data_parallel_opt_different_sized_ops=true $LIBTPU_INIT_ARGS"
    ;;
esac
