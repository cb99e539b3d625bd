"""Rounds: every system serves the same request once a round, in a shuffled order, until the ratios between them are steady."""

import gc
import logging
import random
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .settings import Rounds
from .statistics import median_interval, percentile

logger = logging.getLogger(__name__)

System = Callable[[Any], Any]
"""Serves one request; what it returns may say how long it took (see `interleave`)."""

Pairs = Mapping[str, tuple[str, str]]
"""Ratios by name: (system above, system below)."""


@dataclass
class Samples:
    """What one system took, a value a round."""

    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    """CPU time of the process, all threads: survives a busy machine better than wall time."""
    results: list[Any] = field(default_factory=list)
    peak_gpu_bytes: int | None = None
    """Most GPU memory allocated during a request, weights included."""


def interleave(
    systems: Mapping[str, System],
    pairs: Pairs,
    requests: Iterator[Any],
    settings: Rounds,
    *,
    seconds: Callable[[Any, float], float] = lambda result, wall: wall,
) -> dict[str, Samples]:
    """Rounds until every ratio of `pairs` is steady, or `settings.max_repeats`; two rounds warm up.

    `seconds`: (what a system returned, wall time) → what counts.
    """
    order = random.Random(settings.seed + 2)
    samples = {name: Samples() for name in systems}
    for _ in range(2):
        request = next(requests)
        for serve in systems.values():
            serve(request)
    with frozen_garbage():
        for number in range(1, settings.max_repeats + 1):
            request = next(requests)
            for name in order.sample(list(systems), len(systems)):
                _time(systems[name], request, samples[name], seconds)
            logger.info("round %d: %s", number, ", ".join(f"{name} {own.seconds[-1]:.4f} s" for name, own in samples.items()))
            if number >= settings.min_repeats and all(ratio["steady"] for ratio in ratios(samples, pairs, settings.tolerance).values()):
                break
    return samples


def _time(serve: System, request: Any, samples: Samples, seconds: Callable[[Any, float], float]) -> None:
    is_gpu = torch.cuda.is_available()
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    synchronise()
    wall, cpu = time.perf_counter(), time.process_time()
    result = serve(request)
    synchronise()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    samples.seconds.append(seconds(result, wall))
    samples.cpu_s.append(cpu)
    samples.results.append(result)
    if is_gpu:
        samples.peak_gpu_bytes = max(samples.peak_gpu_bytes or 0, torch.cuda.max_memory_allocated())


@contextmanager
def frozen_garbage() -> Generator[None]:
    """What was made before the rounds is not searched for garbage during them; what a request makes is."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(samples: Mapping[str, Samples], pairs: Pairs, tolerance: float) -> dict[str, dict[str, Any]]:
    """Per ratio whose systems ran: median within rounds, its 95 % interval, steady or not, and that of CPU time."""
    found = {}
    for name, (above, below) in pairs.items():
        if above not in samples or below not in samples:
            continue
        within = [a / b for a, b in zip(samples[above].seconds, samples[below].seconds, strict=True)]
        cpu = [a / b for a, b in zip(samples[above].cpu_s, samples[below].cpu_s, strict=True) if b > 0]
        middle = median_interval(within)
        found[name] = {
            "median": middle.median,
            "low": middle.low,
            "high": middle.high,
            "steady": middle.is_steady(tolerance),
            "cpu_median": percentile(cpu, 0.5) if cpu else None,
            "rounds": len(within),
        }
    return found


def percentiles(samples: Samples) -> dict[str, Any]:
    """p50 and p95 of the seconds, the median of CPU time, and the samples."""
    return {
        "p50_s": percentile(samples.seconds, 0.5),
        "p95_s": percentile(samples.seconds, 0.95),
        "cpu_median_s": percentile(samples.cpu_s, 0.5),
        "samples_s": [round(value, 6) for value in samples.seconds],
    }
