"""Mixed inputs → text: one call of transformers' `generate`, watched token by token."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..config import GenerationSettings
from ..errors import MismatchError
from ..layout import MixedInputs

LEAST_TEMPERATURE = 1e-5
"""Below it decoding is greedy, as in vLLM: logits divided by less would overflow."""


@dataclass
class TextFeed:
    """The token ids of one answer → its text, in pieces that are never taken back.

    Held back: the bytes of an unfinished character, white space at the end, and what may be the start of a stop string.
    The pieces together are `text`.
    """

    tokenizer: Any
    eos_ids: frozenset[int]
    stop: tuple[str, ...] = ()
    sink: Callable[[str], object] | None = None
    """Called with each piece as soon as it is certain."""
    text: str = ""
    num_tokens: int = 0
    """Tokens decoded, the end-of-sequence token included."""
    num_ids: int | None = None
    """Token ids that the decoder has; None: not known."""
    finished: bool = False
    """An end-of-sequence token or a stop string came."""
    _ids: list[int] = field(default_factory=list)
    _read: str = ""
    _window: int = 0
    _settled: int = 0

    def push(self, token_id: int) -> None:
        """Take the next token; tokens after the end are ignored (a finished row of a batch is padded).

        Raises MismatchError for an id that the decoder does not have: whoever decodes has another one.
        """
        if self.finished:
            return
        if self.num_ids is not None and not 0 <= token_id < self.num_ids:
            raise MismatchError(f"Token ids must be below {self.num_ids}, the backend gave {token_id}: it has another decoder, start vLLM with what  refrag export decoder  writes.")
        self.num_tokens += 1
        if token_id in self.eos_ids:
            self.finished = True
            self.close()
            return
        self._ids.append(token_id)
        self._read += self._next_text()
        self._cut_or_emit()

    def close(self) -> None:
        """No more tokens: what was held back is certain now."""
        self._read += self._next_text(final=True)
        self._cut_or_emit(final=True)

    def _next_text(self, final: bool = False) -> str:
        """What the last tokens added; nothing while a character is unfinished. Decodes a short window only, which begins
        one settled stretch earlier, since some tokenizers write a token differently at the start of a text."""
        before = self._decode(self._ids[self._window : self._settled])
        after = self._decode(self._ids[self._window :])
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return ""
        self._window, self._settled = self._settled, len(self._ids)
        return after[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""

    def _cut_or_emit(self, final: bool = False) -> None:
        cuts = [at for at in map(self._read.find, self.stop) if at >= 0]
        if cuts:
            self._read = self._read[: min(cuts)]
            self.finished = True
        certain = len(self._read) - (0 if cuts or final or self.finished else self._withheld())
        text = self._read[:certain].strip()
        assert text.startswith(self.text), "a piece of the answer was taken back"
        piece, self.text = text[len(self.text) :], text
        if piece and self.sink is not None:
            self.sink(piece)

    def _withheld(self) -> int:
        """Length of the longest end of the text that could still become a stop string."""
        sizes = (size for stop in self.stop for size in range(1, len(stop)) if self._read.endswith(stop[:size]))
        return max(sizes, default=0)


class StepClock(BaseStreamer):
    """Hears every token of `generate`: stamps the time and feeds the rows. Reading the ids waits for the device, so times are real."""

    def __init__(self, rows: Sequence[TextFeed]) -> None:
        self.rows = rows
        self.stamps: list[float] = []

    def put(self, value: Tensor) -> None:
        if value.numel() == 0:  # the prompt, which has no token ids
            return
        token_ids = value.tolist()
        self.stamps.append(time.perf_counter())
        for row, token_id in zip(self.rows, token_ids, strict=True):
            row.push(token_id)

    def end(self) -> None:
        for row in self.rows:
            row.close()


class StopRows(StoppingCriteria):
    """Rows stop at their stop strings; all of them once `is_cancelled` says so."""

    def __init__(self, rows: Sequence[TextFeed], is_cancelled: Callable[[], bool]) -> None:
        self.rows = rows
        self.is_cancelled = is_cancelled

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        cancelled = self.is_cancelled()
        return torch.tensor([cancelled or row.finished for row in self.rows], device=input_ids.device)


class GumbelNoise(LogitsProcessor):
    """Makes the greedy choice a sample: argmax(logits + Gumbel noise) is distributed as softmax(logits).

    Each row draws from its own generator, so that a seed gives the same answer alone, in a batch and beside other threads.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        draws = [torch.empty(scores.shape[-1]).exponential_(generator=g).clamp_min_(1e-30) for g in self.generators]
        return scores - torch.stack(draws).log().to(scores.device, scores.dtype)


def end_token_ids(decoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends an answer: the generation config's, the model config's and the tokenizer's."""
    found: set[int] = set()
    for source in (decoder.generation_config, decoder.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)


def decode(
    decoder: Any,
    inputs: MixedInputs,
    rows: Sequence[TextFeed],
    *,
    settings: GenerationSettings,
    seeds: Sequence[int],
    is_cancelled: Callable[[], bool] = lambda: False,
) -> StepClock:
    """Fill `rows` (one per batch row) by decoding from `inputs`; returns when every row has ended.

    The first token comes from the prefill. Beams are not used: sampling is greedy decoding on noisy logits (GumbelNoise).
    `settings` alone count: the decoder's generation config gives nothing but its end tokens, by way of `rows`.
    A repetition penalty counts the answer's own tokens: the prompt has no token ids.
    """
    clock = StepClock(rows)
    ends = sorted(rows[0].eos_ids)
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        use_cache=True,
    )
    decoder = copy.copy(decoder)  # the same modules and weights; `generate` would fill what is unset from the decoder's own settings
    decoder.generation_config = config
    with torch.inference_mode():
        decoder.generate(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask,
            generation_config=config,
            logits_processor=processors(settings, seeds),
            stopping_criteria=StoppingCriteriaList([StopRows(rows, is_cancelled)]),
            streamer=clock,
        )
    return clock


def processors(settings: GenerationSettings, seeds: Sequence[int]) -> LogitsProcessorList:
    """What turns the logits of rows into those whose largest is taken: warpers and noise, one seed a row; none for plain greedy decoding."""
    chain = LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature < LEAST_TEMPERATURE:
        return chain
    chain.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k > 0:
        chain.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        chain.append(TopPLogitsWarper(settings.top_p))
    chain.append(GumbelNoise(seeds))
    return chain
