"""`refrag demo`: a held-out almanac is indexed, then asked about without passages, as plain RAG, compressed, and with the policy."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from ..config import BUNDLED_MODEL, Budget, GenerationSettings, IndexSettings, check_whole
from ..engine import Answer, Refrag, Request
from ..engine.answer import render_trace
from ..evaluation.metrics import after_citations, exact_match
from ..evaluation.statistics import mean_interval
from ..index import PassageIndex
from ..model import load_model
from .almanac import Case, Question, evaluation_cases

Progress = Callable[[int], object]

POLICY_FRACTION = 0.065
"""Share of the chunks that the policy may expand: a measured rate of about 4 with the bundled model."""

SYSTEMS: dict[str, dict[str, Any] | None] = {
    "no passages": None,
    "all expanded (plain RAG)": {"policy": "all"},
    "none expanded": {"policy": "none"},
    "similarity": {"policy": "similarity", "budget": Budget(expand_fraction=POLICY_FRACTION)},
    "learned policy": {"policy": "learned", "budget": Budget(expand_fraction=POLICY_FRACTION)},
}
"""What is compared, each on the same decoder and the same passages."""


@dataclass(frozen=True)
class Asked:
    """One question put to one system."""

    question: Question
    answer: Answer
    exact_match: float


def ask_all(engine: Refrag, cases: Sequence[tuple[Case, Question]], options: dict[str, Any] | None, *, batch_size: int = 1, progress: Progress | None = None) -> list[Asked]:
    """Every question to one system, over its case's own passages; those in the engine's index come with their stored vectors."""
    settings = GenerationSettings(max_new_tokens=32, stop=("\n",))
    requests = []
    for case, question in cases:
        passages = [] if options is None else case.passages
        requests.append(Request(question.text, passages, generation=settings, **(options or {"policy": "none"})))
    answers: list[Answer] = []
    for start in range(0, len(requests), batch_size):
        answers += engine.answer_batch(requests[start : start + batch_size])
        if progress is not None:
            progress(len(answers) - start)
    return [Asked(question, answer, exact_match(after_citations(answer.text), [question.answer])) for (_, question), answer in zip(cases, answers, strict=True)]


def summarise(asked: Sequence[Asked]) -> dict[str, Any]:
    """One row of the table: exact match with its 95 % interval and by kind of question, slots, rate, time to first token."""
    score, low, high = mean_interval([one.exact_match for one in asked])
    kinds = sorted({one.question.kind for one in asked})
    tokens, slots = (sum(one.answer.usage[key] for one in asked) for key in ("context_tokens", "context_slots"))
    return {
        "num_questions": len(asked),
        "exact_match": round(score, 4),
        "interval": [round(low, 4), round(high, 4)],
        "by_kind": {kind: round(mean(one.exact_match for one in asked if one.question.kind == kind), 4) for kind in kinds},
        "prompt_slots": round(mean(one.answer.usage["prompt_slots"] for one in asked), 1),
        "compression_rate": round(tokens / slots, 2) if slots else 1.0,
        "kv_bytes": round(mean(one.answer.usage["kv_bytes"] for one in asked)),
        "ttft_ms": round(1000 * median(one.answer.timings["ttft_s"] for one in asked), 1),
    }


def compare(engine: Refrag, cases: Sequence[tuple[Case, Question]], *, batch_size: int = 1, progress: Progress | None = None) -> dict[str, list[Asked]]:
    """All systems over the same questions; `progress` takes the number of answers just given."""
    names = systems_of(engine)
    return {name: ask_all(engine, cases, SYSTEMS[name], batch_size=batch_size, progress=progress) for name in names}


def systems_of(engine: Refrag) -> list[str]:
    """The learned policy only where the model has a trained one."""
    return [name for name in SYSTEMS if name != "learned policy" or engine.model.has_trained_policy]


def index_cases(model: Any, cases: Sequence[tuple[Case, Question]], folder: Path, *, console: Console) -> tuple[PassageIndex, dict[str, int]]:
    """The passages of all cases in a new index under `folder`, and what `PassageIndex.add` counted."""
    index = PassageIndex.create(folder / "almanac", model, IndexSettings())
    passages = [passage for case, _ in cases for passage in case.passages]
    console.print(f"Indexing {len(passages)} passages of an invented world that the model has never seen …")
    return index, index.add(passages)


def run_demo(model: str | Path = BUNDLED_MODEL, *, num_questions: int = 40, seed: int = 0, device: str = "auto", as_json: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Index the passages of a held-out world, ask, and show one table beside a few answers; returns what it shows.

    Raises InputError for less than one question.
    """
    check_whole("num_questions", num_questions, minimum=1)
    console = console or Console(stderr=True)
    loaded = load_model(model, device=device)
    cases = list(evaluation_cases(num_questions, split="held-out", seed=seed))
    with tempfile.TemporaryDirectory() as folder:
        index, counts = index_cases(loaded, cases, Path(folder), console=console)
        engine = Refrag(loaded, index=index)
        engine.answer(cases[0][1].text, cases[0][0].passages, max_new_tokens=1)  # warm-up, not counted
        console.print(f"{counts['chunks']} chunk vectors stored. Asking {num_questions} questions, 8 competing passages each …")
        with Bar(console=console, disable=console.quiet, transient=True) as bar:
            task = bar.add_task("asking", total=num_questions * len(systems_of(engine)))
            asked = compare(engine, cases, progress=lambda count: bar.advance(task, count))
    report = {"passages": counts["added"], "chunks": counts["chunks"], "systems": {name: summarise(rows) for name, rows in asked.items()}}
    if as_json:
        print(json.dumps(report))  # noqa: T201  data goes to stdout
    else:
        Console().print(_table(report["systems"]))
        for row in _examples(asked):
            console.print(row)
    return report


def _table(systems: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Held-out almanac: one decoder, the same passages")
    table.add_column("system", no_wrap=True)
    for name in ("match", "95 %", "slots", "rate", "TTFT ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in systems.items():
        low, high = row["interval"]
        table.add_row(
            name, f"{row['exact_match']:.2f}", f"{low:.2f}–{high:.2f}", f"{row['prompt_slots']:.0f}", f"{row['compression_rate']:.1f}",
            f"{row['ttft_ms']:.0f}",
        )  # fmt: skip
    return table


def _examples(asked: dict[str, list[Asked]], count: int = 2) -> list[Any]:
    """The first few answers of the last system, with their traces."""
    name, rows = list(asked.items())[-1]
    shown: list[Any] = []
    for one in rows[:count]:
        shown += [f"\n[bold]{one.question.text}[/bold]  answer with {name}: [bold]{one.answer.text}[/bold]  (right: {one.question.answer})", render_trace(one.answer)]
    return shown
