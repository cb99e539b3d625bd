"""Time to first token, from question text and passage ids in hand: REFRAG against the bare decoder's prefill on as many slots.

Systems run interleaved in one process, each once a round in a shuffled order, until the ratios are steady or the rounds run out.
Every request draws other passages of the index. See docs/decisions/0004-latency.md.
"""

import gc
import logging
import random
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..config import Budget, GenerationSettings, IndexSettings
from ..encoder import resolve_device
from ..engine import Answer, Refrag, Request
from ..errors import InputError
from ..index import Hit, PassageIndex
from ..model import RefragModel, load_model
from ..text import Passage, PromptBuilder
from .provenance import peak_rss_bytes, result, write_result
from .settings import LatencySettings
from .shapes import random_refrag, vocabulary
from .statistics import median_interval, percentile

logger = logging.getLogger(__name__)

RATIOS = {
    "cached_over_bare": ("cached", "bare"),
    "uncached_over_bare": ("uncached", "bare"),
    "full_over_cached": ("full", "cached"),
    "full_over_uncached": ("full", "uncached"),
}
"""Ratios reported, where both systems ran; each is the median of the ratios within a round."""


@dataclass
class Samples:
    """What one system took, a value a round."""

    ttft_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """CPU time of the process, all threads: survives a busy machine better than wall time."""
    answers: list[Answer] = field(default_factory=list)


Draw = list[Passage]
"""The passages of one request."""

System = Callable[[Draw], Answer | None]
"""Serves one request up to its first token; returns the answer, or None for the bare decoder."""


def run(settings: LatencySettings) -> dict[str, Any]:
    """Measure, and write the result to `settings.out` if given.

    Returns the content of a results file: settings, workload, systems (samples and percentiles), ratios, stages, provenance.
    Raises InputError when the question tokens cannot hold the template, or the model's positions the prompt.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model = build_model(settings)
    with _index_folder(settings) as folder:
        workload = Workload.make(model, settings)
        index = PassageIndex.create(folder, model, IndexSettings())
        logger.info("indexing %d passages", len(workload.passages))
        index.add(workload.passages)
        samples = measure(build_systems(model, index, workload, settings), workload, settings)
    values = {"workload": describe(model, samples), **report(samples, settings)}
    content = result("latency", settings=_portable(settings), values=values, seed=settings.seed)
    if settings.out is not None:
        write_result(settings.out, content)
    return content


def build_model(settings: LatencySettings) -> RefragModel:
    """The model named in the settings, or one of the shape with random weights."""
    if settings.model is not None:
        return load_model(settings.model, device=settings.device, dtype=settings.dtype)
    device = resolve_device(settings.device)
    dtype = torch.bfloat16 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    logger.info("building %s with random weights", settings.shape)
    return random_refrag(settings.shape, settings.encoder_shape, chunk_size=settings.chunk_size, dtype=dtype, device=device, seed=settings.seed)


@dataclass(frozen=True)
class Workload:
    """Passages of equal length and a question, in tokens of the model's own tokenizer."""

    passages: list[Passage]
    question: str

    @classmethod
    def make(cls, model: RefragModel, settings: LatencySettings) -> "Workload":
        """Text of random words: each passage has context_tokens / num_passages tokens, a prompt question_tokens besides."""
        builder = PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size)
        rng = random.Random(settings.seed)
        words = vocabulary(settings.seed)
        size = settings.context_tokens // settings.num_passages

        def length(text: str) -> int:
            return len(builder.chunk(text).token_ids)

        texts = [compose(words, size, rng, length) for _ in range(settings.index_passages)]
        passages = [Passage(id=f"p{number}", text=text) for number, text in enumerate(texts)]
        request = passages[: settings.num_passages]

        def uncompressed(question: str) -> int:
            prompt = builder.build(question, request)
            return len(prompt.token_ids()) - sum(len(chunk.token_ids) for chunk in prompt.chunks)

        if (least := uncompressed("?")) > settings.question_tokens:
            raise InputError(
                f"question_tokens must hold the template and the numbers of {settings.num_passages} passages, {least} tokens, "
                f"was {settings.question_tokens}: try {least + 32}, or a smaller num_passages."
            )
        return cls(passages, compose(words, settings.question_tokens, rng, uncompressed))

    def draws(self, settings: LatencySettings) -> Iterator[Draw]:
        """Endless draws of num_passages different passages."""
        rng = random.Random(settings.seed + 1)
        while True:
            yield rng.sample(self.passages, settings.num_passages)


def compose(words: Sequence[str], num_tokens: int, rng: random.Random, length: Callable[[str], int]) -> str:
    """Random words up to `length(text)` of num_tokens, or the nearest below that whole words reach."""
    chosen = [rng.choice(words)]
    while (missing := num_tokens - length(" ".join(chosen))) > 0:
        chosen += rng.choices(words, k=max(1, missing // 4))
    while len(chosen) > 1 and length(" ".join(chosen)) > num_tokens:
        chosen.pop()
    return " ".join(chosen)


class IdsInHand:
    """An index whose search is done: a request holds passage ids; texts and vectors are read from disk by the request."""

    def __init__(self, index: PassageIndex) -> None:
        self.index, self.model = index, index.model
        self.ids: list[str] = []
        self.ids_read = 0

    def search(self, question: str, **how: Any) -> list[Hit]:
        """The passages of the ids, read by id."""
        found = self.index.passages(self.ids)
        return [Hit(found[identity], 1.0) for identity in self.ids]

    def stored(self, ids: Sequence[str]) -> dict[str, Any]:
        """Their texts and vectors, read by id."""
        self.ids_read += len(ids)
        return self.index.stored(ids)


def build_systems(model: RefragModel, index: PassageIndex, workload: Workload, settings: LatencySettings) -> dict[str, System]:
    """What is compared, by name: `cached` and `bare`; `full` and `uncached` where asked for."""
    in_hand = IdsInHand(index)
    cached_engine, uncached_engine = Refrag(model, index=in_hand), Refrag(model, cache_chunks=0)
    base = Request(
        workload.question,
        top_k=settings.num_passages,
        policy=settings.policy,
        budget=Budget() if settings.policy in ("none", "all") else Budget(expand_fraction=settings.expand_fraction),
        generation=GenerationSettings(max_new_tokens=1, seed=settings.seed),
    )

    def cached(draw: Draw) -> Answer:
        in_hand.ids, before = [passage.id for passage in draw], in_hand.ids_read
        answer = cached_engine.answer(base)
        assert settings.policy == "all" or in_hand.ids_read == before + len(draw), "vectors did not come from the index on disk"
        return answer

    def full(draw: Draw) -> Answer:
        return uncached_engine.answer(replace(base, passages=draw, policy="all", budget=Budget()))

    def uncached(draw: Draw) -> Answer:
        return uncached_engine.answer(replace(base, passages=draw))

    slots = int(cached(workload.passages[: settings.num_passages]).usage["prompt_slots"])
    token_ids = torch.randint(3, len(model.tokenizer), (1, slots), device=model.device)

    def bare(draw: Draw) -> None:
        prefill(model, token_ids)

    systems: dict[str, System] = {"cached": cached, "bare": bare}
    systems |= {"full": full} if settings.baseline == "full" else {}
    return systems | ({"uncached": uncached} if settings.uncached else {})


@torch.inference_mode()
def prefill(model: RefragModel, token_ids: torch.Tensor) -> int:
    """The bare decoder: token ids in, key-value cache filled, the first token's id out."""
    logits = model.decoder(input_ids=token_ids, use_cache=True, logits_to_keep=1).logits
    return int(logits[0, -1].argmax())


def measure(systems: dict[str, System], workload: Workload, settings: LatencySettings) -> dict[str, Samples]:
    """Rounds of every system on one request, until every ratio is steady; two rounds warm up."""
    draws = workload.draws(settings)
    order = random.Random(settings.seed + 2)
    samples = {name: Samples() for name in systems}
    for _ in range(2):
        draw = next(draws)
        for serve in systems.values():
            serve(draw)
    with _frozen_garbage():
        for number in range(1, settings.max_repeats + 1):
            draw = next(draws)
            for name in order.sample(list(systems), len(systems)):
                _time(systems[name], draw, samples[name])
            logger.info("round %d: %s", number, ", ".join(f"{name} {own.ttft_s[-1]:.4f} s" for name, own in samples.items()))
            if number >= settings.min_repeats and all(ratio["steady"] for ratio in ratios(samples, settings.tolerance).values()):
                break
    return samples


def _time(serve: System, draw: Draw, samples: Samples) -> None:
    _synchronise()
    wall, cpu = time.perf_counter(), time.process_time()
    answer = serve(draw)
    _synchronise()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    samples.ttft_s.append(wall if answer is None else answer.timings["ttft_s"])
    samples.cpu_s.append(cpu)
    if answer is not None:
        samples.answers.append(answer)


@contextmanager
def _frozen_garbage() -> Generator[None]:
    """What was made before the rounds is not searched for garbage during them; what a request makes is."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(samples: dict[str, Samples], tolerance: float) -> dict[str, dict[str, Any]]:
    """Per ratio of RATIOS whose systems ran: median within rounds, its 95 % interval, steady or not, and that of CPU time."""
    found = {}
    for name, (above, below) in RATIOS.items():
        if above not in samples or below not in samples:
            continue
        within = [a / b for a, b in zip(samples[above].ttft_s, samples[below].ttft_s, strict=True)]
        cpu = [a / b for a, b in zip(samples[above].cpu_s, samples[below].cpu_s, strict=True)]
        middle = median_interval(within)
        found[name] = {
            "median": middle.median,
            "low": middle.low,
            "high": middle.high,
            "steady": middle.is_steady(tolerance),
            "cpu_median": percentile(cpu, 0.5),
        }
    return found


def report(samples: dict[str, Samples], settings: LatencySettings) -> dict[str, Any]:
    """Ratios, percentiles and samples of every system, and the stages of those that have any. Seconds."""
    summaries = {
        name: {
            "p50_s": percentile(own.ttft_s, 0.5),
            "p95_s": percentile(own.ttft_s, 0.95),
            "cpu_median_s": percentile(own.cpu_s, 0.5),
            "stages_s": _stages(own.answers),
            "samples_s": [round(value, 6) for value in own.ttft_s],
        }
        for name, own in samples.items()
    }
    found = ratios(samples, settings.tolerance)
    return {
        "rounds": len(samples["bare"].ttft_s),
        "steady": all(ratio["steady"] for ratio in found.values()),
        "ratios": found,
        "systems": summaries,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _stages(answers: Sequence[Answer]) -> dict[str, float]:
    """Medians of the stages up to the first token; `other_s` is what lies between them."""
    if not answers:
        return {}
    names = [name for name in answers[0].timings if name not in ("ttft_s", "per_token_s", "total_s")]
    stages = {name: percentile([answer.timings[name] for answer in answers], 0.5) for name in names}
    other = [answer.timings["ttft_s"] - sum(answer.timings[name] for name in names) for answer in answers]
    return stages | {"other_s": percentile(other, 0.5)}


def describe(model: RefragModel, samples: dict[str, Samples]) -> dict[str, Any]:
    """What a request held, by the engine's own counts, and the model's sizes."""
    answer = samples["cached"].answers[-1]
    decoder = model.decoder.config.get_text_config()
    counted = ("context_tokens", "context_slots", "prompt_slots", "num_chunks", "expanded_chunks", "compression_rate", "kv_bytes")
    return {
        **{name: answer.usage[name] for name in counted},
        "full_slots": answer.full_slots,
        "chunk_size": model.config.chunk_size,
        "decoder": {"layers": decoder.num_hidden_layers, "width": decoder.hidden_size, "parameters": _parameters(model.decoder)},
        "encoder": {"layers": model.encoder.config.num_hidden_layers, "width": model.encoder.config.hidden_size, "parameters": _parameters(model.encoder)},
        "dtype": str(model.decoder.dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _portable(settings: LatencySettings) -> dict[str, Any]:
    """The settings without this machine's folders."""
    return {name: value for name, value in asdict(settings).items() if name not in ("index", "out")}


@contextmanager
def _index_folder(settings: LatencySettings) -> Generator[Path]:
    """The folder given, or a temporary one that is removed afterwards."""
    if settings.index is not None:
        yield settings.index
        return
    with tempfile.TemporaryDirectory(prefix="refrag-bench-") as folder:
        yield Path(folder) / "index"


def summary(content: dict[str, Any]) -> str:
    """The result as a few lines of text."""
    work = content["workload"]
    lines = [
        f"{work['context_tokens']:,} context tokens in {work['context_slots']} slots (rate {work['compression_rate']:.2f}), "
        f"{work['prompt_slots']} slots in all against {work['full_slots']:,}; KV cache {work['kv_bytes'] / 2**20:.1f} MiB",
        f"{'system':<10}{'p50 ms':>10}{'p95 ms':>10}{'CPU ms':>10}",
    ]
    lines += [
        f"{name:<10}{own['p50_s'] * 1e3:>10.1f}{own['p95_s'] * 1e3:>10.1f}{own['cpu_median_s'] * 1e3:>10.1f}"
        for name, own in content["systems"].items()
    ]
    stages = content["systems"]["cached"]["stages_s"]
    lines.append("cached, stage by stage (ms): " + ", ".join(f"{name.removesuffix('_s')} {value * 1e3:.2f}" for name, value in stages.items()))
    lines += [
        f"{name.replace('_', ' ')}: {own['median']:.3f} [{own['low']:.3f}, {own['high']:.3f}], by CPU time {own['cpu_median']:.3f}"
        + ("" if own["steady"] else f"  NOT STEADY after {content['rounds']} rounds")
        for name, own in content["ratios"].items()
    ]
    return "\n".join(lines)
