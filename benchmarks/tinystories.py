"""A real small decoder on real text: how much of a context's benefit its compressed form keeps, at k = 4 and 8.

    python benchmarks/tinystories.py --decoder DIR --data train.txt.gz --eval-data valid.txt.gz --out results/tinystories.json

The decoder (stories260K, 64 dimensions) is trained with a small encoder by the project's own stages: reconstruction, then continual
pre-training with everything trained and a share of the chunks left as tokens (`refrag train …`; skipped where done). Then
log-perplexity of the next tokens by the paper's protocol (`refrag eval perplexity`), in nats a token, on stories that training never
saw: full context, none, truncated to as many slots, compressed, mixed; and `kept` = (none - x) / (none - full). The decoder as it
was before training stands beside it (`before`): its own full, none and truncated.

The files hold stories that end with a line <|endoftext|>.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from ablations import make_encoder, train

from refrag.data.rows import Document
from refrag.evaluation.perplexity import measure
from refrag.evaluation.provenance import result, write_result
from refrag.evaluation.tasks import PerplexitySettings
from refrag.model import RefragModel, load_model

END = "<|endoftext|>"
SHOWN = ("full", "none", "truncated", "refrag", "random@0.1", "perplexity@0.1", "truncated@0.1")


@dataclass(frozen=True)
class Arguments:
    """The share of the context's benefit that compression keeps, on TinyStories."""

    decoder: Path
    """Folder of the decoder."""
    data: Path
    """Stories to train on."""
    eval_data: Path
    """Stories to evaluate on; none of them may be in the data."""
    runs: Path = Path("runs/tinystories")
    """Folder of the trainings."""
    chunk_sizes: tuple[int, ...] = (4, 8)
    context_tokens: int = 128
    """Tokens of context, s."""
    output_tokens: tuple[int, ...] = (16, 64)
    """Tokens scored after it, o."""
    reconstruction_steps: int = 1000
    cpt_steps: int = 3000
    batch_size: int = 32
    learning_rate: float = 3e-3
    """Peak learning rate of reconstruction; CPT takes a third of it."""
    windows: int = 1000
    seed: int = 0
    out: Path | None = None
    """JSON file for the result."""


def stories(path: Path) -> Iterator[str]:
    """The stories of a file."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        for story in file.read().split(END):
            if story.strip():
                yield story.strip()


def as_rows(path: Path, folder: Path) -> Path:
    """The stories as JSON lines, for `refrag train`."""
    rows = folder / f"{path.name.split('.')[0]}.jsonl"
    if not rows.exists():
        rows.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories(path)), encoding="utf-8")
    return rows


def trained(arguments: Arguments, chunk_size: int, encoder: Path) -> Path:
    """The model folder of reconstruction and CPT at one chunk size."""
    name, chunks = f"k{chunk_size}", str(arguments.context_tokens // chunk_size)
    common = [
        "--data", str(as_rows(arguments.data, arguments.runs)), "--eval-data", str(as_rows(arguments.eval_data, arguments.runs)), "--max-chunks", chunks,
        "--batch-size", str(arguments.batch_size), "--optimizer", "muon", "--device", "cpu", "--seed", str(arguments.seed), "--log-every", "50", "--eval-rows", "200",
    ]  # fmt: skip
    fresh = ["--encoder", str(encoder), "--decoder", str(arguments.decoder), "--pooling", "mean", "--projector-width", "256", "--chunk-size", str(chunk_size)]
    steps, rate = arguments.reconstruction_steps, arguments.learning_rate
    train(arguments, f"{name}/reconstruction", ["reconstruction", *fresh, *common, "--num-steps", str(steps), "--save-every", str(steps), "--learning-rate", str(rate)])
    steps, start = arguments.cpt_steps, arguments.runs / name / "reconstruction" / "model"
    outputs = ["--output-tokens", str(max(arguments.output_tokens)), "--mixed-share", "0.5"]
    train(arguments, f"{name}/cpt", ["cpt", "--model", str(start), *common, *outputs, "--num-steps", str(steps), "--save-every", str(steps), "--learning-rate", str(rate / 3)])
    return arguments.runs / name / "cpt" / "model"


def main() -> None:
    """Train what is not trained yet, measure, and write the table."""
    arguments = tyro.cli(Arguments)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    encoder = make_encoder(str(arguments.decoder), arguments.runs / "encoder")
    held_out = [Document(str(number), story) for number, story in enumerate(stories(arguments.eval_data))]
    values: dict[str, Any] = {}
    for size in arguments.chunk_sizes:
        settings = PerplexitySettings(
            context_tokens=arguments.context_tokens, output_tokens=arguments.output_tokens, limit=arguments.windows, batch_size=32, seed=arguments.seed
        )
        before = measure(RefragModel.from_parts(str(encoder), str(arguments.decoder), chunk_size=size, pooling="mean"), held_out, settings)["variants"]
        model = load_model(trained(arguments, size, encoder), device="cpu", dtype="float32")
        values[f"k{size}"] = {**measure(model, held_out, settings), "before": {name: before[name] for name in ("full", "none", "truncated")}}
        for name, entry in [*((f"before {name}", before[name]) for name in ("full", "none", "truncated")), *((name, values[f"k{size}"]["variants"][name]) for name in SHOWN)]:
            numbers = "  ".join(f"P{o} {entry['nats'][str(o)]['mean']:.3f} kept {entry['kept'][str(o)]['mean']:.2f}" for o in arguments.output_tokens)
            print(f"k={size}  {name:<18} {entry['slots']:>4} slots  {numbers}", flush=True)
    shown = {name: value for name, value in asdict(arguments).items() if name not in ("out", "runs", "decoder", "data", "eval_data")}
    if arguments.out:
        write_result(arguments.out, result("tinystories", settings=shown, values=values, seed=arguments.seed))


if __name__ == "__main__":
    main()
