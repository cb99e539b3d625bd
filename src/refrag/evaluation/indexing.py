"""Indexing speed and memory: `PassageIndex.add` against the encoder's own forward, and the peak memory of two corpora.

Speed: within a round, new passages are added (tokenised, encoded, embedded for retrieval, written), then the bare encoder runs
over as many chunks of the same length at its best batch size. Memory: each corpus is indexed by a process of its own.
"""

import logging
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..config import IndexSettings
from ..encoder import fastest_dtype, resolve_device
from ..index import PassageIndex
from ..model import RefragModel
from ..text import Passage, PromptBuilder
from .child import in_child
from .provenance import result, write_result
from .rounds import frozen_garbage
from .settings import EncoderShape, IndexingSettings
from .shapes import random_refrag, vocabulary
from .statistics import median_interval, percentile
from .views import interval_words
from .workload import compose

logger = logging.getLogger(__name__)

BATCH_SIZES = (8, 16, 32, 64, 128, 256, 512)


def run(settings: IndexingSettings) -> dict[str, Any]:
    """Measure, and write the result to `settings.out` if given; returns the content of a results file, of kind `indexing`."""
    with tempfile.TemporaryDirectory(prefix="refrag-bench-") as folder:
        values: dict[str, Any] = {"speed": measure_speed(settings, Path(folder) / "index")}
    if all(settings.memory_passages):
        outcomes = {str(count): in_child(index_alone, settings, count) for count in settings.memory_passages}
        values["peak_rss_bytes"] = {count: own.peak_rss_bytes for count, own in outcomes.items() if not own.failed}
        values["failed"] = {count: own.failed for count, own in outcomes.items() if own.failed}
        for count, reason in values["failed"].items():
            logger.warning("memory of %s passages: not measured: %s", count, reason)
    content = result("indexing", settings={name: value for name, value in asdict(settings).items() if name != "out"}, values=values, seed=settings.seed)
    if settings.out is not None:
        write_result(settings.out, content)
    return content


def make_model(settings: IndexingSettings, encoder_shape: EncoderShape) -> RefragModel:
    """The encoder beside a tiny decoder, whose tokenizer cuts the chunks."""
    device = resolve_device("auto")
    dtype = torch.float32 if encoder_shape == "tiny" else fastest_dtype(device)
    return random_refrag("tiny", encoder_shape, chunk_size=settings.chunk_size, dtype=dtype, device=device, seed=settings.seed)


def stream(model: RefragModel, num_tokens: int, *, seed: int) -> Iterator[Passage]:
    """Endless new passages of num_tokens tokens, made one at a time."""
    builder = PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size)
    words, rng = vocabulary(seed), random.Random(seed)
    number = 0
    while True:
        text = compose(words, num_tokens, rng, lambda text: len(builder.chunk(text).token_ids))
        yield Passage(id=f"p{number}", text=text)
        number += 1


@torch.inference_mode()
def forward_s(model: RefragModel, num_chunks: int, *, batch_size: int) -> float:
    """Seconds of the bare encoder over chunks of full length (with its two special tokens), nothing around it."""
    batches = [batch_size] * (num_chunks // batch_size) + ([num_chunks % batch_size] if num_chunks % batch_size else [])
    ids = torch.randint(3, len(model.encoder_tokenizer), (batch_size, model.config.chunk_size + 2), device=model.device)
    start = time.perf_counter()
    for size in batches:
        last = model.encoder(input_ids=ids[:size]).last_hidden_state
    last.sum().item()  # waits for the device
    return time.perf_counter() - start


def best_batch_size(model: RefragModel) -> tuple[int, dict[int, float]]:
    """The batch size with the most chunks per second, and what each gave (best of two)."""
    forward_s(model, 64, batch_size=64)
    rates = {size: max(512 / forward_s(model, 512, batch_size=size) for _ in range(2)) for size in BATCH_SIZES}
    return max(rates, key=rates.__getitem__), rates


def measure_speed(settings: IndexingSettings, folder: Path) -> dict[str, Any]:
    """Rounds of add, bare forward, and the retrieval encoder alone on the same passages."""
    model = make_model(settings, settings.encoder_shape)
    index = PassageIndex.create(folder, model, IndexSettings(batch_size=settings.batch_size))
    source = stream(model, settings.passage_tokens, seed=settings.seed)
    size, rates = best_batch_size(model)
    index.add([next(source)])
    seconds: dict[str, list[float]] = {"add": [], "forward": [], "retrieval": []}
    chunks = 0
    with frozen_garbage():
        for number in range(1, settings.rounds + 1):
            passages = [next(source) for _ in range(settings.passages)]
            start = time.perf_counter()
            chunks = index.add(passages)["chunks"]
            seconds["add"].append(time.perf_counter() - start)
            seconds["forward"].append(forward_s(model, chunks, batch_size=size))
            start = time.perf_counter()
            index.retriever.encode_passages(passages)
            seconds["retrieval"].append(time.perf_counter() - start)
            logger.info("round %d: %s", number, ", ".join(f"{name} {own[-1]:.3f} s" for name, own in seconds.items()))
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


def index_alone(settings: IndexingSettings, num_passages: int) -> None:
    """Index that many streamed passages of 48 tokens with a tiny encoder: what is left to see is the index's own memory."""
    model = make_model(settings, "tiny")
    source = stream(model, 48, seed=settings.seed)
    with tempfile.TemporaryDirectory(prefix="refrag-bench-") as folder:
        index = PassageIndex.create(Path(folder) / "index", model, IndexSettings(batch_size=settings.batch_size))
        index.add(next(source) for _ in range(num_passages))
        assert index.count == num_passages


def summary(content: Mapping[str, Any]) -> str:
    """The result as a few lines of text."""
    speed = content["speed"]
    named = {"over_encoder_forward": "the encoder's own best forward", "over_both_encoders": "it and the retrieval encoder together"}
    lines = [f"{speed['add_chunks_per_s']:.1f} chunks per second added"]
    lines += [f"{interval_words(speed[name])} of {words}" for name, words in named.items()]
    lines += [f"{int(count):,} passages: peak memory {peak / 2**20:,.0f} MiB" for count, peak in content.get("peak_rss_bytes", {}).items()]
    return "\n".join(lines)

