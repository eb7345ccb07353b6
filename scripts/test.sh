#!/usr/bin/env bash
# Installs what the tests need and runs them all: style, types, unit, ranks, system.
#   bash scripts/test.sh              everything
#   bash scripts/test.sh tests/unit   only these; anything after the script's name goes to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment test
prepare_slurm

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
