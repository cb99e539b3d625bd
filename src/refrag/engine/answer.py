"""What is asked of the engine and what comes back: Request, Answer, and the reading of its trace. No torch here."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from itertools import groupby
from typing import Any, Literal, TypedDict, get_args

from ..config import MAX_TOP_K, POLICIES, Budget, GenerationSettings, check_whole, takes_one
from ..errors import InputError
from ..text import Passage, Turn

FinishReason = Literal["stop", "length", "cancelled"]
SearchMode = Literal["dense", "text", "hybrid"]

USAGE_KEYS = (
    "context_tokens",
    "context_slots",
    "prompt_slots",
    "num_chunks",
    "expanded_chunks",
    "compression_rate",
    "kv_bytes",
    "completion_tokens",
)
"""Keys of `Answer.usage`. Tokens and slots of the context count numbering, titles and separators on both sides."""

TIMING_KEYS = ("retrieve_s", "prompt_s", "vectors_s", "question_s", "sense_s", "layout_s", "project_s", "prefill_s", "ttft_s", "per_token_s", "total_s")
"""Keys of `Answer.timings`, in seconds and in the order of the work; `ttft_s` counts from the call to the first token."""


class Options(TypedDict, total=False):
    """Everything that can be passed by name to `Refrag.answer`: the fields of Request, of Budget and of GenerationSettings."""

    top_k: int
    policy: str | Callable | None
    budget: Budget
    generation: GenerationSettings
    system: str | None
    history: Sequence[Turn | Mapping[str, Any]]
    passages_first: bool
    mode: SearchMode
    where: str | None
    expand_fraction: float | None
    expand_chunks: int | None
    max_slots: int | None
    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float
    stop: str | Sequence[str]
    seed: int


@dataclass(frozen=True)
class Request:
    """One question with everything its answer depends on."""

    question: str
    passages: Sequence[str | dict | Passage] | None = None
    """Passages to read; None: retrieve them; empty: answer without any."""
    top_k: int = 8
    """Passages to retrieve; not used when passages are given."""
    policy: str | Callable | None = None
    """One of `refrag.config.POLICIES`, or a callable from PolicyInputs to scores; None: the model's own."""
    budget: Budget = field(default_factory=Budget)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    system: str | None = None
    history: Sequence[Turn | Mapping[str, Any]] = ()
    """Earlier turns, oldest first: Turns, or mappings with `role` and `text` (or `content`, as in chat messages); their passages are compressed too."""
    passages_first: bool = True
    mode: SearchMode = "dense"
    where: str | None = None
    """Filter on the index's columns, as SQL."""

    def __post_init__(self) -> None:
        """Raises InputError for what cannot be asked."""
        _check_question(self.question)
        object.__setattr__(self, "passages", None if self.passages is None else passage_list(self.passages, "passages"))
        if isinstance(self.history, str | Mapping | Turn) or not isinstance(self.history, Iterable):
            raise InputError(f"history must be a list of turns, was {_kind(self.history)}: put it between brackets.")
        object.__setattr__(self, "history", tuple(_turn(turn) for turn in self.history))
        if self.top_k == 0:
            raise InputError("top_k must be 1 or more, was 0: to answer without passages give an empty list of them.")
        check_whole("top_k", self.top_k, minimum=1, maximum=MAX_TOP_K)
        for name, kind in (("budget", Budget), ("generation", GenerationSettings)):
            if not isinstance(getattr(self, name), kind):
                raise InputError(f"{name} must be a {kind.__name__}, was {_kind(getattr(self, name))}: pass its fields by name, or {kind.__name__}(…).")
        if self.system is not None and not isinstance(self.system, str):
            raise InputError(f"The system text must be a text, was {_kind(self.system)}.")
        if not isinstance(self.passages_first, bool):
            raise InputError(f"passages_first must be True or False, was {self.passages_first!r}.")
        if self.passages is not None and self.where is not None:
            raise InputError("where filters what is retrieved, but passages were given: leave one of them out.")
        if self.policy == "none" and (self.budget.expand_chunks or self.budget.expand_fraction):
            raise InputError("The policy 'none' expands nothing, but a budget to expand was given: leave it out, or choose another policy.")
        if self.mode not in get_args(SearchMode):
            raise InputError(f"mode must be one of {', '.join(get_args(SearchMode))}, was {self.mode!r}.")
        if self.policy is not None and not isinstance(self.policy, str) and not (callable(self.policy) and takes_one(self.policy)):
            raise InputError(f"The policy must be a name or a function of one argument, from PolicyInputs to scores, was {_kind(self.policy)}: choose one of {', '.join(POLICIES)}.")
        if isinstance(self.policy, str) and self.policy not in POLICIES:
            raise InputError(f"There is no policy {self.policy!r}{_nearest(self.policy, POLICIES)}: choose one of {', '.join(POLICIES)}.")

    @classmethod
    def make(cls, question: "str | Request", passages: Sequence[str | dict | Passage] | None = None, **options: Any) -> "Request":
        """A request from loose options (see Options); a Request is passed through.

        Raises InputError for an option that does not exist, or for `budget` beside one of its fields.
        """
        if isinstance(question, Request):
            if passages is not None or options:
                raise InputError("A Request holds its passages and options already: build another one with dataclasses.replace.")
            return question
        budget = _settings(Budget, options, "budget")
        generation = _settings(GenerationSettings, options, "generation")
        known = {f.name for f in fields(cls)} - {"question", "passages"}
        for name in options:
            if name not in known:
                names = list(Options.__annotations__)
                raise InputError(f"There is no option {name!r}{_nearest(name, names)}: the options are {', '.join(names)}.")
        return cls(question, passages, **(options | {"budget": budget, "generation": generation}))


def _settings(kind: type[Budget | GenerationSettings], options: dict[str, Any], name: str) -> Any:
    """Take the fields of `kind` out of `options`; `top_k` stays: it is the number of passages."""
    given = {f.name: options.pop(f.name) for f in fields(kind) if f.name != "top_k" and f.name in options}
    if name in options and given:
        raise InputError(f"Give either {name} or {' and '.join(given)}, not both.")
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    return options.pop(name, None) or kind(**given)


def _check_question(question: Any) -> None:
    if not isinstance(question, str):
        raise InputError(f"The question must be a text, was {_kind(question)}: write it between quotes.")
    if not question.strip():
        raise InputError("The question must hold some text, was empty: write it between quotes.")
    broken = re.search("[\ud800-\udfff]", question)
    if broken:
        raise InputError(
            f"The question must be valid Unicode, but it has half a character or a broken byte after {question[: broken.start()][-40:]!r}: "
            "check the encoding it was written with."
        )


def passage_list(passages: Any, what: str) -> Sequence[Any]:
    """`passages` as a sequence. Raises InputError for one passage alone, and for anything that is no list; `what` names it."""
    if isinstance(passages, str | bytes | Mapping | Passage) or not isinstance(passages, Iterable):
        raise InputError(f"{what} must be a list of passages, was {_kind(passages)}: put it between brackets, [] for none.")
    return passages if isinstance(passages, Sequence) else tuple(passages)


def _turn(turn: Any) -> Turn:
    """A Turn, or the Turn that a mapping describes."""
    if isinstance(turn, Turn):
        return turn
    if isinstance(turn, Mapping) and "content" in turn and "text" not in turn:  # as in the messages of a chat
        turn = {"text" if key == "content" else key: value for key, value in turn.items()}
    if not isinstance(turn, Mapping) or not {"role", "text"} <= turn.keys() <= {"role", "text", "passages"}:
        given = f"the keys {', '.join(map(str, turn))}" if isinstance(turn, Mapping) else _kind(turn)
        raise InputError(f'A turn of the history must be a Turn or a mapping with "role" and "text" (or "content"), was {given}: pass {{"role": "user", "text": "…"}}.')
    if not isinstance(turn["text"], str):
        raise InputError(f"The text of a turn must be a text, was {_kind(turn['text'])}.")
    return Turn(turn["role"], turn["text"], tuple(passage_list(turn.get("passages", ()), "The passages of a turn")))


def _kind(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _nearest(name: str, names: Sequence[str]) -> str:
    close = get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


@dataclass(frozen=True)
class Answer:
    """An answer with what it rests on and what it cost."""

    text: str
    citations: tuple[str, ...]
    """Ids of the passages that the answer names by their number, in the order of first mention."""
    usage: dict[str, int | float]
    """See USAGE_KEYS; kv_bytes is the key-value cache of the prompt, in bytes."""
    timings: dict[str, float]
    """See TIMING_KEYS. In a batch: those of the batch."""
    trace: list[dict[str, Any]]
    """One entry a chunk, in prompt order: passage_id, title, start and end (characters of the passage), text, score, expanded, rule."""
    passages: list[dict[str, Any]] = field(default_factory=list)
    """The passages read, in the order of their numbers: number, id, title, retrieval score (None where given), num_chunks, expanded_chunks."""
    finish_reason: FinishReason = "stop"
    """`stop`: the model ended or a stop string came; `length`: max_new_tokens; `cancelled`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, strings and numbers, ready for json.dumps."""
        return asdict(self) | {"citations": list(self.citations)}

    @property
    def full_slots(self) -> int:
        """Slots of the same prompt with every chunk expanded: plain RAG."""
        return int(self.usage["prompt_slots"] - self.usage["context_slots"] + self.usage["context_tokens"])


def find_citations(text: str, passages: Sequence[Passage]) -> tuple[str, ...]:
    """Ids of the passages named in `text` as [2], [1, 3] or [1][2], in the order of first mention, each once."""
    groups = re.findall(r"\[\s*(\d{1,6}(?:\s*[,;]\s*\d{1,6})*)\s*\]", text)
    numbers = [int(number) for group in groups for number in re.split(r"\s*[,;]\s*", group)]
    return tuple(dict.fromkeys(passages[n - 1].id for n in numbers if 1 <= n <= len(passages)))


def chunk_parts(answer: Answer) -> Iterator[tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]]:
    """Per passage its entry, and for each of its chunks (text, trace entry); the texts together are the passage.

    A character that a chunk border splits belongs to both chunks; it is shown once, with the first.
    """
    entries = iter(answer.trace)
    for passage in answer.passages:
        parts: list[tuple[str, dict[str, Any]]] = []
        shown = 0
        for _, entry in zip(range(passage["num_chunks"]), entries, strict=False):
            parts.append((entry["text"][max(shown - entry["start"], 0) :], entry))
            shown = max(shown, entry["end"])
        yield passage, parts


def segments(answer: Answer) -> Iterator[tuple[dict[str, Any], list[tuple[str, bool]]]]:
    """Per passage its entry and its text in (text, expanded) parts: neighbouring chunks of one kind joined."""
    for passage, chunks in chunk_parts(answer):
        runs = groupby(chunks, key=lambda chunk: chunk[1]["expanded"])
        yield passage, [("".join(text for text, _ in run), expanded) for expanded, run in runs]


def render_trace(answer: Answer) -> Any:
    """The passages as rich text: expanded parts bold between ⟦ ⟧, compressed parts dim."""
    from rich.text import Text

    page = Text()
    for passage, parts in segments(answer):
        page.append(f"[{passage['number']}] {passage['title'] or passage['id']}", style="bold cyan")
        page.append(f"  {passage['expanded_chunks']} of {passage['num_chunks']} chunks expanded\n", style="cyan")
        for text, expanded in parts:
            page.append(f"⟦{text}⟧" if expanded else text, style="bold green" if expanded else "dim")
        page.append("\n")
    return page


def render_summary(answer: Answer) -> Any:
    """The short table under an answer: passages, chunks expanded, slots against plain RAG, time to first token."""
    from rich.table import Table

    usage = answer.usage
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("passages", "chunks expanded", "slots", "compression", "TTFT"):
        table.add_column(heading, justify="right")
    table.add_row(
        str(len(answer.passages)),
        f"{usage['expanded_chunks']} of {usage['num_chunks']}",
        f"{usage['prompt_slots']:,} of {answer.full_slots:,}",
        f"{usage['compression_rate']:.1f}x",
        f"{answer.timings['ttft_s'] * 1000:,.0f} ms",
    )
    return table
