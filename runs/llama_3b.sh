#!/usr/bin/env bash
# roberta-large + Llama-3.2-3B on one GPU of 80 GB, all four stages. $DATA holds documents.jsonl ({"text"}) and questions.jsonl
# ({"question", "answers", "passages"}). What is done is skipped: after an interruption the same command goes on.
#
#   DATA=my-data runs/llama_3b.sh            LoRA on the decoder (rank 32) in the stages that train it
#   MODE=full DATA=my-data runs/llama_3b.sh  all weights: 3.2 billion in float32, with an 8-bit optimizer (pip install 'refrag[8bit]')
#   DRY_RUN=1 runs/llama_3b.sh               prints every setting of every stage and stops
#
# ENCODER and DECODER name other models of any size; EXTRA holds more flags, such as  EXTRA="--set num_steps=2 --set max_chunks=4".
set -euo pipefail
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
mode=${MODE:-lora}
data=${DATA:-data}
documents=$data/documents.jsonl questions=$data/questions.jsonl
# shellcheck disable=SC2206  # EXTRA holds several words
extra=(${EXTRA:-})

case $mode in
    lora) settings=(--set cpt.lora_rank=32 --set cpt.learning_rate=2e-4 --set sft.lora_rank=32 --set sft.learning_rate=1e-4) ;;
    full) settings=(--set cpt.optimizer=adamw_8bit --set sft.optimizer=adamw_8bit) ;;
    *) echo "MODE must be lora or full, was $mode" >&2; exit 2 ;;
esac
[ -z "${ENCODER:-}" ] || settings+=(--set "encoder=$ENCODER")
[ -z "${DECODER:-}" ] || settings+=(--set "decoder=$DECODER")

exec "$python" -m refrag.cli train all --config "$here/llama_3b.yaml" --output-dir "${OUT:-runs/llama_3b-$mode}" ${DRY_RUN:+--dry-run} \
    --set "reconstruction.data=$documents" --set "cpt.data=$documents" --set "sft.data=$questions" --set "policy.data=$questions" \
    ${settings[@]+"${settings[@]}"} ${extra[@]+"${extra[@]}"}
