#!/usr/bin/env bash
# From nothing to a continued model: installs into .venv, gathers real text from this machine, pre-trains a small model
# on English, continues it on Python and C++ with replay, exports it for Hugging Face and checks the export.
#   bash scripts/quickstart.sh [a.b.c=value ...]     settings for both stages, for example parallel.tensor=2
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
began=$SECONDS
step() { printf '\n\033[1m[%3ds] %s\033[0m\n' $((SECONDS - began)) "$1"; }

step "1/5 environment"
prepare_environment
step "2/5 text of this machine: English, Python, C++"
rewarm data demo
step "3/5 stage 1: learn English from random weights"
rewarm train configs/quickstart/base.yaml "$@"
step "4/5 stage 2: continue on Python and C++, replaying 5% English"
rewarm train configs/quickstart/continue.yaml "$@"
step "5/5 export to Hugging Face, checked against the engine"
rewarm export runs/quickstart-continue --output runs/quickstart-continue/huggingface --check --sample "The module"
step "done"
echo "next: rewarm train configs/quickstart/continue.yaml name=mine replay.fraction=0.25"
