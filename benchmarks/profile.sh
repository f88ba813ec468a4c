#!/usr/bin/env bash
# Profiles a training step of a decoder layer's linears into a folder:
#
#     benchmarks/profile.sh [DIR] [arguments of benchmarks.profile ...]
#
# Runs nsys (timeline, kernels by time, NVTX ranges) if there are nsys and a GPU, and always
# torch.profiler.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/profile}
shift || true
mkdir -p "$out"
python=${PYTHON:-python}

if command -v nsys >/dev/null && "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    nsys profile --trace=cuda,nvtx,cublas --force-overwrite=true --output="$out/step" \
        "$python" -m benchmarks.profile --nsys --out "$out" "$@"
    nsys stats --force-export=true --report cuda_gpu_kern_sum,nvtx_pushpop_sum \
        "$out/step.nsys-rep" | tee "$out/nsys.txt"
fi
"$python" -m benchmarks.profile --out "$out" "$@"
