#!/usr/bin/env bash
# Every CPU measurement of docs/performance.md, on two threads of a machine that does nothing else. Options given here go
# to every run, such as --rounds 3; python benchmarks/tables.py then rewrites the tables and the figure.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src
options=("$@")

bench() { # KIND RESULT OPTIONS...
    local kind=$1 out=benchmarks/results/bench_$2.json
    shift 2
    echo "== $kind: $out" >&2
    "${PYTHON:-.venv/bin/python}" -m molf bench "$kind" --out "$out" --device cpu --threads 2 "${options[@]}" "$@"
}

forced="molf molf-dense molf-dense-late molf-lora"
sizes="1 2 3 4"

bench step step_cpu --preset cpu-small
bench step overhead_cpu --preset cpu-deep --contenders fft fft-foreach $forced molf-superposed lora molf-e
bench step growth_cpu --preset cpu-small --baseline fft@cpu-growth-1 \
    --contenders $(for size in $sizes; do echo "fft@cpu-growth-$size molf-dense-late@cpu-growth-$size"; done)
bench step experts_cpu --preset cpu-small --baseline 'molf-lora:expert_ranks=[64]' --contenders \
    'molf-lora:expert_ranks=[64]' 'molf-lora:expert_ranks=[32,32]' 'molf-lora:expert_ranks=[16,16,16,16]' \
    'molf-lora:expert_ranks=[8,8,8,8,8,8,8,8]'
bench train train_cpu --preset cpu-small --contenders fft $forced molf-superposed lora lora-2 molf-e
bench train train_cpu_accumulation --preset cpu-small --accumulation 4 --contenders fft $forced lora molf-e
bench step low_memory_cpu --preset cpu-small --contenders fft molf molf:keep_base=False molf:moments_8bit=True
bench memory memory_cpu --preset cpu-small --rounds 1
