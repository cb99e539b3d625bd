"""Time to first token, from question text and passage ids in hand, and between tokens: REFRAG against the bare decoder and plain RAG.

Systems run interleaved in one process, each once a round in a shuffled order, until the ratios are steady or the rounds run out.
Every request draws other passages of the index. See docs/decisions/0004-latency.md and docs/benchmarks.md.
"""

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ..config import Budget
from ..encoder import encoder_window, tokenize_texts
from ..engine import Answer, Refrag
from ..index import PassageIndex
from ..model import RefragModel
from .child import in_child, measure_points
from .flops import decoder_law, encoder_flops, policy_flops, projector_flops
from .provenance import peak_rss_bytes, result, write_result
from .rounds import Samples, System, interleave, percentiles, ratios
from .settings import LatencySettings
from .statistics import percentile
from .views import interval_words
from .workload import Draw, IdsInHand, Workload, build_model, make_index

logger = logging.getLogger(__name__)

RATIOS = {
    "cached_over_bare": ("cached", "bare"),
    "memory_over_bare": ("memory", "bare"),
    "uncached_over_bare": ("uncached", "bare"),
    "full_over_cached": ("full", "cached"),
    "full_over_memory": ("full", "memory"),
    "full_over_uncached": ("full", "uncached"),
}
"""Ratios of time to first token, where both systems ran; each is the median of the ratios within a round."""

TTIT_RATIOS = {"ttit_cached_over_generate": ("cached", "generate"), "ttit_full_over_cached": ("full", "cached")}
"""Ratios of time between tokens; `generate` is transformers' own on as many slots."""

SHARES = {"reading": ("vectors_s",), "question": ("question_s",), "policy_and_projector": ("sense_s", "project_s")}
"""Parts of a cached request's time to first token: chunk vectors from the index; the question's own vector, where the policy looks at it; the policy and the projector."""


def run(settings: LatencySettings) -> dict[str, Any]:
    """Measure, and write the result to `settings.out` if given.

    Returns the content of a results file: of kind `latency`, or `latency-sweep` where the settings name a sweep.
    Raises InputError when the question tokens cannot hold the template, or the model's positions the prompt.
    """
    if settings.sweep_context or settings.sweep_chunk_size:
        return sweep(settings)
    content = result("latency", settings=settings.portable(), values=measure(settings), seed=settings.seed)
    if settings.out is not None:
        write_result(settings.out, content)
    return content


def sweep(settings: LatencySettings) -> dict[str, Any]:
    """Every context length at every chunk size, each measured in a process of its own; those that fail are marked."""

    def point(context_tokens: int, chunk_size: int) -> LatencySettings:
        index = settings.index and settings.index / f"{context_tokens}-{chunk_size}"
        return replace(settings, context_tokens=context_tokens, chunk_size=chunk_size, sweep_context=(), sweep_chunk_size=(), index=index, out=None)

    points = [
        ({"context_tokens": tokens, "chunk_size": size}, (measure_point, point(tokens, size)))
        for tokens in settings.sweep_context or (settings.context_tokens,)
        for size in settings.sweep_chunk_size or (settings.chunk_size,)
    ]
    return measure_points("latency-sweep", points, settings=settings)


def measure_point(settings: LatencySettings) -> dict[str, Any]:
    """One point of a sweep; a trained model has a chunk size of its own."""
    values = measure(settings)
    return {"chunk_size": values["workload"]["chunk_size"], **values}


def measure(settings: LatencySettings) -> dict[str, Any]:
    """What one result holds: workload, ratios, limits, systems (samples, percentiles, slots, bytes, FLOPs), shares of stages."""
    model = build_model(settings)
    workload = Workload.make(model, settings)
    with make_index(model, workload, settings.index) as index:
        systems = build_systems(model, index, workload, settings)
        work = describe(model, systems["cached"](workload.passages[: settings.num_passages])) | sensing(model, workload, settings)
        sizes = sizes_of(model, work)
        samples = interleave(systems, RATIOS, workload.draws(settings), settings, seconds=_ttft)
        decoding = _measure_decoding(model, index, workload, settings, slots=work["prompt_slots"]) if settings.new_tokens > 1 else {}
        alone = settings.peak_memory and model.device.type == "cpu"  # on a GPU every request says what it allocated
        peaks = _peaks(replace(settings, index=Path(index.path)), list(systems), work["prompt_slots"]) if alone else {}
    found = ratios(samples, RATIOS, settings.tolerance) | _ttit_ratios(decoding, settings)
    return {
        "workload": work,
        "rounds": len(samples["bare"].seconds),
        "steady": all(ratio["steady"] for ratio in found.values()),
        "ratios": found,
        "limits": limits(sizes),
        "shares": {name: _share(samples["cached"].results, parts) for name, parts in SHARES.items()},
        "systems": {name: report(own) | sizes[name] | peaks.get(name, {}) for name, own in samples.items()},
        **({"decoding": {"new_tokens": settings.new_tokens, "systems": {name: percentiles(own) for name, own in decoding.items()}}} if decoding else {}),
        "peak_rss_bytes": peak_rss_bytes(),
    }


# ── the systems ──────────────────────────────────────────────────────────────────────────────────────────────────────


def build_systems(model: RefragModel, index: PassageIndex, workload: Workload, settings: LatencySettings) -> dict[str, System]:
    """What is compared, by name: `cached` and `bare`; `full`, `uncached` and `memory` where asked for."""
    cached = _system("cached", model, index, workload, settings)
    slots = int(cached(workload.passages[: settings.num_passages]).usage["prompt_slots"])
    wanted = {"full": settings.baseline == "full", "uncached": settings.uncached, "memory": settings.in_memory}
    others = {name: _system(name, model, index, workload, settings) for name, is_wanted in wanted.items() if is_wanted}
    return {"cached": cached, "bare": _bare(model, slots)} | others


def _bare(model: RefragModel, slots: int) -> System:
    """The decoder's prefill over so many token ids."""
    token_ids = _random_ids(model, slots)

    def bare(draw: Draw) -> None:
        prefill(model, token_ids)

    return bare


def _random_ids(model: RefragModel, slots: int) -> Int[Tensor, "1 slot"]:
    return torch.randint(3, len(model.tokenizer), (1, slots), device=model.device)


def _system(name: str, model: RefragModel, index: PassageIndex, workload: Workload, settings: LatencySettings, *, new_tokens: int = 1) -> System:
    """One way through the engine: `cached` reads texts and vectors from disk, the others have their texts in memory."""
    request = workload.request(settings, new_tokens=new_tokens)
    if name == "cached":
        in_hand = IdsInHand(index)
        engine = Refrag(model, index=in_hand)

        def cached(draw: Draw) -> Answer:
            in_hand.ids, before = [passage.id for passage in draw], in_hand.ids_read
            answer = engine.answer(request)
            assert settings.policy == "all" or in_hand.ids_read == before + len(draw), "vectors did not come from the index on disk"
            return answer

        return cached
    if name == "full":
        request = replace(request, policy="all", budget=Budget())
    engine = Refrag(model, cache_chunks=1 << 40 if name == "memory" else 0)
    if name == "memory":  # every passage is encoded now, so that no request has to
        engine.vectors.chunk_embeds([engine.builder.build("?", [passage]) for passage in workload.passages], needed=[True] * len(workload.passages))
    return lambda draw: engine.answer(replace(request, passages=draw))


def _ttft(answer: Answer | None, wall: float) -> float:
    return wall if answer is None else answer.timings["ttft_s"]


@torch.inference_mode()
def prefill(model: RefragModel, token_ids: Int[Tensor, "batch slot"]) -> int:
    """The bare decoder: token ids in, key-value cache filled, the first token's id out."""
    logits = model.decoder(input_ids=token_ids, use_cache=True, logits_to_keep=1).logits
    return int(logits[0, -1].argmax())


# ── time between tokens ──────────────────────────────────────────────────────────────────────────────────────────────


class Stamps(BaseStreamer):
    """When the tokens of `generate` came; reading their ids waits for the device. The first stamp is the prompt's."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        value.tolist()
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


@torch.inference_mode()
def plain_generate(model: RefragModel, token_ids: Int[Tensor, "1 slot"], *, new_tokens: int) -> float:
    """transformers' `generate` on token ids: mean seconds of each token after the first."""
    decoder, stamps = copy.copy(model.decoder), Stamps()  # a shallow copy: `generate` would take end tokens from the decoder's own settings
    decoder.generation_config = config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    decoder.generate(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), generation_config=config, streamer=stamps)
    assert len(stamps.times) == new_tokens + 1
    return (stamps.times[-1] - stamps.times[1]) / (new_tokens - 1)


def _measure_decoding(model: RefragModel, index: PassageIndex, workload: Workload, settings: LatencySettings, *, slots: int) -> dict[str, Samples]:
    """Seconds a further token of `cached`, of plain `generate` over as many slots, and of `full` where it is measured."""
    names = ("cached", "full") if settings.baseline == "full" else ("cached",)
    systems = {name: _system(name, model, index, workload, settings, new_tokens=settings.new_tokens) for name in names}
    token_ids = _random_ids(model, slots)
    systems["generate"] = lambda draw: plain_generate(model, token_ids, new_tokens=settings.new_tokens)

    def per_token(result: Answer | float, wall: float) -> float:
        return result.timings["per_token_s"] if isinstance(result, Answer) else result

    return interleave(systems, TTIT_RATIOS, workload.draws(settings), settings, seconds=per_token)


def _ttit_ratios(decoding: Mapping[str, Samples], settings: LatencySettings) -> dict[str, dict[str, Any]]:
    """Without CPU time: that of a whole request holds its prefill too."""
    return {name: own | {"cpu_median": None} for name, own in ratios(decoding, TTIT_RATIOS, settings.tolerance).items()}


# ── what a result holds ──────────────────────────────────────────────────────────────────────────────────────────────


def describe(model: RefragModel, answer: Answer) -> dict[str, Any]:
    """What a request held, by the engine's own counts, and the model's sizes."""
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


def sensing(model: RefragModel, workload: Workload, settings: LatencySettings) -> dict[str, Any]:
    """What the policy looks at: a learned one may read the question, with the encoder."""
    is_learned = settings.policy == "learned"
    reads = settings.policy == "similarity" or (is_learned and bool(getattr(model.policy, "question_aware", False)))
    length = len(tokenize_texts(model.encoder_tokenizer, [workload.question], window=encoder_window(model.encoder, model.encoder_tokenizer))[0]) if reads else 0
    return {"policy": {"name": settings.policy, "learned": is_learned, "question_encoder_tokens": length}}


def sizes_of(model: RefragModel, work: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Per system: slots, bytes of the prompt's key-value cache, and FLOPs with the pairs that causal attention needs (`flops`) and
    with the full square (`flops_counted`). Encoder, projector and a learned policy are counted, and the encoder's reading of the question.
    """
    law, config, chunks = decoder_law(model.decoder.config), model.encoder.config, work["num_chunks"]
    encoding = encoder_flops(config, num_chunks=chunks, chunk_tokens=work["chunk_size"] + model.encoder_tokenizer.num_special_tokens_to_add())
    projecting = projector_flops(model.projector, num_chunks=chunks - work["expanded_chunks"], encoder_width=config.hidden_size)
    asked = work["policy"]["question_encoder_tokens"]
    deciding = encoder_flops(config, num_chunks=1, chunk_tokens=asked) if asked else 0
    if work["policy"]["learned"] and model.policy is not None:
        deciding += policy_flops(model.policy, num_chunks=chunks, encoder_width=config.hidden_size)
    stored = deciding + projecting
    besides = {"cached": stored, "memory": stored, "uncached": encoding + stored, "bare": 0, "full": 0}
    slot_bytes = work["kv_bytes"] // work["prompt_slots"]
    slots = dict.fromkeys(besides, work["prompt_slots"]) | {"full": work["full_slots"]}
    return {
        name: {"slots": slots[name], "kv_bytes": slots[name] * slot_bytes, "flops": law.causal(slots[name]) + more, "flops_counted": law.counted(slots[name]) + more}
        for name, more in besides.items()
    }


def limits(sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The ratios to plain RAG that causal FLOPs allow for this shape and question: operations of `full` ÷ those of each system."""
    return {f"full_over_{name}": sizes["full"]["flops"] / own["flops"] for name, own in sizes.items() if name != "full"}


def report(samples: Samples) -> dict[str, Any]:
    """Percentiles and samples of a system, its stages if it has any, and its GPU memory if it ran on one. Seconds and bytes."""
    gpu = {} if samples.peak_gpu_bytes is None else {"peak_gpu_bytes": samples.peak_gpu_bytes}
    return percentiles(samples) | {"stages_s": _stages([answer for answer in samples.results if answer is not None])} | gpu


def _stages(answers: Sequence[Answer]) -> dict[str, float]:
    """Medians of the stages up to the first token; `other_s` is what lies between them."""
    if not answers:
        return {}
    names = [name for name in answers[0].timings if name not in ("ttft_s", "per_token_s", "total_s")]
    stages = {name: percentile([answer.timings[name] for answer in answers], 0.5) for name in names}
    other = [answer.timings["ttft_s"] - sum(answer.timings[name] for name in names) for answer in answers]
    return stages | {"other_s": percentile(other, 0.5)}


def _share(answers: Sequence[Answer], parts: Sequence[str]) -> float:
    """Median share of some stages in the time to first token."""
    return percentile([sum(answer.timings[name] for name in parts) / answer.timings["ttft_s"] for answer in answers], 0.5)


def _peaks(settings: LatencySettings, names: Sequence[str], slots: int) -> dict[str, dict[str, Any]]:
    """Most resident memory of a process that builds the model and serves three requests of one system, and of the model alone."""
    peaks = {}
    for name in names:
        outcome = in_child(serve_alone, settings, name, slots)
        if outcome.failed:
            logger.warning("peak memory of %s: not measured: %s", name, outcome.failed)
        peaks[name] = {"peak_rss_bytes": None if outcome.failed else outcome.peak_rss_bytes, "model_rss_bytes": outcome.value}
    return peaks


def serve_alone(settings: LatencySettings, name: str, slots: int) -> int | None:
    """Serve three requests of one system from the index in `settings.index`; returns the most resident memory before the first."""
    model = build_model(settings)
    workload = Workload.make(model, settings)
    draws, before = workload.draws(settings), peak_rss_bytes()
    if name == "bare":
        serve = _bare(model, slots)
    else:
        assert settings.index is not None
        serve = _system(name, model, PassageIndex.open(settings.index, model=model), workload, settings)
    for _ in range(3):
        serve(next(draws))
    return before


# ── in words ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def summary(content: Mapping[str, Any]) -> str:
    """The result as a few lines of text; a sweep's points one behind another."""
    if "points" in content:
        return "\n".join(f"{point['context_tokens']:,} context tokens, k = {point['chunk_size']}: {_point(point)}" for point in content["points"])
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
    return "\n".join([*lines, *(_ratio(name, own, content) for name, own in content["ratios"].items()), *_limits(content)])


def _ratio(name: str, own: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    cpu = "" if own["cpu_median"] is None else f", by CPU time {own['cpu_median']:.3f}"
    rounds = own.get("rounds", content["rounds"])
    return f"{name.replace('_', ' ')}: {interval_words(own)}{cpu}" + ("" if own["steady"] else f"  NOT STEADY after {rounds} rounds")


def _limits(content: Mapping[str, Any]) -> list[str]:
    """What the FLOPs allow, beside what was reached."""
    named = {"full_over_cached": "stored vectors", "full_over_uncached": "vectors computed in the request"}
    allowed = [f"{content['limits'][name]:.2f} with {words}" for name, words in named.items() if name in content.get("limits", {})]
    return [f"causal FLOPs of this shape and question allow plain RAG ÷ REFRAG of {', '.join(allowed)}"] if allowed else []


def _point(point: Mapping[str, Any]) -> str:
    if "failed" in point:
        return f"not measured ({point['failed']})"
    shown = [f"{name.replace('_', ' ')} {own['median']:.2f}" + ("" if own["steady"] else " (not steady)") for name, own in point["ratios"].items()]
    return ", ".join([*shown, f"limit {point['limits']['full_over_cached']:.2f}"])

