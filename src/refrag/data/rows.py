"""One row of data: what a document and a question are, how they are read from a row, and by what rows are compared.

A *document* is `{"text": …, "id"?: …}` (other fields, such as SlimPajama's `meta`, are left aside) or a text alone.
A *question* is

    {"question": …, "answers": [text, …] or "answer": text, "passages": [text or {"text", "title"?, "id"?, "is_gold"?}, …],
     "id"?, "history"?: [{"role", "text" or "content", "passages"?}, …], "system"?}

or a conversation `{"messages": [{"role", "content", "passages"?}, …], "passages"?, "id"?}` that ends with a user's message and
the assistant's answer, perhaps after a system message. Rows of public question sets are brought into these fields by formats.py.
"""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

from ..errors import InputError
from ..text import Passage, Turn
from .formats import in_our_fields, is_unanswerable, kind_of

Kind = Literal["documents", "questions"]


@dataclass(frozen=True)
class Document:
    """A text to learn from. `id` is the row's own, else its file and line."""

    id: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question with its accepted answers and the passages to answer from."""

    id: str
    """The row's own, else its file and line."""
    question: str
    answers: tuple[str, ...]
    """One or more."""
    passages: tuple[Passage, ...]
    gold: tuple[bool, ...] | None
    """Per passage, whether it is marked as holding the answer; None where the row has no marks."""
    history: tuple[Turn, ...] = ()
    system: str | None = None
    kind: str = ""
    """What the row calls its kind of question; empty where it does not."""
    answerable: bool = True
    """False: the row says that its passages hold no answer; `answers` then say so."""


Item = Document | Question


# ── reading a row ──


def bad_row(place: str, what: str, advice: str = "mend it") -> InputError:
    """The one form of message for a row that cannot be used."""
    return InputError(f"{place}: {what}: {advice}, or leave such rows out with --skip-bad.")


def document_of(row: Any, place: str, *, text_field: str) -> Document:
    """The document of a row. `place` is its file and line. Raises InputError that names place and field."""
    row = _mapping({text_field: row} if isinstance(row, str) else row, place)
    return Document(_identity(row, place), _text(row, text_field, place, "name the text's field with --text-field"))


def question_of(row: Any, place: str, *, bare: bool = False) -> Question:
    """The question of a row or of a conversation. `bare`: the passages may be missing. Raises InputError that names place and field."""
    row = _mapping(row, place)
    if "messages" in row and "question" not in row:
        row = _last_question(row, place)
    try:
        unanswerable, row = is_unanswerable(row), in_our_fields(row)
        unanswerable = unanswerable or is_unanswerable(row)
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # a public set's field with something else in it
        raise bad_row(place, f"a field has another shape than the formats that are read ({type(error).__name__} {error})") from error
    given = [] if bare and row.get("passages") is None else _list(row, "passages", place)
    passages, gold = _passages(given, "passages", place)
    return Question(
        id=_identity(row, place),
        question=_text(row, "question", place),
        answers=_answers(row, place),
        passages=passages,
        gold=gold,
        history=_history(row, place),
        system=_text(row, "system", place) if row.get("system") else None,
        kind=kind_of(row),
        answerable=not unanswerable,
    )


def _mapping(row: Any, place: str, field: str = "") -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        what = f"the field {field!r} must be an object with fields" if field else "a row must be an object with fields"
        raise bad_row(place, f"{what}, was {_kind(row)}")
    return row


def _identity(row: Mapping[str, Any], place: str) -> str:
    return place if row.get("id") in (None, "") else str(row["id"])


def _text(row: Mapping[str, Any], field: str, place: str, advice: str = "mend it", *, within: str = "", blank: bool = False) -> str:
    value = row.get(field)
    if field not in row:
        raise bad_row(place, f"the field {within + field!r} is missing (there are {', '.join(map(repr, row)) or 'none'})", advice)
    if not isinstance(value, str) or not (blank or value.strip()):
        raise bad_row(place, f"the field {within + field!r} must be a text, was {_kind(value)}")
    return value


def _list(row: Mapping[str, Any], field: str, place: str) -> list[Any]:
    if field not in row:
        raise bad_row(place, f"the field {field!r} is missing (there are {', '.join(map(repr, row)) or 'none'})")
    if not isinstance(row[field], list):
        raise bad_row(place, f"the field {field!r} must be a list, was {_kind(row[field])}")
    return row[field]


def _kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if isinstance(value, str):
        return "a text" if value.strip() else "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = {list: "a list", type(None): "null", int: "a number", float: "a number"}
    return "an object" if isinstance(value, Mapping) else names.get(type(value), f"a {type(value).__name__}")


def _answers(row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    if row.get("answers") is None and row.get("answer") is not None:
        return (_text(row, "answer", place),)
    if isinstance(row.get("answers"), str):
        return (_text(row, "answers", place),)
    answers = _list(row, "answers", place)
    if not answers:
        raise bad_row(place, "the field 'answers' must hold one text or more, was empty")
    return tuple(_text({f"answers[{number}]": answer}, f"answers[{number}]", place) for number, answer in enumerate(answers))


def _passages(values: list[Any], field: str, place: str) -> tuple[tuple[Passage, ...], tuple[bool, ...] | None]:
    """The passages, which may be empty texts, and their marks. One without an id gets one made of its title and text: the same everywhere."""
    passages, gold = [], []
    for number, value in enumerate(values):
        within = f"{field}[{number}]"
        row = _mapping({"text": value} if isinstance(value, str) else value, place, within)
        text, title, mark = _text(row, "text", place, within=f"{within}.", blank=True), str(row.get("title") or ""), row.get("is_gold")
        if mark not in (None, True, False):
            raise bad_row(place, f"the field '{within}.is_gold' must be true or false, was {_kind(mark)}")
        digest = sha256(f"{title}\0{text}".encode(errors="surrogatepass")).hexdigest()[:12]
        passages.append(Passage(f"{title}#{digest}" if row.get("id") in (None, "") else str(row["id"]), text, title))
        gold.append(mark)
    return tuple(passages), tuple(map(bool, gold)) if any(mark is not None for mark in gold) else None


def _history(row: Mapping[str, Any], place: str) -> tuple[Turn, ...]:
    turns = []
    for number, value in enumerate(_list(row, "history", place) if row.get("history") else ()):
        within = f"history[{number}]"
        turn = _mapping(value, place, within)
        if turn.get("role") not in ("user", "assistant"):
            raise bad_row(place, f"the field '{within}.role' must be user or assistant, was {turn.get('role')!r}")
        text = _text(turn, "text" if "text" in turn else "content", place, within=f"{within}.")
        passages, _ = _passages(turn.get("passages") or [], f"{within}.passages", place)
        turns.append(Turn(turn["role"], text, passages))
    return tuple(turns)


def _last_question(row: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A conversation as a row with the fields of a question."""
    messages = [_mapping(message, place, f"messages[{number}]") for number, message in enumerate(_list(row, "messages", place))]
    roles = [message.get("role") for message in messages]
    if roles[-2:] != ["user", "assistant"]:
        raise bad_row(place, f"the field 'messages' must end with the roles user, assistant, ends with {', '.join(map(str, roles[-2:])) or 'none'}")
    first = 1 if roles[0] in ("system", "developer") else 0
    question, answer = messages[-2:]
    within = f"messages[{len(messages) - 2}]."
    return {
        "id": row.get("id"),
        "system": _text(messages[0], "content", place, within="messages[0].") if first else row.get("system"),
        "history": messages[first:-2],
        "question": _text(question, "content", place, within=within),
        "passages": question.get("passages") or row.get("passages") or [],
        "answers": [_text(answer, "content", place, within=f"messages[{len(messages) - 1}].")],
    }


def answer_spans(text: str, answers: Sequence[str]) -> list[tuple[int, int]]:
    """Characters of a text where one of the answers stands as words of its own, upper or lower case."""
    lowered = text.lower()
    found = (match for answer in answers if answer for match in re.finditer(rf"(?<!\w){re.escape(answer.lower())}(?!\w)", lowered))
    return [match.span() for match in found]


# ── keeping a row ──


def content_of(item: Item, place: str) -> str:
    """What is stored of a row: a document's text, a question as JSON. Raises InputError for a text that is not valid Unicode."""
    content = item.text if isinstance(item, Document) else json.dumps(item, default=vars, ensure_ascii=False)
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise bad_row(place, f"a text must be valid Unicode, has half a character after {content[: error.start][-40:]!r}") from error
    return content


def question_from(content: str) -> Question:
    """The question that `content_of` stored."""
    row = json.loads(content)
    history = tuple(Turn(turn["role"], turn["text"], _restored(turn["passages"])) for turn in row["history"])
    gold = None if row["gold"] is None else tuple(row["gold"])
    restored = {"answers": tuple(row["answers"]), "passages": _restored(row["passages"]), "gold": gold, "history": history}
    return Question(**row | restored)


def _restored(passages: list[dict[str, Any]]) -> tuple[Passage, ...]:
    return tuple(Passage(**passage) for passage in passages)


# ── comparing rows ──


def normalized(text: str) -> str:
    """What a text is compared by: one space for all white space, no case, Unicode in its compatible form (NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def keys_of(item: Item) -> list[int]:
    """Hashes below 2^63: two rows are the same content if they share one.

    Documents by their text; questions by the conversation up to the question and any one answer, marks at their ends aside.
    """
    if isinstance(item, Document):
        return [_hash(normalized(item.text))]
    conversation = "\x1f".join(_phrase(text) for text in (*(turn.text for turn in item.history), item.question))
    return list(dict.fromkeys(_hash(f"{conversation}\x1e{_phrase(answer)}") for answer in item.answers))


def group_of(item: Item) -> int:
    """Hash below 2^63 that decides whether a row is held out: of the text, or of the first question of the conversation."""
    if isinstance(item, Document):
        return _hash(normalized(item.text))
    return _hash(_phrase(next((turn.text for turn in item.history if turn.role == "user"), item.question)))


def _phrase(text: str) -> str:
    text = normalized(text)
    return text.rstrip(" ?!.") or text


def _hash(text: str) -> int:
    return int.from_bytes(sha256(text.encode(errors="surrogatepass")).digest()[:8]) >> 1  # Arrow makes a signed integer of it
