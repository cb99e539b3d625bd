"""What the page shows, as HTML, without any web framework. Everything that is not our own markup is escaped here."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

from ..config import Budget, GenerationSettings
from ..engine.answer import Answer, Request, SearchMode, chunk_parts
from ..errors import InputError, RefragError


@dataclass(frozen=True)
class View:
    """The parts of the page at one moment, each HTML."""

    answer: str = ""
    plain: str = ""
    """The answer of plain RAG."""
    figures: str = ""
    """The table of both."""
    passages: str = ""


@dataclass(frozen=True)
class Reading:
    """How a question is to be read: the controls of the page."""

    policy: str | None = None
    """None: the model's own."""
    expand_fraction: float | None = None
    """Share of the chunks that may be expanded; None: the model's own."""
    top_k: int = 8
    mode: SearchMode = "dense"
    generation: GenerationSettings = field(default_factory=GenerationSettings)

    def request(self, question: str, *, plain: bool = False) -> Request:
        """The request for compressed reading, or for plain RAG (`plain`). Raises InputError for what cannot be asked."""
        how: dict[str, Any] = {"top_k": self.top_k, "mode": self.mode, "generation": self.generation}
        if plain:
            return Request(question, policy="all", **how)
        return Request(question, policy=self.policy, budget=Budget(expand_fraction=self.expand_fraction), **how)


def views(engine: Any, question: str, reading: Reading, *, compare: bool = True) -> Iterator[View]:
    """The page while a question is answered, a view a piece; then, with `compare`, while plain RAG answers it.

    One after the other, so that neither slows the other's time to first token. An error is shown in place of the answer.
    Closing the iterator stops the decoding.
    """
    view = View(answer=_waiting("retrieving, reading …"))
    yield view
    try:
        request = reading.request(question)
    except InputError as error:
        yield View(answer=error_html(error))
        return
    ours = None
    for found in _pieces(engine, request):
        ours = found if isinstance(found, Answer) else None
        view = replace(view, answer=_side(found))
        yield view
    if ours is None:
        return
    view = replace(view, passages=passages_html(ours), figures=figures_html(ours))
    yield view
    if not compare:
        return
    yield replace(view, plain=_waiting("reading every token …"))
    for found in _pieces(engine, reading.request(question, plain=True)):
        view = replace(view, plain=_side(found))
        if isinstance(found, Answer):
            view = replace(view, figures=figures_html(ours, found))
        yield view


def _pieces(engine: Any, request: Request) -> Iterator[str | Answer | RefragError]:
    """The text so far, again and again; last the answer, or the error that came instead."""
    text = ""
    try:
        with engine.stream(request) as stream:
            for piece in stream:
                text += piece
                yield text
            yield stream.answer
    except RefragError as error:
        yield error


# ── HTML ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def error_html(error: RefragError) -> str:
    """One sentence in a box."""
    return f'<div class="rf-error" role="alert">{escape(str(error))}</div>'


def answer_html(text: str, num_passages: int = 0) -> str:
    """An answer, whose citations of passages that exist lead to them."""

    def link(match: re.Match[str]) -> str:
        number = int(match[1])
        return f'<a class="rf-cite" href="#rf-passage-{number}">{number}</a>' if 1 <= number <= num_passages else match[0]

    linked = re.sub(r"\[(\d{1,6})\]", link, escape(text))
    return f'<div class="rf-answer">{linked}</div>'


def passages_html(answer: Answer) -> str:
    """The passages read, by number, with expanded chunks marked; every chunk tells its score and rule when pointed at."""
    if not answer.passages:
        return '<p class="rf-note">No passage was found.</p>'
    cited = set(answer.citations)
    return "".join(_passage(passage, chunks, is_cited=passage["id"] in cited) for passage, chunks in chunk_parts(answer))


def figures_html(ours: Answer, plain: Answer | None = None) -> str:
    """Slots, times and memory of the compressed reading, and beside them those of plain RAG, once it has answered."""
    answers = [ours] if plain is None else [ours, plain]
    rows = [
        _figure("decoder slots", [a.usage["prompt_slots"] for a in answers], "{:,.0f}"),
        _figure("time to first token", [a.timings["ttft_s"] * 1e3 for a in answers], "{:,.0f} ms"),
        _figure("KV memory", [a.usage["kv_bytes"] / 2**20 for a in answers], "{:,.2f} MiB"),
        _figure("whole answer", [a.timings["total_s"] * 1e3 for a in answers], "{:,.0f} ms"),
    ]
    heads = ["", "REFRAG"] + (["plain RAG", "plain ÷ REFRAG"] if plain else [])
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join(rows)
    usage = ours.usage
    note = (
        f"{usage['expanded_chunks']:,} of {usage['num_chunks']:,} chunks expanded: "
        f"{usage['context_tokens']:,} context tokens in {usage['context_slots']:,} slots ({usage['compression_rate']:.1f}× compression)."
    )
    return f'<table class="rf-figures"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p class="rf-note">{note}</p>'


def _side(found: str | Answer | RefragError) -> str:
    """One column: the text so far, the answer, or the error."""
    if isinstance(found, RefragError):
        return error_html(found)
    if isinstance(found, str):
        return answer_html(found)
    if not found.text:
        return '<p class="rf-note">The answer is empty.</p>'
    return answer_html(found.text, len(found.passages))


def _waiting(what: str) -> str:
    return f'<p class="rf-note rf-waiting">{what}</p>'


def _passage(passage: dict[str, Any], chunks: list[tuple[str, dict[str, Any]]], *, is_cited: bool) -> str:
    number, score = passage["number"], passage["score"]
    facts = [f"{passage['expanded_chunks']} of {passage['num_chunks']} chunks expanded"]
    facts += [] if score is None else [f"retrieval {score:.3f}"]
    facts += ["cited"] if is_cited else []
    title = escape(passage["title"] or passage["id"])
    described = " · ".join(facts)
    kind = "rf-passage rf-cited" if is_cited else "rf-passage"
    text = "".join(_chunk(own, entry) for own, entry in chunks)
    return (
        f'<section class="{kind}" id="rf-passage-{number}">'
        f'<header><span class="rf-number">{number}</span> <b>{title}</b> <small>{described}</small></header>'
        f"<p>{text}</p></section>"
    )


def _chunk(text: str, entry: dict[str, Any]) -> str:
    """One chunk: `mark` when expanded, `span` when compressed."""
    tag, state = ("mark", "expanded") if entry["expanded"] else ("span", "compressed")
    score = "" if entry["score"] is None else f" · score {entry['score']:.3f}"
    tip = escape(f"{state} · {entry['rule']}{score}")
    return f'<{tag} class="rf-chunk" data-tip="{tip}">{escape(text)}</{tag}>'


def _figure(name: str, values: Sequence[int | float], form: str) -> str:
    cells = [form.format(value) for value in values]
    cells += [f"{values[1] / values[0]:.1f}×"] if len(values) == 2 and values[0] else []
    row = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{name}</th>{row}</tr>'
