"""The backend in this process: prompts that are decoded at the same time share forwards, and join and leave between steps.

`RowBatch` is the arithmetic: rows over one cache, right-aligned, so that a shorter row begins with padding that nobody sees.
`InProcessBackend` is the loop around it. What each row must give is what `decoding.decode` gives for it alone.
"""

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from ..config import GenerationSettings
from ..errors import BackendError
from .decoding import processors
from .devices import backend_errors

log = logging.getLogger(__name__)

T = TypeVar("T")

SHARED_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers whose cache is keys and values alone, so that rows can be put side by side."""
ROTARY_OF_LENGTH = {"dynamic", "longrope"}
"""Rotary embeddings that depend on the longest row of a batch: rows would disturb each other."""


@dataclass(eq=False)
class Row:
    """One prompt being decoded."""

    prompt_embeds: Float[Tensor, "slot hidden"] | None
    """None once it is in the cache."""
    settings: GenerationSettings
    token_ids: list[int] = field(default_factory=list)
    cancelled: bool = False
    """Set by the reader: the row leaves before the next step."""
    tokens: asyncio.Queue[int | BackendError | None] = field(default_factory=asyncio.Queue)
    """For the reader: each token; at the end None, or the error."""

    def __post_init__(self) -> None:
        assert self.prompt_embeds is not None
        self.num_slots = len(self.prompt_embeds) + self.settings.max_new_tokens
        """Most slots it can come to take."""
        self.processors: Any = processors(self.settings, [self.settings.seed])


@dataclass(frozen=True)
class Prefilled:
    """Rows whose prompts are in a cache of their own, each with its first token."""

    rows: list[Row]
    cache: Any
    mask: Int[Tensor, "row slot"]


class RowBatch:
    """Rows that share the forwards of one decoder. `prefill` touches nothing of it and may run beside the rest, which one worker calls."""

    def __init__(self, decoder: Any, end_ids: frozenset[int]) -> None:
        self.decoder = decoder
        self.end_ids = end_ids
        self.rows: list[Row] = []
        self.can_share = _can_share(decoder)
        self._cache: Any = None
        self._mask: Int[Tensor, "row slot"] = torch.zeros(0, 0, dtype=torch.long)
        accepted = inspect.signature(decoder.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @torch.inference_mode()
    def prefill(self, newcomers: Sequence[Row]) -> Prefilled:
        """Reads the prompts of `newcomers` together and gives each its first token."""
        prompts = [row.prompt_embeds for row in newcomers if row.prompt_embeds is not None]
        width = max(map(len, prompts))
        embeds = torch.stack([F.pad(prompt, (0, 0, width - len(prompt), 0)) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=embeds.device)
        cache = DynamicCache() if self.can_share else DynamicCache(config=self.decoder.config)
        logits = self._forward({"inputs_embeds": embeds}, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        for row in newcomers:
            row.prompt_embeds = None
        self._choose(newcomers, logits)
        return Prefilled(list(newcomers), cache, mask)

    @torch.inference_mode()
    def join(self, prefilled: Prefilled) -> None:
        """Puts rows beside those that run; rows that are over, with one token, leave at once."""
        self._drop()
        mask = prefilled.mask
        if self.rows:
            _append(self._cache, prefilled.cache)
            mask = torch.cat([_padded(self._mask, mask.shape[1], dim=1), _padded(mask, self._mask.shape[1], dim=1)])
        else:
            self._cache = prefilled.cache
        self.rows, self._mask = [*self.rows, *prefilled.rows], mask
        self._drop()

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Gives every row its next token, those that were cancelled leave first. Returns the rows that got one."""
        self._drop()
        rows = self.rows
        if rows:
            device = self._mask.device
            last = torch.tensor([[row.token_ids[-1]] for row in rows], device=device)
            positions = self._mask.sum(1, keepdim=True)
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(rows), 1)], dim=1)
            self._choose(rows, self._forward({"input_ids": last}, self._mask, positions, self._cache))
            self._drop()
        return rows

    def clear(self) -> list[Row]:
        """Empties the batch, whatever state it is in. Returns the rows that were in it."""
        rows, self.rows, self._cache = self.rows, [], None
        return rows

    def is_over(self, row: Row) -> bool:
        """It has all its tokens, or nobody reads them."""
        ids = row.token_ids
        return row.cancelled or len(ids) >= row.settings.max_new_tokens or (bool(ids) and ids[-1] in self.end_ids)

    def _forward(self, inputs: dict[str, Tensor], mask: Int[Tensor, "row slot"], positions: Int[Tensor, "row new"], cache: Any) -> Float[Tensor, "row vocab"]:
        places = {"position_ids": positions} if self._takes_positions else {}
        output = self.decoder(**inputs, **places, **self._options, attention_mask=mask, past_key_values=cache, use_cache=True)
        return output.logits[:, -1].float()

    def _choose(self, rows: Sequence[Row], logits: Float[Tensor, "row vocab"]) -> None:
        """Each row's next token by its own settings: its logits pass through its processors, then the largest is taken."""
        for number, row in enumerate(rows):
            if row.processors:
                own = torch.tensor([row.token_ids], dtype=torch.long, device=logits.device)
                logits[number] = row.processors(own, logits[number : number + 1].clone())[0]
        for row, token_id in zip(rows, logits.argmax(-1).tolist(), strict=True):
            row.token_ids.append(token_id)

    def _drop(self) -> None:
        """Rows that are over leave, and columns that only they needed."""
        kept = [number for number, row in enumerate(self.rows) if not self.is_over(row)]
        if len(kept) == len(self.rows):
            return
        if not kept:
            self.clear()
            return
        index = torch.tensor(kept, device=self._mask.device)
        mask = self._mask[index]
        first = int(mask.any(0).nonzero()[0])
        _replace(self._cache, lambda states, _: states.index_select(0, index.to(states.device))[:, :, first:])
        self.rows, self._mask = [self.rows[number] for number in kept], mask[:, first:]


def _can_share(decoder: Any) -> bool:
    """Whether rows of this decoder can share a cache without changing each other's tokens."""
    config = decoder.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    rotary = getattr(config, "rope_parameters", None) or {}
    types = {own.get("rope_type") for own in (rotary, *rotary.values()) if isinstance(own, dict)}
    return kinds <= SHARED_LAYERS and not types & ROTARY_OF_LENGTH


def _padded(states: Tensor, length: int, *, dim: int) -> Tensor:
    """`states` with zeros before it, up to `length` along `dim`."""
    missing = length - states.shape[dim]
    return F.pad(states, [0, 0] * (states.dim() - 1 - dim) + [missing, 0]) if missing > 0 else states


def _replace(cache: Any, make: Callable[[Tensor, tuple[int, str]], Tensor]) -> None:
    """Puts `make(states, place)` for the keys and values of every layer, all of them or, if that fails, none."""
    places = [(number, name) for number in range(len(cache.layers)) for name in ("keys", "values")]
    made = [make(getattr(cache.layers[number], name), (number, name)) for number, name in places]
    for (number, name), states in zip(places, made, strict=True):
        setattr(cache.layers[number], name, states)


def _append(cache: Any, other: Any) -> None:
    """The rows of `other` under those of `cache`, right-aligned."""

    def joined(states: Tensor, place: tuple[int, str]) -> Tensor:
        new = getattr(other.layers[place[0]], place[1])
        return torch.cat([_padded(states, new.shape[2], dim=2), _padded(new, states.shape[2], dim=2)])

    _replace(cache, joined)


class InProcessBackend:
    """A `Backend` over the engine's own decoder. All its methods belong to one event loop; the forwards run in two threads of its own.

    One reads the prompts of newcomers, the other takes the running rows from token to token meanwhile.
    """

    name = "in-process"

    def __init__(self, engine: Any, *, max_rows: int = 8, max_slots: int = 65_536) -> None:
        """`engine`: a Refrag; `max_rows` prompts are decoded at the same time, and together they reserve at most `max_slots` slots of
        cache (rows x the longest; one prompt alone may take more).
        """
        self.device = engine.device
        self.batch = RowBatch(engine.model.decoder, engine.end_ids)
        self.max_rows = max_rows if self.batch.can_share else 1
        self.max_slots = max_slots
        if self.max_rows < max_rows:
            log.warning("Rows of this decoder cannot share a cache: it decodes one prompt at a time.")
        self._prefiller, self._worker = ThreadPoolExecutor(1, "refrag-prefill"), ThreadPoolExecutor(1, "refrag-decoder")
        self._newcomers: list[Row] = []
        """Rows whose prompts are being read."""
        self._waiting: deque[Row] = deque()
        self._loop: asyncio.Task[None] | None = None
        self._closed = False

    async def decode(self, prompt_embeds: Float[Tensor, "slot hidden"], settings: GenerationSettings) -> AsyncGenerator[Sequence[int]]:
        """See `Backend.decode`."""
        if self._closed:
            raise _closing()
        row = Row(prompt_embeds, settings)
        self._waiting.append(row)
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run(), name="refrag-decoding")
        try:
            while (token := await row.tokens.get()) is not None:
                if isinstance(token, BackendError):
                    raise token
                yield [token]
        finally:
            row.cancelled = True

    async def check(self) -> None:
        """See `Backend.check`."""
        if self._closed:
            raise _closing()

    async def aclose(self) -> None:
        """See `Backend.aclose`."""
        self._closed = True
        if self._loop is not None:
            await self._loop
        self._prefiller.shutdown()
        self._worker.shutdown()

    async def _run(self) -> None:
        """Prompts are read while the rows step; what was read joins between two steps; until nobody is left."""
        prefill: asyncio.Task[Prefilled | None] | None = None
        try:
            while (self._waiting or self.batch.rows or prefill) and not self._closed:
                if prefill is None and (newcomers := self._admitted()):
                    self._newcomers = newcomers
                    prefill = asyncio.create_task(self._prefill(newcomers), name="refrag-prefill")
                if prefill is not None and (prefill.done() or not self.batch.rows):
                    prefilled, prefill = await prefill, None
                    if prefilled is not None:
                        await self._forward(self._worker, partial(self.batch.join, prefilled), prefilled.rows)
                    self._newcomers = []
                else:
                    self._told(await self._forward(self._worker, self.batch.step, self.batch.rows) or ())
        finally:
            if prefill is not None:
                await prefill
            for row in (*self._waiting, *self._newcomers, *self.batch.clear()):
                row.tokens.put_nowait(_closing())
            self._waiting.clear()

    async def _prefill(self, newcomers: list[Row]) -> Prefilled | None:
        """Reads prompts, and tells their readers the first tokens; None if that failed."""
        prefilled = await self._forward(self._prefiller, partial(self.batch.prefill, newcomers), newcomers)
        if prefilled is not None:
            self._told(newcomers)
        return prefilled

    def _told(self, rows: Sequence[Row]) -> None:
        """The newest token of each row to its reader, and whether it was the last."""
        for row in rows:
            row.tokens.put_nowait(row.token_ids[-1])
            if self.batch.is_over(row):
                row.tokens.put_nowait(None)

    def _admitted(self) -> list[Row]:
        """The next rows for which there is room, first come, first served."""
        running, taken = [row for row in self.batch.rows if not row.cancelled], []
        while self._waiting and len(running) + len(taken) < self.max_rows:
            rows = [*running, *taken, self._waiting[0]]
            if not rows[-1].cancelled:
                if len(rows) > 1 and len(rows) * max(row.num_slots for row in rows) > self.max_slots:
                    break
                taken.append(rows[-1])
            self._waiting.popleft()
        return taken

    async def _forward(self, worker: ThreadPoolExecutor, work: Callable[[], T], rows: Sequence[Row]) -> T | None:
        """Some work in a worker. If it fails, so do `rows`, which leave, and the result is None."""

        def guarded() -> T:
            with backend_errors(self.device):
                return work()

        try:
            return await asyncio.get_running_loop().run_in_executor(worker, guarded)
        except Exception as error:
            if not isinstance(error, BackendError):
                log.error("The decoder failed.", exc_info=error)
            for row in rows:
                row.cancelled = True
                row.tokens.put_nowait(error if isinstance(error, BackendError) else BackendError(f"The decoder failed ({type(error).__name__}): see the log."))
            return None


def _closing() -> BackendError:
    return BackendError("The server is shutting down: send the request again, to another one.")
