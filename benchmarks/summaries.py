"""Summaries from compressed passages, in the shape of the paper's table 21: ROUGE-1, -2 and -L at equal decoder slots.

    python benchmarks/summaries.py --out results/summaries.json

Held-out almanac documents of eight passages (about 600 tokens); a summary has one sentence a passage: of the facts that the passage states, the one
whose relation comes first in the almanac's list. The bundled model learns that by `refrag train sft` on documents of the training names (skipped where done),
and `refrag eval qa --rouge` compares, with the weights that came out: all passages as text, text cut to the slots of the compressed ones, and the passages compressed.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from refrag.config import BUNDLED_MODEL
from refrag.demo.almanac import Split, make_case
from refrag.demo.forms import RELATIONS

QUESTION = "Summarise the passages."
SHARES = ("--full-share", "0.25", "--none-share", "0.45", "--gold-share", "0")


@dataclass(frozen=True)
class Arguments:
    """ROUGE of summaries: full text, truncated text, compressed passages."""

    model: str = BUNDLED_MODEL
    """Model to train on."""
    runs: Path = Path("runs/summaries")
    """Folder of the documents and of the training."""
    train_documents: int = 2000
    num_documents: int = 1000
    """Held-out documents."""
    num_passages: int = 8
    """Passages a document."""
    num_steps: int = 500
    batch_size: int = 4
    learning_rate: float = 3e-4
    systems: tuple[str, ...] = ("plain", "truncated", "truncated@0.1", "none", "learned@0.1", "no-passages")
    seed: int = 0
    out: Path = Path("results/summaries.json")
    """JSON file for the result."""


def documents(count: int, *, split: Split, num_passages: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows `{id, question, answers: [summary], passages}`, a pure function of the arguments."""
    for number in range(count):
        case = make_case(f"summary-{seed}-{number}", split=split, num_passages=num_passages)
        passages = [{"id": passage.id, "title": passage.title, "text": passage.text} for passage in case.passages]
        facts = {place: {question.relation: question.answer for question in case.questions if question.gold == (place,)} for place in range(len(passages))}
        summary = " ".join(sentence(passage.title, facts[place]) for place, passage in enumerate(case.passages))
        yield {"id": str(number), "question": QUESTION, "answers": [summary], "passages": passages}


def sentence(subject: str, facts: dict[str, str]) -> str:
    """The first of a passage's facts, told in the first form of its relation."""
    relation, told = next((name, own) for kind in RELATIONS.values() if facts.keys() <= kind.keys() for name, own in kind.items() if name in facts)
    told_fact = told.statements[0].replace("{s}", subject).replace("{a}", facts[relation])
    return told_fact[0].upper() + told_fact[1:]


def write_documents(path: Path, count: int, **how: Any) -> Path:
    """`documents` as JSON lines, unless they are there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in documents(count, **how)), encoding="utf-8")
    return path


def refrag(*command: object) -> None:
    """One command of the command line, in a process of its own."""
    subprocess.run([sys.executable, "-m", "refrag.cli", *map(str, command)], check=True)


def main() -> None:
    arguments = tyro.cli(Arguments)
    how = {"num_passages": arguments.num_passages, "seed": arguments.seed}
    train = write_documents(arguments.runs / f"train-{arguments.train_documents}.jsonl", arguments.train_documents, split="train", **how)
    held_out = write_documents(arguments.runs / f"held-out-{arguments.num_documents}.jsonl", arguments.num_documents, split="held-out", **how)
    refrag(
        "train", "sft", "--model", arguments.model, "--data", train, "--output-dir", arguments.runs / "sft", "--keep-order", "--num-passages", arguments.num_passages,
        "--num-steps", arguments.num_steps, "--batch-size", arguments.batch_size, "--learning-rate", arguments.learning_rate, "--max-answer-tokens", 256, "--eval-rows", 40,
        "--save-every", 100, "--seed", arguments.seed, *SHARES,
    )  # fmt: skip
    if not (arguments.runs / "sft" / "model").exists():
        raise SystemExit("The training was stopped: the same command goes on with it.")
    refrag(
        "eval", "qa", "--model", arguments.runs / "sft" / "model", "--data", held_out, "--num-passages", arguments.num_passages, "--systems", *arguments.systems,
        "--rouge", "--max-new-tokens", 256, "--timed-requests", 0, "--num-examples", 1, "--seed", arguments.seed, "--out", arguments.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
