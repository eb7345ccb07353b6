#!/usr/bin/env bash
# Everything that needs a GPU, on a machine that has one: builds the CUDA kernels, runs the tests marked gpu, times
# kernels, offload and whole steps, and races DeepSpeed's and Megatron-Core's offload.
#   bash scripts/gpu.sh                          one to two hours; results in docs/benchmarks/<date>-<gpu>
#   bash scripts/gpu.sh --rounds 1 --steps 2     anything after the script's name goes to offload_rivals.py
# NVME=/local/nvme0 adds the placement with state on that drive; it is left out without.
# A part that fails is named at the end and does not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment test || exit 1

if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: torch sees no CUDA device here (nvidia-smi shows what the driver sees; a CPU build of torch sees none)" >&2
    exit 1
fi
name=$(python -c 'import re, torch; print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))')
folder="docs/benchmarks/$(date +%F)-$name"
mkdir -p "$folder"
failed=()

# part NAME COMMAND ...: run it, keep what it prints in NAME.txt beside the command, and remember if it fails.
part() {
    local part="$1"
    shift
    echo "== $part: $*"
    { echo "$ $*"; "$@"; } 2>&1 | tee "$folder/$part.txt"
    if [ "${PIPESTATUS[0]}" != 0 ]; then
        failed+=("$part")
    fi
}

machine() {
    date -u +'%F %H:%M UTC'
    nvidia-smi --query-gpu=name,memory.total,driver_version,pcie.link.gen.current,pcie.link.width.current --format=csv
    nvidia-smi topo -m
    lscpu | grep -E '^(Model name|CPU\(s\)|NUMA)'
    free -g
    ulimit -l
    nvcc --version
    python -m pip list 2>/dev/null | grep -iE '^(torch|deepspeed|megatron-core|transformers|transformer.engine|rewarm) '
    git log -1 --format='commit %h' 2>/dev/null
    return 0
}

kernels() {
    python setup.py build_ext --inplace &&
        python -c 'import sys; from rewarm.kernels import native; sys.exit(native.why_no_cuda())'
}

part machine machine
part kernels kernels
part tests python -m pytest -m gpu -rs
part deepspeed-extensions python scripts/deepspeed_extensions.py cpu_adam
part adamw python scripts/benchmarks/adamw.py --threads "$(nproc)"
part offload python scripts/benchmarks/offload.py --elements 400000000 --subgroup 20000000 --threads "$(nproc)" \
    ${NVME:+--nvme "$NVME"}
# Engines run with one connection, which Megatron-Core wants for its own overlap: does it cost copies theirs?
part offload-one-connection env CUDA_DEVICE_MAX_CONNECTIONS=1 python scripts/benchmarks/offload.py \
    --elements 400000000 --subgroup 20000000 --threads "$(nproc)"
part offload-step python scripts/benchmarks/offload_step.py --layers 16 --hidden 1024 --sequence 1024 \
    --subgroup 20000000 --modes none cpu streamed deep_optimizer_states --apart
part offload-rivals python scripts/benchmarks/offload_rivals.py --output "$folder" "$@"

echo
echo "results are in $folder"
if [ ${#failed[@]} != 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
