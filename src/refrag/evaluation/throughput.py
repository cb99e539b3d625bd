"""Tokens a second of REFRAG and of plain RAG when many requests are answered in one batch, from texts in memory, everything included."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from ..config import Budget
from ..engine import Answer, Refrag
from .child import measure_points
from .rounds import System, interleave, percentiles, ratios
from .settings import ThroughputSettings
from .statistics import percentile
from .workload import Draw, IdsInHand, Workload, build_model, make_index

RATIOS = {"full_over_cached": ("full", "cached")}
"""Seconds of plain RAG ÷ seconds of REFRAG for the same requests: how many times as many tokens a second."""


def run(settings: ThroughputSettings) -> dict[str, Any]:
    """Measure every batch size in a process of its own; returns the content of a results file, of kind `throughput`.

    Raises BackendError when no batch size could be measured.
    """
    points = [({"batch_size": size}, (measure, settings, size)) for size in settings.batch_sizes]
    return measure_points("throughput", points, settings=settings)


def measure(settings: ThroughputSettings, batch_size: int) -> dict[str, Any]:
    """One point: seconds and tokens a second of `cached` (chunk vectors read from disk by the batch) and `full`, and their ratio."""
    model = build_model(settings)
    workload = Workload.make(model, settings)
    request = workload.request(settings, new_tokens=settings.new_tokens)
    with make_index(model, workload, settings.index and settings.index / str(batch_size)) as index:
        engines = {"cached": Refrag(model, index=IdsInHand(index)), "full": Refrag(model, cache_chunks=0)}
        requests = {"cached": request, "full": replace(request, policy="all", budget=Budget())}

        def system(name: str) -> System:
            return lambda draws: engines[name].answer_batch([replace(requests[name], passages=draw) for draw in draws])

        systems = {name: system(name) for name in engines}
        samples = interleave(systems, RATIOS, _batches(workload.draws(settings), batch_size), settings)
    found = ratios(samples, RATIOS, settings.tolerance)
    return {
        "systems": {
            name: percentiles(own) | _rates(own.results[-1], percentile(own.seconds, 0.5)) | ({} if own.peak_gpu_bytes is None else {"peak_gpu_bytes": own.peak_gpu_bytes})
            for name, own in samples.items()
        },
        "ratios": found,
        "steady": all(ratio["steady"] for ratio in found.values()),
        "rounds": len(samples["full"].seconds),
    }


def _batches(draws: Iterator[Draw], size: int) -> Iterator[list[Draw]]:
    while True:
        yield list(islice(draws, size))


def _rates(answers: list[Answer], seconds: float) -> dict[str, Any]:
    """Tokens and requests a second, and what the prompts of a batch took."""
    tokens = sum(int(answer.usage["completion_tokens"]) for answer in answers)
    return {
        "tokens_per_s": tokens / seconds,
        "requests_per_s": len(answers) / seconds,
        "new_tokens": tokens,
        "slots": sum(int(answer.usage["prompt_slots"]) for answer in answers),
        "kv_bytes": sum(int(answer.usage["kv_bytes"]) for answer in answers),
        "ttft_s": answers[0].timings["ttft_s"],
        "per_token_s": answers[0].timings["per_token_s"],
    }


def summary(content: Mapping[str, Any]) -> str:
    """The result as a few lines of text."""
    lines = [f"{'batch':>6}{'REFRAG tok/s':>14}{'plain RAG':>12}{'ratio':>8}"]
    for point in content["points"]:
        if "failed" in point:
            lines.append(f"{point['batch_size']:>6}  not measured ({point['failed']})")
            continue
        ratio = point["ratios"]["full_over_cached"]
        rates = [point["systems"][name]["tokens_per_s"] for name in ("cached", "full")]
        lines.append(f"{point['batch_size']:>6}{rates[0]:>14.1f}{rates[1]:>12.1f}{ratio['median']:>8.2f}" + ("" if ratio["steady"] else f"  NOT STEADY after {point['rounds']} rounds"))
    return "\n".join(lines)
