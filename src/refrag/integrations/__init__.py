"""Adapters for frameworks, one file each; a framework is imported only by its own file. What the adapters share is here."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..engine.answer import Answer, Request
from ..errors import InputError
from ..text import Passage


def as_passage(identity: str | None, text: Any, metadata: Mapping[str, Any] | None, *, number: int) -> Passage:
    """A framework's document as a passage: its title is the metadata's `title`; without an id it gets `str(number)`.

    A document with the id and the text of a passage of the engine's index is read from the index's stored vectors.
    Raises InputError for a document without a text.
    """
    if not isinstance(text, str):
        raise InputError(f"Document {number} must hold a text, was a {type(text).__name__}: give documents that do.")
    values = dict(metadata or {})
    return Passage(identity or str(number), text, str(values.pop("title", None) or ""), values)


def source_of(engine: Any, passages: Sequence[Passage] | None) -> Sequence[Passage] | None:
    """The passages to read: those given, else None (the engine retrieves), else, with an engine that cannot retrieve, none at all."""
    can_retrieve = engine.index is not None or engine.retriever is not None
    return [] if passages is None and not can_retrieve else passages


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `Refrag.answer` as a new dict. Raises InputError for those that cannot be meant, before there is a question."""
    Request.make("question", [], **options)
    return dict(options)


def facts(answer: Answer) -> dict[str, Any]:
    """All that an answer says beside its text, as plain values: citations, usage, timings, passages, trace, finish_reason."""
    return {name: value for name, value in answer.to_dict().items() if name != "text"}
