#!/usr/bin/env bash
# Starts a real SLURM on this machine: munged, slurmctld and one slurmd a node, all with files, keys and ports of their
# own, so that a SLURM which is installed here already is left alone. Needs root, and Debian's slurm-wlm and munge.
#   bash launch/local_slurm/start.sh [NODES]         default 2
#   source /tmp/rewarm-slurm/environment.sh          now sinfo, sbatch and rewarm submit talk to it
#   bash launch/local_slurm/stop.sh
# REWARM_LOCAL_SLURM names another folder than /tmp/rewarm-slurm; each folder is one cluster.
# REWARM_LOCAL_SLURM_PATIENCE multiplies the daemons' time-outs, for a machine on which much else runs (default 1).
# Partitions: batch (default), low (its jobs are requeued for those of batch), short (at most 2 minutes).
set -euo pipefail
num_nodes=${1:-2}
folder=${REWARM_LOCAL_SLURM:-/tmp/rewarm-slurm}
patience=${REWARM_LOCAL_SLURM_PATIENCE:-1}
here=$(cd "$(dirname "$0")" && pwd)

fail() { echo "local_slurm: $*" >&2; exit 1; }
[[ $num_nodes =~ ^[1-9][0-9]?$ ]] || fail "NODES is '$num_nodes': give a number from 1 to 99"
[[ $patience =~ ^[1-9][0-9]?$ ]] || fail "REWARM_LOCAL_SLURM_PATIENCE is '$patience': give a number from 1 to 99"
[ "$(id -u)" = 0 ] || fail "needs root, because slurmd starts jobs for other users"
for program in munged slurmctld slurmd sinfo; do
    command -v "$program" >/dev/null || PATH=$PATH:/usr/sbin
    command -v "$program" >/dev/null || fail "$program is missing: apt-get install slurm-wlm munge"
done
if [ -e "$folder" ]; then
    [ -e "$folder/environment.sh" ] || fail "$folder exists and is not a local SLURM; set REWARM_LOCAL_SLURM"
    bash "$here/stop.sh" # what a crash left behind, or the cluster before this one
fi

mkdir -p "$folder"/{munge,state,spool,log,pid}
# munged refuses a socket below a folder that others may write to; everything else is reached through the socket.
chmod 755 "$folder" "$folder"/*
chmod 700 "$folder/state"
head -c 128 /dev/urandom > "$folder/munge/key"
chmod 400 "$folder/munge/key"

# A row of free ports: the controller, then one a node.
first_port=$(python3 - "$num_nodes" <<'PYTHON'
import random, socket, sys
while True:
    first = random.randrange(10000, 30000)
    try:
        for port in range(first, first + int(sys.argv[1]) + 1):
            with socket.socket() as probe:
                probe.bind(("", port))
    except OSError:
        continue
    print(first)
    break
PYTHON
)

# Two cores can play any number of nodes: config_overrides lets each claim what is written here.
cat > "$folder/slurm.conf" <<CONF
ClusterName=rewarm
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$first_port
SlurmctldPidFile=$folder/pid/slurmctld
SlurmdPidFile=$folder/pid/slurmd-%n
SlurmUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldDebug=debug
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/slurmd-%n
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential has expired: 120 s by default.
AuthInfo=cred_expire=$((5 * patience)),socket=$folder/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog=$folder/task_prolog
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=$((10 * patience))
SlurmctldTimeout=$((10 * patience))
MessageTimeout=$((patience < 10 ? 10 * patience : 100))
TCPTimeout=$((2 * patience))
BatchStartTimeout=$((10 * patience))
KillWait=$((60 * patience))
InactiveLimit=0
MinJobAge=300
UnkillableStepTimeout=$((60 * patience))
MailProg=/bin/true
CONF
for ((node = 1; node <= num_nodes; node++)); do
    echo "NodeName=node$node NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((first_port + node)) CPUs=8 RealMemory=4000"
done >> "$folder/slurm.conf"
cat >> "$folder/slurm.conf" <<CONF
PartitionName=batch Nodes=ALL Default=YES MaxTime=1-00:00:00 PriorityTier=10 State=UP
PartitionName=low Nodes=ALL MaxTime=1-00:00:00 PriorityTier=1 GraceTime=$((60 * patience)) State=UP
PartitionName=short Nodes=ALL MaxTime=2 PriorityTier=10 State=UP
CONF
# What is in nodes/NAME is printed for the tasks of that node ("export NAME=value"), so that a test can make one node odd.
mkdir "$folder/nodes"
cat > "$folder/task_prolog" <<PROLOG
#!/bin/bash
# Not for the batch script, from which the tasks of all nodes would inherit it.
[ -z "\$SLURM_STEP_NODELIST" ] || cat "$folder/nodes/\$SLURMD_NODENAME" 2>/dev/null || true
PROLOG
chmod 755 "$folder/task_prolog"
cat > "$folder/environment.sh" <<CONF
export SLURM_CONF=$folder/slurm.conf
export REWARM_LOCAL_SLURM=$folder
export PATH=\$PATH:/usr/sbin
CONF
source "$folder/environment.sh"

munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/pid/munged" \
    --log-file="$folder/log/munged" --seed-file="$folder/munge/seed" --num-threads=2 2>>"$folder/log/start"
# The daemons outlive this shell and must not hold its terminal or the pipe that a caller reads.
slurmctld -c </dev/null >>"$folder/log/start" 2>&1
for ((node = 1; node <= num_nodes; node++)); do
    slurmd -N "node$node" </dev/null >>"$folder/log/start" 2>&1
done

for ((tries = 0; tries < 100 * patience; tries++)); do
    ready=$(sinfo --noheader --partition=batch --format=%D --states=idle 2>/dev/null || true)
    if [ "${ready:-0}" = "$num_nodes" ]; then
        echo "local SLURM with $num_nodes nodes is up; next: source $folder/environment.sh"
        exit 0
    fi
    sleep 0.2
done
tail -n 5 "$folder"/log/* >&2
bash "$here/stop.sh" >&2
fail "the nodes did not come up within $((20 * patience)) s"
