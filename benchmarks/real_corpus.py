"""A real corpus end to end, by the commands a user types: `refrag index build`, the same again, `index verify`, `refrag ask`.

    nice -n 10 python benchmarks/real_corpus.py --data ../shared/data/2wikimultihop --out results/2wikimultihop.json

Each command is a process of its own; wall and CPU seconds include starting Python and loading the model. The bundled model knows
nothing of this text: what is shown is that the flow holds and what it costs, not that the answers are right.
"""

import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from refrag.config import BUNDLED_MODEL
from refrag.evaluation.provenance import result, write_result

SHOWN = ("context_tokens", "context_slots", "prompt_slots", "num_chunks", "expanded_chunks", "compression_rate", "completion_tokens")


@dataclass(frozen=True)
class Arguments:
    """Index a corpus and ask some questions of it, compressed."""

    data: Path = Path("../shared/data/2wikimultihop")
    """Folder with corpus.jsonl.gz, and dev.jsonl.gz with the questions."""
    model: str = BUNDLED_MODEL
    """Model: folder, name, or `bundled`."""
    questions: int = 4
    """Questions to ask, the first of dev.jsonl.gz whose gold titles are all in the corpus."""
    expand_fraction: float = 0.065
    """Share of the chunks to expand."""
    batch_size: int = 256
    """Passages encoded and written at a time."""
    out: Path | None = None
    """JSON file for the result."""


def refrag(*arguments: object) -> tuple[str, dict[str, float]]:
    """(stdout, costs) of one command; it must succeed."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "refrag.cli", *map(str, arguments), "--quiet"], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    out = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"refrag {arguments[0]} ended with {child.returncode}")
    peak = usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
    return out, {"wall_s": round(time.perf_counter() - start, 2), "cpu_s": round(usage.ru_utime + usage.ru_stime, 2), "peak_rss_bytes": peak}


def build(arguments: Arguments, index: Path) -> dict[str, Any]:
    """What `index build` says and costs, with its rate by wall and by CPU time."""
    out, costs = refrag("index", "build", arguments.data / "corpus.jsonl.gz", "--index", index, "--model", arguments.model, "--batch-size", arguments.batch_size)
    counts = json.loads(out)
    passages = sum(counts[name] for name in ("added", "updated", "unchanged"))
    rates = {f"{unit}_per_{kind}_s": round(number / costs[f"{kind}_s"], 1) for kind in ("wall", "cpu") for unit, number in (("passages", passages), ("chunks", counts["chunks"]))}
    return counts | costs | rates


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of gzip JSON lines."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def answerable(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first questions whose gold passages are in the corpus, by title."""
    titles = {row["title"] for row in read(folder / "corpus.jsonl.gz")}
    rows = (row for row in read(folder / "dev.jsonl.gz") if {own["title"] for own in row["passages"] if own["is_gold"]} <= titles)
    return [row for row, _ in zip(rows, range(count), strict=False)]


def ask(arguments: Arguments, index: Path, row: dict[str, Any]) -> dict[str, Any]:
    """One question over the index: what was read, what it cost, and how many of the gold titles were found."""
    how = ("--mode", "hybrid", "--top-k", 8, "--expand-fraction", arguments.expand_fraction, "--max-new-tokens", 24, "--json")
    out, costs = refrag("ask", row["question"], "--index", index, "--model", arguments.model, *how)
    answer = json.loads(out)
    gold, found = {own["title"] for own in row["passages"] if own["is_gold"]}, {own["title"] for own in answer["passages"]}
    assert answer["usage"]["compression_rate"] > 1 and len(answer["trace"]) == answer["usage"]["num_chunks"]
    return {
        "question": row["question"],
        "answers": row["answers"],
        "text": answer["text"],
        "citations": answer["citations"],
        "rule": answer["trace"][0]["rule"],
        "gold_found": f"{len(gold & found)} of {len(gold)}",
        "usage": {name: answer["usage"][name] for name in SHOWN},
        "timings_s": {name: round(seconds, 4) for name, seconds in answer["timings"].items()},
        **costs,
    }


def main() -> None:
    """Build, build again, verify, ask; print and write the result."""
    arguments = tyro.cli(Arguments)
    with tempfile.TemporaryDirectory(prefix="refrag-corpus-") as folder:
        index = Path(folder) / "index"
        values: dict[str, Any] = {"build": build(arguments, index), "build_again": build(arguments, index)}
        encoding_s = values["build"]["cpu_s"] - values["build_again"]["cpu_s"]  # without starting, reading and hashing
        values["chunks_per_encoding_cpu_s"] = round(values["build"]["chunks"] / encoding_s, 1)
        info = json.loads(refrag("index", "info", "--index", index, "--json")[0])
        values["index"] = {name: info[name] for name in ("passages", "chunks", "bytes", "fragments", "storage")}
        values["index"]["bytes_on_disk"] = sum(path.stat().st_size for path in index.rglob("*") if path.is_file())
        values["verify"] = refrag("index", "verify", "--index", index, "--model", arguments.model)[1]
        values["asked"] = [ask(arguments, index, row) for row in answerable(arguments.data, arguments.questions)]
    settings = {name: value for name, value in asdict(arguments).items() if name not in ("data", "out")} | {"data": arguments.data.name, "nice": os.nice(0)}
    content = result("real_corpus", settings=settings, values=values)
    if arguments.out:
        write_result(arguments.out, content)
    print(json.dumps(content, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
