"""From the engine's threads to a `Backend`, which lives in an event loop: the same call as `decoding.decode`."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import zip_longest

from jaxtyping import Float
from torch import Tensor

from ..config import GenerationSettings
from ..layout import MixedInputs
from .backend import Backend
from .decoding import StepClock, TextFeed

POLL_S = 0.05
"""How often a cancelled answer is noticed while no token comes."""


class Bridge:
    """Decodes with a backend, from any thread; the backend's event loop runs in a thread of its own."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name=f"refrag-{backend.name}").start()

    def decode(
        self,
        inputs: MixedInputs,
        rows: Sequence[TextFeed],
        *,
        settings: GenerationSettings,
        seeds: Sequence[int],
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> StepClock:
        """Fill `rows` (one per batch row), each by a request of its own, all at the same time; returns when every row has ended.

        Step i of the clock is when the last row had its token i. Raises what the backend raises for the first row that fails.
        """
        prompts = [embeds[mask.bool()] for embeds, mask in zip(inputs.inputs_embeds, inputs.attention_mask, strict=True)]
        stamps: list[list[float]] = [[] for _ in rows]
        work = [self._row(*parts, is_cancelled) for parts in zip(prompts, rows, [replace(settings, seed=seed) for seed in seeds], stamps, strict=True)]
        future = asyncio.run_coroutine_threadsafe(_together(work, is_cancelled), self._loop)
        try:
            future.result()
        finally:
            future.cancel()  # nothing happens to a finished one; else this thread was interrupted
        for row in rows:
            row.close()
        clock = StepClock(rows)
        clock.stamps = [max(step) for step in zip_longest(*stamps, fillvalue=0.0)] or [time.perf_counter()]
        return clock

    async def _row(
        self, prompt: Float[Tensor, "slot hidden"], row: TextFeed, settings: GenerationSettings, stamps: list[float], is_cancelled: Callable[[], bool]
    ) -> None:
        async with aclosing(self.backend.decode(prompt, settings)) as runs:
            async for token_ids in runs:
                stamps += [time.perf_counter()] * len(token_ids)
                for token_id in token_ids:
                    row.push(token_id)
                if row.finished or is_cancelled():
                    return


async def _together(work: Sequence, is_cancelled: Callable[[], bool]) -> None:
    """All of the work at once; the first error, or a cancellation, ends the rest."""
    tasks = {asyncio.ensure_future(own) for own in work}
    pending = tasks
    try:
        while pending and not is_cancelled():
            done, pending = await asyncio.wait(pending, timeout=POLL_S, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
