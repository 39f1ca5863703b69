#!/usr/bin/env bash
# What a GPU does with this suite, in at most ten minutes, on one card, without a network: ceilings, ours beside TRL at Phi-2's sizes,
# whether the T4 recipe fits into a T4, NF4 against other ways to hold the base, a profiler's trace, and each lever taken out.
#
#   bash benchmarks/gpu.sh                                   writes benchmarks/gpu.json as it goes, and prints the rows for gpu.md
#   bash benchmarks/gpu.sh --parts ladder                    some of it; the rest stays as it was in the report
#   bash benchmarks/gpu.sh --device cpu --shape tiny         the same code without a card, on a model of a toy's size
#
# Every part is a process of its own with a time limit; what one part cannot do is written down, and the next begins. TRL comes from
# `pip install -r benchmarks/requirements.txt`; without it its rows say so.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH="src:benchmarks${PYTHONPATH:+:$PYTHONPATH}"
# The allocator's segments grow instead of lying beside each other: rows of many lengths come and go.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
exec timeout --signal=INT --kill-after=20 "${GPU_SECONDS:-600}" "${PYTHON:-python}" benchmarks/gpu.py "$@"
