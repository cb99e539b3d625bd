"""How often retrieval finds the gold paragraph: SQuAD dev questions over the distinct SQuAD dev paragraphs.

    python benchmarks/squad_recall.py --data ../shared/data/squad_v1_dev/dev.jsonl.gz --out results/squad_recall.json

Every question is asked by meaning (dense), by words (text, BM25) and by both (hybrid), each against all paragraphs of the
dev set. Recall@k: share of questions whose own paragraph is among the first k; MRR: mean of 1 / its rank, 0 beyond `depth`.
"""

import gzip
import json
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

from refrag.config import IndexSettings
from refrag.evaluation.provenance import result, write_result
from refrag.evaluation.shapes import random_refrag
from refrag.evaluation.statistics import percentile
from refrag.index import PassageIndex
from refrag.index.retrieve import OFFLINE_RETRIEVER, fuse
from refrag.text import Passage

CUTOFFS = (1, 5, 8, 20)
MODES = ("dense", "text", "hybrid")


@dataclass(frozen=True)
class Arguments:
    """Recall of the gold paragraph on SQuAD dev."""

    data: Path = Path("../shared/data/squad_v1_dev/dev.jsonl.gz")
    """Question answering rows, gzip JSON lines; the gold passage of a row is the one marked `is_gold`."""
    retriever: str = OFFLINE_RETRIEVER
    """Sentence encoder."""
    depth: int = 80
    """Length of the rankings that are fused: what `search` uses for the 20 best."""
    checked: int = 100
    """Questions asked once more through `PassageIndex.search`, which must agree and gives the latencies."""
    limit: int | None = None
    """Only so many questions."""
    seed: int = 0
    """Seed of the encoder's random weights and of the questions checked."""
    out: Path | None = None
    """JSON file for the result."""


def read(path: Path, limit: int | None) -> tuple[list[Passage], list[str], list[str]]:
    """The distinct paragraphs, the questions, and the id of each question's gold paragraph."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    ids: dict[tuple[str, str], str] = {}
    for row in rows:
        for passage in row["passages"]:
            ids.setdefault((passage["title"], passage["text"]), f"p{len(ids)}")
    passages = [Passage(identity, text, title) for (title, text), identity in ids.items()]
    gold = [next(ids[own["title"], own["text"]] for own in row["passages"] if own["is_gold"]) for row in rows]
    return passages, [row["question"] for row in rows][:limit], gold[:limit]


def rankings(index: PassageIndex, questions: list[str], depth: int) -> dict[str, list[list[str]]]:
    """Ids per question and mode, best first; the questions are embedded together."""
    found: dict[str, list[list[str]]] = {mode: [] for mode in MODES}
    vectors = index.retriever.encode_questions(questions)
    for question, vector in zip(questions, vectors, strict=True):
        dense = index.table.nearest([vector], ("id",), limit=depth, where=None, exact=True)[0]["id"].to_pylist()
        text = index.table.matching(question, ("id",), limit=depth, where=None)["id"].to_pylist()
        for mode, ids in zip(MODES, (dense, text, list(fuse([dense, text]))), strict=True):
            found[mode].append(ids)
    return found


def score(found: list[list[str]], gold: list[str], depth: int) -> dict[str, float]:
    """Recall at the cut-offs and the mean reciprocal rank."""
    ranks = [ids.index(own) + 1 if own in ids[:depth] else None for ids, own in zip(found, gold, strict=True)]
    recall = {f"recall@{cutoff}": sum(rank is not None and rank <= cutoff for rank in ranks) / len(ranks) for cutoff in CUTOFFS}
    return recall | {"mrr": sum(1 / rank for rank in ranks if rank) / len(ranks)}


def check(index: PassageIndex, questions: list[str], found: dict[str, list[list[str]]], numbers: list[int]) -> dict[str, dict[str, float]]:
    """Asks some questions through `search`: share of equal rankings of 20, and seconds a question."""
    report = {}
    for mode in MODES:
        seconds, equal = [], 0
        for number in numbers:
            start = time.perf_counter()
            hits = index.search(questions[number], mode=mode, top_k=20)
            seconds.append(time.perf_counter() - start)
            equal += {hit.passage.id for hit in hits} == set(found[mode][number][:20])
        report[mode] = {"equal": equal / len(numbers), "median_s": percentile(seconds, 0.5), "p90_s": percentile(seconds, 0.9)}
    return report


def main() -> None:
    """Build the index, ask everything, print and write the result."""
    arguments = tyro.cli(Arguments)
    passages, questions, gold = read(arguments.data, arguments.limit)
    cpu = torch.device("cpu")
    model = random_refrag("tiny", "tiny", chunk_size=16, dtype=torch.float32, device=cpu, seed=arguments.seed)  # chunk vectors do not matter here
    with tempfile.TemporaryDirectory() as folder:
        index = PassageIndex.create(Path(folder) / "index", model, IndexSettings(retriever=arguments.retriever))
        start = time.perf_counter()
        index.add(passages)
        build_s = time.perf_counter() - start
        found = rankings(index, questions, arguments.depth)
        numbers = random.Random(arguments.seed).sample(range(len(questions)), min(arguments.checked, len(questions)))
        values = {
            "paragraphs": index.count,
            "questions": len(questions),
            "retriever": index.retriever.identity(),
            "modes": {mode: score(found[mode], gold, arguments.depth) for mode in MODES},
            "search": check(index, questions, found, numbers),
            "build_s": build_s,
        }
    settings = {name: value for name, value in asdict(arguments).items() if name not in ("data", "out")} | {"data": arguments.data.parent.name}
    content = result("squad_recall", settings=settings, values=values, seed=arguments.seed)
    if arguments.out:
        write_result(arguments.out, content)
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
