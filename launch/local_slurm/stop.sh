#!/usr/bin/env bash
# Stops the SLURM that start.sh started, ends its jobs and removes its folder. Nothing else is touched.
set -euo pipefail
folder=${REWARM_LOCAL_SLURM:-/tmp/rewarm-slurm}
[ -e "$folder/environment.sh" ] || { echo "local_slurm: no local SLURM in $folder"; exit 0; }

# Processes of this cluster: its daemons, and what its jobs left behind. A kill by name would reach other clusters, and
# the configuration alone is also in the environment of every shell that sourced environment.sh.
members() {
    local environment process
    for environment in $(grep -lzxF "SLURM_CONF=$folder/slurm.conf" /proc/[0-9]*/environ 2>/dev/null); do
        process=${environment%/environ}
        if grep -q '^slurm' "$process/comm" 2>/dev/null || grep -qz '^SLURM_JOB_ID=' "$environment" 2>/dev/null; then
            echo "${process#/proc/}"
        fi
    done
}

# The controller first: it would requeue what ends while it looks on.
for signal in TERM KILL; do
    for kind in slurmctld slurmd munged; do
        for file in "$folder"/pid/$kind*; do
            [ -e "$file" ] && kill -$signal "$(cat "$file")" 2>/dev/null || true
        done
    done
    for ((tries = 0; tries < 20; tries++)); do
        pids=$(members)
        [ -n "$pids" ] || break 2
        # shellcheck disable=SC2086
        kill -$signal $pids 2>/dev/null || true
        sleep 0.1
    done
done
rm -rf "$folder"
echo "local SLURM in $folder stopped"
