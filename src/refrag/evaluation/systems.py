"""What each system asks of the engine: same decoder, same questions, same passages."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from ..config import Budget, GenerationSettings
from ..engine import Refrag, Request
from ..layout import num_slots
from ..text import Passage, Prompt, PromptBuilder, Turn
from .questions import Asked
from .tasks import QaSettings, System


def request_of(system: System, asked: Asked, engine: Refrag, settings: QaSettings, *, seed: int) -> Request:
    """What a system asks of the engine."""
    question = asked.question
    passages: Sequence[Passage] = asked.passages[: system.top]
    base = Request(
        question.question,
        passages,
        policy=system.policy,
        budget=Budget() if system.kind != "policy" or system.policy == "none" else Budget(expand_fraction=system.expand_fraction),
        generation=GenerationSettings(max_new_tokens=settings.max_new_tokens, stop=settings.stop, seed=seed),
        system=question.system,
        history=question.history,
    )
    if system.kind != "truncated":
        return base
    assert system.expand_fraction is not None
    return replace(base, passages=truncate(engine.builder, base, expand_fraction=system.expand_fraction))


def truncate(builder: PromptBuilder, request: Request, *, expand_fraction: float) -> list[Passage]:
    """The passages from the first on, the last one cut, that take no more slots as tokens than all of them compressed.

    With an expand fraction p: than all of them with floor(p * L) full chunks expanded. Passages of the history stay whole.
    """
    passages = [own for own in request.passages or () if isinstance(own, Passage)]
    own_chunks = zip((own.id for own in passages), builder.chunk_batch([own.text for own in passages]), strict=True)
    chunked = {} if request.history else dict(own_chunks)  # an earlier turn may have another passage of the same id

    def build(given: Sequence[Passage]) -> Prompt:
        return builder.build(request.question, given, system=request.system, history=cast(Sequence[Turn], request.history), chunked=chunked)

    whole = build(passages)
    num_picks = int(expand_fraction * len(whole.chunks) + 1e-9)
    longest = sorted((len(chunk.token_ids) - 1 for chunk in whole.chunks), reverse=True)[:num_picks]
    limit = num_slots(whole, [False] * len(whole.chunks)) + sum(longest)
    count = bisect_right(range(1, len(passages) + 1), limit, key=lambda count: len(build(passages[:count]).token_ids()))
    if count == len(passages):
        return passages
    kept, cut = passages[:count], passages[count]
    return [*kept, *_cut(cut, limit - len(build([*kept, Passage("", "", cut.title)]).token_ids()), builder)]


def _cut(passage: Passage, num_tokens: int, builder: PromptBuilder) -> list[Passage]:
    """The passage with as many whole words as fit into so many tokens; nothing where there is no room for one."""
    ends = [word.end() for word in re.finditer(r"\S+", passage.text)]
    count = bisect_right(ends, num_tokens, key=lambda end: len(builder.encode(passage.text[:end])))
    return [replace(passage, text=passage.text[: ends[count - 1]])] if count else []
