#!/usr/bin/env bash
# The paper's setting: RoBERTa-large + LLaMA-2-7B, k = 16, 256 rows a step over 8 nodes of 8 GPUs, started by torchrun on every node.
# $DATA holds documents.jsonl (SlimPajama's Book and ArXiv, half and half) and questions.jsonl, on a disk that all nodes see, as is $OUT.
#
#   MASTER=node0:29500 DATA=my-data runs/paper_7b.sh     on each of 8 nodes
#   NNODES=1 GPUS=8 EXTRA="--set gradient_accumulation_steps=8" DATA=my-data runs/paper_7b.sh     one node, the same 256 rows
#   DRY_RUN=1 runs/paper_7b.sh                           prints every setting of every stage and stops, in one process
#
# ENCODER and DECODER name other models of any size; EXTRA holds more flags, such as  EXTRA="--set num_steps=2 --set device=cpu --set fsdp=false".
# What is done is skipped: after an interruption the same command goes on.
set -euo pipefail
export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} TOKENIZERS_PARALLELISM=false
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
data=${DATA:-data}
documents=$data/documents.jsonl questions=$data/questions.jsonl
# shellcheck disable=SC2206  # EXTRA holds several words
extra=(${EXTRA:-})
settings=()
[ -z "${ENCODER:-}" ] || settings+=(--set "encoder=$ENCODER")
[ -z "${DECODER:-}" ] || settings+=(--set "decoder=$DECODER")

launch=(-m torch.distributed.run --nnodes "${NNODES:-8}" --nproc-per-node "${GPUS:-8}" --rdzv-backend c10d
    --rdzv-endpoint "${MASTER:-localhost:29500}" --rdzv-id "${RUN_ID:-refrag}")
[ -z "${DRY_RUN:-}" ] || launch=()

exec "$python" ${launch[@]+"${launch[@]}"} -m refrag.cli train all --config "$here/paper_7b.yaml" --output-dir "${OUT:-runs/paper_7b}" ${DRY_RUN:+--dry-run} \
    --set "reconstruction.data=$documents" --set "cpt.data=$documents" --set "sft.data=$questions" --set "policy.data=$documents" \
    ${settings[@]+"${settings[@]}"} ${extra[@]+"${extra[@]}"}
