#!/usr/bin/env bash
# The ranks of one machine, or of those in a hostfile, started by DeepSpeed's launcher. From the repository's folder:
#   bash launch/deepspeed.sh CONFIG [a.b.c=value ...]
#   HOSTFILE=hosts bash launch/deepspeed.sh CONFIG [a.b.c=value ...]      needs ssh between the machines, and pdsh here
# Without ssh, start it on every machine of the hostfile, in its order:
#   HOSTFILE=hosts HEAD=10.0.0.1 NODE=0 bash launch/deepspeed.sh CONFIG [a.b.c=value ...]      on the first machine
#   HOSTFILE=hosts HEAD=10.0.0.1 NODE=1 bash launch/deepspeed.sh CONFIG [a.b.c=value ...]      on the second
# A line of the hostfile: NAME slots=RANKS. RANKS: at most so many on each machine, without a hostfile its GPUs. PORT:
# where the ranks meet on HEAD. All machines must see the configuration, the data and the run folder under the same paths.
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
options=(--no_local_rank --master_port "${PORT:-29500}")
[ -z "${HOSTFILE:-}" ] || options+=(--hostfile "$HOSTFILE")
[ -z "${HEAD:-}" ] || options+=(--master_addr "$HEAD")
[ -z "${NODE:-}" ] || options+=(--no_ssh --node_rank "$NODE")
[ -z "${RANKS:-}" ] || options+=(--num_gpus "$RANKS")
case " $* " in *" --debug "*) ;; *) options+=(--quiet) ;; esac
exec "${REWARM_PYTHON:-python3}" -m deepspeed.launcher.runner "${options[@]}" --module rewarm train "$@"
