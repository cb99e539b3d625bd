#!/usr/bin/env bash
# Trains the model that is bundled with refrag (src/refrag/demo/weights), from nothing, on two CPU cores in about five and a half hours.
# Every stage goes on where it was stopped. docs/log.md tells how the weights in the repository were really made.
set -euo pipefail
export OMP_WAIT_POLICY=PASSIVE
out=${1:-runs/bundled}
stage() { python -m refrag.demo.train "$1" --output-dir "$out" "${@:2}"; }

stage reading --num-steps 4500
stage reconstruction --num-steps 220 --schedule linear --warmup 20
stage mixed --num-steps 2100 --schedule linear --warmup 30 --learning-rate 2e-3
stage polish --num-steps 3900 --schedule linear --warmup 30 --learning-rate 2e-3 --batch-passages 32
stage stretch --num-steps 2800 --schedule linear --warmup 40 --learning-rate 1.5e-3 --batch-passages 32
stage policy --num-steps 25000 --schedule linear --warmup 30 --learning-rate 2e-3
stage export --weights src/refrag/demo/weights
