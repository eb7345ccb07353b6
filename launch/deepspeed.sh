#!/usr/bin/env bash
# The ranks of one machine, or of those in a hostfile, started by DeepSpeed's launcher. From the repository's folder:
#   bash launch/deepspeed.sh CONFIG [a.b.c=value ...]
#   HOSTFILE=hosts bash launch/deepspeed.sh CONFIG [a.b.c=value ...]      needs ssh between the machines
# RANKS: ranks of each machine, by default its GPUs.
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
options=(--no_local_rank --master_port "${PORT:-29500}")
[ -z "${HOSTFILE:-}" ] || options+=(--hostfile "$HOSTFILE")
[ -z "${RANKS:-}" ] || options+=(--num_gpus "$RANKS")
exec "${REWARM_PYTHON:-python3}" -m deepspeed.launcher.runner "${options[@]}" --module rewarm train "$@"
