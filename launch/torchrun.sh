#!/usr/bin/env bash
# Several machines without a scheduler: start this on each of them, with the same arguments. From the repository's folder:
#   NODES=2 NODE=0 HEAD=10.0.0.1 bash launch/torchrun.sh CONFIG [a.b.c=value ...]      on the first machine
#   NODES=2 NODE=1 HEAD=10.0.0.1 bash launch/torchrun.sh CONFIG [a.b.c=value ...]      on the second
# RANKS: ranks of each machine, by default its GPUs, or those of CUDA_VISIBLE_DEVICES. PORT: where the ranks meet on HEAD.
# All machines must see the configuration, the data and the run folder under the same paths.
set -euo pipefail
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
else
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${REWARM_PYTHON:-python3}" -m torch.distributed.run \
    --nnodes "${NODES:-1}" --node-rank "${NODE:-0}" --nproc-per-node "${RANKS:-$((gpus > 0 ? gpus : 1))}" \
    --master-addr "${HEAD:-127.0.0.1}" --master-port "${PORT:-29500}" \
    -m rewarm train "$@"
