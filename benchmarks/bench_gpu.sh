#!/usr/bin/env bash
# Every GPU measurement of docs/performance.md: bf16 weights, 8 x 1,024 tokens, rank 128, on one GPU that does nothing
# else and has 80 GB. Contenders are built one at a time, in two turns. Options given here go to every run.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src
options=("$@")

bench() { # KIND RESULT OPTIONS...
    local kind=$1 out=benchmarks/results/bench_$2.json
    shift 2
    echo "== $kind: $out" >&2
    "${PYTHON:-.venv/bin/python}" -m molf bench "$kind" --out "$out" --device cuda --turns 2 "${options[@]}" "$@"
}

contenders="fft fft-amp molf molf-dense-late molf-lora lora molf-e"
for size in 1.5b 3b; do
    bench step "step_gpu_$size" --preset "qwen2.5-$size" --contenders $contenders --steps 20
    bench train "train_gpu_$size" --preset "qwen2.5-$size" --contenders $contenders
    bench train "train_gpu_${size}_checkpointing" --preset "qwen2.5-$size" --contenders $contenders \
        --gradient_checkpointing
done
