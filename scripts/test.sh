#!/usr/bin/env bash
# Installs what the tests need and runs them all: style, types, unit, ranks, system.
#   bash scripts/test.sh              everything
#   bash scripts/test.sh tests/unit   only these; anything after the script's name goes to pytest
#                                    (SLURM is installed only if its tests are among them)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment test
# SLURM is installed only when tests that start one may run: with no arguments, or with paths or marks that include them.
asks_for_slurm() {
    local argument is_value="" named_paths=""
    [ $# -eq 0 ] && return 0
    for argument in "$@"; do
        case "$is_value" in
            mark) case "$argument" in *"not slurm"*) return 1 ;; *slurm*) return 0 ;; esac ;;
        esac
        if [ -n "$is_value" ]; then
            is_value=""
            continue
        fi
        case "$argument" in
            -m) is_value=mark ;;
            -k | -n | --numprocesses | --dist | --maxfail | --durations | -p | -o | --timeout) is_value=other ;;
            -*) ;;
            tests | tests/ | . | ./ | tests/system | tests/system/ | *slurm*) return 0 ;;
            *) named_paths=yes ;;
        esac
    done
    [ -z "$named_paths" ]
}
if asks_for_slurm "$@"; then
    prepare_slurm
fi

if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    mypy
fi
# A file's tests stay together, since they share what they set up.
workers=$(env -u OMP_NUM_THREADS nproc)
# One thread a process: the tests start many processes, and results do not depend on it.
export OMP_NUM_THREADS=1
exec python -m pytest --numprocesses "$((workers < 4 ? workers : 4))" --dist loadfile "$@"
