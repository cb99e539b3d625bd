"""Indexing speed and memory: `PassageIndex.add` against the encoder's own forward, and the peak memory of two corpora.

    python benchmarks/indexing.py --encoder-shape roberta-base --out results/indexing-roberta-base.json

Speed: within a round, new passages are added (tokenised, encoded, embedded for retrieval, written), then the bare encoder runs
over as many chunks of the same length at its best batch size. Memory: each corpus is indexed by a process of its own.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

from refrag.config import IndexSettings
from refrag.encoder import fastest_dtype, resolve_device
from refrag.evaluation.latency import compose
from refrag.evaluation.provenance import result, write_result
from refrag.evaluation.settings import EncoderShape
from refrag.evaluation.shapes import random_refrag, vocabulary
from refrag.evaluation.statistics import median_interval, percentile
from refrag.index import PassageIndex
from refrag.model import RefragModel
from refrag.text import Passage, PromptBuilder

BATCH_SIZES = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Arguments:
    """Chunks per second of indexing ÷ those of the encoder's own forward; peak memory of two corpora."""

    encoder_shape: EncoderShape = "roberta-base"
    """Encoder with random weights of the real size."""
    passages: int = 256
    """Passages added a round."""
    passage_tokens: int = 256
    """Tokens a passage."""
    chunk_size: int = 16
    """Tokens a chunk."""
    batch_size: int = 64
    """Passages encoded and written at a time."""
    rounds: int = 7
    """Rounds of add and bare forward."""
    memory_passages: tuple[int, int] = (2_000, 12_000)
    """Sizes of the two corpora whose peak memory is compared; 0 0 leaves that out."""
    seed: int = 0
    """Seed of weights and text."""
    out: Path | None = None
    """JSON file for the result."""
    child: int | None = None
    """For this script's own use: index that many passages and print the peak memory."""


def make_model(arguments: Arguments, encoder_shape: EncoderShape) -> RefragModel:
    """The encoder beside a tiny decoder, whose tokenizer cuts the chunks."""
    device = resolve_device("auto")
    dtype = torch.float32 if encoder_shape == "tiny" else fastest_dtype(device)
    return random_refrag("tiny", encoder_shape, chunk_size=arguments.chunk_size, dtype=dtype, device=device, seed=arguments.seed)


def stream(model: RefragModel, num_tokens: int, seed: int) -> Iterator[Passage]:
    """Endless new passages of num_tokens tokens, made one at a time."""
    builder = PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size)
    words, rng = vocabulary(seed), random.Random(seed)
    number = 0
    while True:
        text = compose(words, num_tokens, rng, lambda text: len(builder.chunk(text).token_ids))
        yield Passage(id=f"p{number}", text=text)
        number += 1


@torch.inference_mode()
def forward_s(model: RefragModel, num_chunks: int, batch_size: int) -> float:
    """Seconds of the bare encoder over chunks of full length (with its two special tokens), nothing around it."""
    batches = [batch_size] * (num_chunks // batch_size) + ([num_chunks % batch_size] if num_chunks % batch_size else [])
    ids = torch.randint(3, len(model.encoder_tokenizer), (batch_size, model.config.chunk_size + 2), device=model.device)
    start = time.perf_counter()
    for size in batches:
        last = model.encoder(input_ids=ids[:size]).last_hidden_state
    last.sum().item()  # waits for the device
    return time.perf_counter() - start


def best_batch_size(model: RefragModel) -> tuple[int, dict[int, float]]:
    """The batch size with the most chunks per second, and what each gave (best of three)."""
    forward_s(model, 64, 64)
    rates = {size: max(512 / forward_s(model, 512, size) for _ in range(3)) for size in BATCH_SIZES}
    return max(rates, key=rates.__getitem__), rates


def measure_speed(arguments: Arguments, folder: Path) -> dict:
    """Rounds of add, bare forward, and the retrieval encoder alone on the same passages."""
    model = make_model(arguments, arguments.encoder_shape)
    index = PassageIndex.create(folder, model, IndexSettings(batch_size=arguments.batch_size))
    source = stream(model, arguments.passage_tokens, arguments.seed)
    size, rates = best_batch_size(model)
    index.add([next(source)])
    seconds: dict[str, list[float]] = {"add": [], "forward": [], "retrieval": []}
    chunks = 0
    for _ in range(arguments.rounds):
        passages = [next(source) for _ in range(arguments.passages)]
        start = time.perf_counter()
        chunks = index.add(passages)["chunks"]
        seconds["add"].append(time.perf_counter() - start)
        seconds["forward"].append(forward_s(model, chunks, size))
        start = time.perf_counter()
        index.retriever.encode_passages(passages)
        seconds["retrieval"].append(time.perf_counter() - start)
    encoder_only = [forward / add for forward, add in zip(seconds["forward"], seconds["add"], strict=True)]
    both = [(forward + own) / add for forward, own, add in zip(seconds["forward"], seconds["retrieval"], seconds["add"], strict=True)]
    return {
        "chunks_a_round": chunks,
        "best_batch_size": size,
        "forward_chunks_per_s": rates,
        "add_chunks_per_s": chunks / percentile(seconds["add"], 0.5),
        "over_encoder_forward": asdict(median_interval(encoder_only)),
        "over_both_encoders": asdict(median_interval(both)),
        "retriever": index.settings.retriever,
        "dtype": str(model.encoder.dtype).removeprefix("torch."),
        "seconds": seconds,
    }


def measure_memory(arguments: Arguments, num_passages: int) -> int:
    """Peak resident bytes of a process that indexes that many streamed passages with a tiny encoder."""
    command = [sys.executable, __file__, "--child", str(num_passages), "--chunk-size", str(arguments.chunk_size)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(finished.stdout.splitlines()[-1])


def child(arguments: Arguments, num_passages: int) -> None:
    """Index a streamed corpus of short passages and print the peak memory in bytes."""
    model = make_model(arguments, "tiny")
    source = stream(model, 48, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        index = PassageIndex.create(Path(folder) / "index", model, IndexSettings(batch_size=arguments.batch_size))
        index.add(next(source) for _ in range(num_passages))
        assert index.count == num_passages
    status = Path("/proc/self/status").read_text()  # getrusage would give the peak of the process that started this one
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024)


def main() -> None:
    """Run both measurements and print the result."""
    arguments = tyro.cli(Arguments)
    if arguments.child is not None:
        child(arguments, arguments.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        values = {"speed": measure_speed(arguments, Path(folder) / "index")}
    if all(arguments.memory_passages):
        values["peak_rss_bytes"] = {str(count): measure_memory(arguments, count) for count in arguments.memory_passages}
    settings = {name: value for name, value in asdict(arguments).items() if name not in ("out", "child")}
    content = result("indexing", settings=settings, values=values, seed=arguments.seed)
    if arguments.out:
        write_result(arguments.out, content)
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
