"""A request between the policy's decision and its answer: what the decoder is given, and how the Answer is put together."""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from ..text import Prompt
from .answer import Answer, Request, find_citations
from .decoding import TextFeed

Usage = Mapping[str, int | float]


@dataclass(frozen=True)
class Row:
    """One request on its way: what it reads and what was decided."""

    request: Request
    prompt: Prompt
    scores: dict[int, float]
    """Retrieval score by `id()` of the passage object."""
    expand_mask: Bool[Tensor, "chunk"]
    chunk_scores: Float[Tensor, "chunk"]
    rule: str

    def answer(self, feed: TextFeed, *, usage: Usage, timings: Mapping[str, float], cancelled: bool) -> Answer:
        """The answer that `feed` holds."""
        return Answer(
            text=feed.text,
            citations=find_citations(feed.text, self.prompt.passages),
            usage={**usage, "completion_tokens": feed.num_tokens},
            timings=dict(timings),
            trace=self.trace(),
            passages=self.passage_entries(),
            finish_reason="stop" if feed.finished else "cancelled" if cancelled else "length",
        )

    def trace(self) -> list[dict[str, Any]]:
        """`Answer.trace`: one entry a chunk, where it stands, and why it was expanded or not."""
        passages, texts = self.prompt.passages, self.prompt.chunk_texts()
        decisions = zip(self.prompt.chunks, texts, self.chunk_scores.tolist(), self.expand_mask.tolist(), strict=True)
        return [
            {
                "passage_id": passages[chunk.passage].id,
                "title": passages[chunk.passage].title,
                "start": chunk.start,
                "end": chunk.end,
                "text": text,
                "score": score if math.isfinite(score) else None,
                "expanded": expanded,
                "rule": self.rule,
            }
            for chunk, text, score, expanded in decisions
        ]

    def passage_entries(self) -> list[dict[str, Any]]:
        """`Answer.passages`: one entry a passage read."""
        num_chunks, expanded = Counter[int](), Counter[int]()
        for chunk, is_expanded in zip(self.prompt.chunks, self.expand_mask.tolist(), strict=True):
            num_chunks[chunk.passage] += 1
            expanded[chunk.passage] += is_expanded
        return [
            {
                "number": place + 1,
                "id": passage.id,
                "title": passage.title,
                "score": self.scores.get(id(passage)),
                "num_chunks": num_chunks[place],
                "expanded_chunks": expanded[place],
            }
            for place, passage in enumerate(self.prompt.passages)
        ]


@dataclass(frozen=True)
class Prepared:
    """One request, ready for the decoder; its answer once the tokens have gone through `feed`."""

    row: Row
    prompt_embeds: Float[Tensor, "slot hidden"]
    usage: Usage
    """`Answer.usage` without the tokens that are yet to be decoded."""
    feed: TextFeed
    """Takes the token ids in order; give it a sink to hear the text as it comes. Call `close` after the last one."""
    seconds: Mapping[str, float]
    """Seconds per stage, those of the whole group that was prepared together."""
    ready: float
    """`time.perf_counter()` when it was prepared."""

    def answer(self, *, start: float, stamps: Sequence[float], cancelled: bool = False) -> Answer:
        """`start`: `time.perf_counter()` when the request came; `stamps`: the same when each token came."""
        timings = {**self.seconds, **decode_timings(start, self.ready, stamps)}
        return self.row.answer(self.feed, usage=self.usage, timings=timings, cancelled=cancelled)


def decode_timings(start: float, decode_start: float, stamps: Sequence[float]) -> dict[str, float]:
    """The part of `Answer.timings` that counts from the request at `start` and from the decoder at `decode_start`; zeros without a token."""
    first, last = (stamps[0], stamps[-1]) if stamps else (start, start)
    return {
        "prefill_s": max(first - decode_start, 0.0),
        "ttft_s": first - start,
        "per_token_s": (last - first) / (len(stamps) - 1) if len(stamps) > 1 else 0.0,
        "total_s": time.perf_counter() - start,
    }
