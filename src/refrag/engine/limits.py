"""What a prompt may take: refused before anything is encoded, with advice that fits the case."""

from ..errors import InputError
from ..layout import num_slots
from ..text import Chunk, Prompt
from .answer import Request


class PromptTooLongError(InputError):
    """The prompt and its answer take more slots than the decoder has positions, or than the budget allows."""


def check_prompt(prompt: Prompt, request: Request, limit: int | None) -> None:
    """Raises PromptTooLongError when a prompt is too long before any chunk is expanded, or for `all` with every chunk expanded.

    `limit`: the decoder's positions, None: unknown. The prompt and `max_new_tokens` must fit into them together.
    """
    base = num_slots(prompt, [False] * len(prompt.chunks))
    if not _fits(base, request, limit):
        raise too_long(base, request, limit, advice=f"{_less(prompt, request, limit)} or lower --max-new-tokens")
    most = request.budget.max_slots
    if most is not None and base > most:
        raise PromptTooLongError(
            f"The prompt takes {base} slots with nothing expanded, {base - most} more than max_slots {most}: "
            f"raise --max-slots to {base}, or {_less(prompt, request, None)}."
        )
    if request.policy == "all":
        check_expanded(num_slots(prompt, [True] * len(prompt.chunks)), prompt, request, limit)


def check_expanded(slots: int, prompt: Prompt, request: Request, limit: int | None) -> None:
    """Raises PromptTooLongError when a prompt that fits with nothing expanded does not fit with `slots` slots."""
    if not _fits(slots, request, limit):
        assert limit is not None
        budget = f"set --max-slots {limit - request.generation.max_new_tokens}"
        budget = f"choose --policy similarity and {budget}" if request.policy == "all" else budget
        raise too_long(slots, request, limit, advice=f"{budget}, {_less(prompt, request, limit)}, or lower --max-new-tokens")


def too_long(slots: int, request: Request, limit: int | None, *, advice: str) -> PromptTooLongError:
    """The error for a prompt of `slots` slots."""
    longest = request.generation.max_new_tokens
    assert limit is not None
    return PromptTooLongError(
        f"The prompt takes {slots} slots and the answer up to {longest} tokens, {slots + longest - limit} more than the decoder's "
        f"{limit} positions: {advice}."
    )


def _fits(slots: int, request: Request, limit: int | None) -> bool:
    return limit is None or slots + request.generation.max_new_tokens <= limit


def _less(prompt: Prompt, request: Request, limit: int | None) -> str:
    """How this prompt could be made shorter: by the question, where that alone takes half of what there is, else by the passages."""
    longest = max((len(piece) for piece in prompt.pieces if not isinstance(piece, Chunk)), default=0)
    if not prompt.passages:
        return "shorten the question and the system text"
    if limit is not None and 2 * longest > limit:
        return "shorten the question, the system text or the titles"
    if len(prompt.passages) == 1:
        return "pass a shorter passage"
    return "lower --top-k" if request.passages is None else "pass fewer passages"
