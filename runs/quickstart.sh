#!/usr/bin/env bash
# From data to an answer in minutes, on a CPU, without any download: the almanac's passages and questions are written, the bundled model
# goes through all four stages, its passages are indexed, held-out questions are answered, and one is asked.
# What is done is skipped: after an interruption the same command goes on. It shows the path; forty steps teach little.
#
#   runs/quickstart.sh                             into runs/quickstart
#   OUT=elsewhere EXTRA="--set num_steps=5" runs/quickstart.sh
#   DRY_RUN=1 runs/quickstart.sh                   prints every setting of every stage and stops
set -euo pipefail
export OMP_WAIT_POLICY=PASSIVE
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
out=${OUT:-runs/quickstart}
num_questions=${NUM_QUESTIONS:-20}
# shellcheck disable=SC2206  # EXTRA holds several words
extra=(${EXTRA:-})
refrag() { "$python" -m refrag.cli "$@"; }

# 1. Data: documents of a few passages each, questions to train on, and questions about names that training never shows.
if [ ! -f "$out/data/ready" ]; then
    mkdir -p "$out/data"
    "$python" - "$out/data" "$num_questions" <<'PY'
import json
import sys
from pathlib import Path

from refrag.demo.almanac import write_dataset

folder, num_questions = Path(sys.argv[1]), int(sys.argv[2])
write_dataset(folder / "questions.jsonl", 400, split="train", cite=True)
write_dataset(folder / "held-out.jsonl", num_questions, split="held-out")
with (folder / "questions.jsonl").open() as rows, (folder / "documents.jsonl").open("w") as documents:
    for row in map(json.loads, rows):
        text = "\n\n".join(f"{passage['title']}\n{passage['text']}" for passage in row["passages"])
        documents.write(json.dumps({"id": row["id"], "text": text}) + "\n")
seen = set()
with (folder / "held-out.jsonl").open() as rows, (folder / "passages.jsonl").open("w") as passages:
    for passage in (passage for row in map(json.loads, rows) for passage in row["passages"]):
        if passage["id"] not in seen:
            seen.add(passage["id"])
            passages.write(json.dumps({name: passage[name] for name in ("id", "title", "text")}) + "\n")
PY
    touch "$out/data/ready"
fi

# 2. The four stages, each from the model of the one before.
documents=$out/data/documents.jsonl questions=$out/data/questions.jsonl
refrag train all --config "$here/quickstart.yaml" --output-dir "$out" ${DRY_RUN:+--dry-run} \
    --set "reconstruction.data=$documents" --set "cpt.data=$documents" --set "sft.data=$questions" --set "policy.data=$questions" ${extra[@]+"${extra[@]}"}
[ -z "${DRY_RUN:-}" ] || exit 0

# 3. The index, made after training: its vectors belong to the weights of the encoder that made them.
model=$out/policy/model
refrag index build "$out/data/passages.jsonl" --index "$out/index" --model "$model"

# 4. Evaluation: exact match of plain RAG, compressed passages and the policy on the held-out questions.
"$python" "$here/../benchmarks/almanac.py" --model "$model" --num-questions "$num_questions" --splits held-out --out "$out/almanac.json"

# 5. A question, answered from the index.
question=$("$python" -c 'import json, sys; print(json.loads(open(sys.argv[1]).readline())["question"])' "$out/data/held-out.jsonl")
echo "$question"
refrag ask "$question" --index "$out/index" --model "$model" --trace
echo "report: $out/report.html"
