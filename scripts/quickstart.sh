#!/usr/bin/env bash
# From nothing to a continued model: installs into .venv, gathers real text from this machine, pre-trains a small model
# on English, continues it on Python and C++ with replay, exports it for Hugging Face and checks the export.
#   bash scripts/quickstart.sh [a.b.c=value ...]     settings for both stages, for example parallel.tensor=2
#   bash scripts/quickstart.sh engine=deepspeed      the same under DeepSpeed, in runs of its own
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
began=$SECONDS
step() { printf '\n\033[1m[%3ds] %s\033[0m\n' $((SECONDS - began)) "$1"; }

# A run belongs to the engine that made it, so that each engine has its own.
suffix=""
for setting in "$@"; do
    [ "$setting" != engine=deepspeed ] || suffix="-deepspeed"
done
base="quickstart-base$suffix" continued="quickstart-continue$suffix"

step "1/5 environment"
prepare_environment
step "2/5 text of this machine: English, Python, C++"
rewarm data demo
step "3/5 stage 1: learn English from random weights"
rewarm train configs/quickstart/base.yaml name="$base" "$@"
step "4/5 stage 2: continue on Python and C++, replaying 5% English"
rewarm train configs/quickstart/continue.yaml name="$continued" parent="runs/$base" "$@"
step "5/5 export to Hugging Face, checked against the engine"
rewarm export "runs/$continued" --output "runs/$continued/huggingface" --check --sample "The module"
step "done"
own="${suffix:+ engine=deepspeed parent=runs/$base}"
echo "next: rewarm train configs/quickstart/continue.yaml name=mine replay.fraction=0.25$own"
