"""Passages, a question and a history become a `Prompt`: decoder token ids in pieces, and the chunks among them.

Text that comes from outside (passages, titles, questions, system text, history) can never become a control token: it is
tokenised by a private copy of the tokenizer in which no text spells one. Only the chat template's own words use the real ones.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from .errors import InputError

_MARKUP = re.compile(r"[<\[{|].*[>\]}|]", re.DOTALL)
_NEWLINE = "\n"


@dataclass(frozen=True)
class Passage:
    """One retrieved text. `id` is what citations and the index use; `metadata` is free."""

    id: str
    text: str
    title: str = ""
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_any(cls, passage: Any, number: int) -> "Passage":
        """A passage from a `PassageLike`: a text, or a mapping with `text` and perhaps `id`, `title`, `metadata`.

        Other keys of a mapping join the metadata. A passage without an id gets `str(number)`. Raises InputError for anything without a text.
        """
        if isinstance(passage, Passage):
            return passage
        if isinstance(passage, str):
            return cls(str(number), passage)
        if not isinstance(passage, Mapping) or not isinstance(passage.get("text"), str):
            given = f"the keys {', '.join(map(str, passage))}" if isinstance(passage, Mapping) else f"a {type(passage).__name__}"
            if isinstance(passage, list | tuple):
                raise InputError(f"Passage {number} must be a text or a mapping, was {given}: passages are read by every question, one with passages of its own is a Request(question, passages).")
            raise InputError(f'Passage {number} must be a text or a mapping with a string under "text", was {given}: pass {{"text": "…"}}.')
        known = {"id", "text", "title", "metadata"}
        described = passage.get("metadata") or {}
        if not isinstance(described, Mapping):
            raise InputError(f'The metadata of passage {number} must be a mapping, was a {type(described).__name__}: pass {{"source": "…"}}.')
        metadata = dict(described) | {key: value for key, value in passage.items() if key not in known}
        identity = passage.get("id")
        return cls(str(number if identity is None else identity), passage["text"], str(passage.get("title") or ""), metadata)


PassageLike = Passage | str | Mapping[str, Any]
"""A passage, its text alone, or a mapping with its fields."""


@dataclass(frozen=True)
class Turn:
    """An earlier turn of the conversation. Its passages stand before its text and are compressed like any others."""

    role: str
    """`user` or `assistant`."""
    text: str
    passages: Sequence[PassageLike] = ()

    def __post_init__(self) -> None:
        if self.role not in ("user", "assistant"):
            raise InputError(f"The role of a turn must be 'user' or 'assistant', was {self.role!r}: pass system text as system=….")


@dataclass(frozen=True)
class Chunk:
    """Up to `chunk_size` consecutive tokens of one passage: `[start, end)` are characters of that passage's text."""

    index: int
    """Place in `Prompt.chunks`."""
    passage: int
    """Place in `Prompt.passages`."""
    start: int
    end: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class ChunkedText:
    """A tokenised text: chunk i holds `token_ids[i * chunk_size : (i + 1) * chunk_size]` and the characters `spans[i]`."""

    token_ids: tuple[int, ...]
    chunk_size: int
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Prompt:
    """What the decoder reads, in its order: runs of plain token ids, and chunks, which may be expanded or compressed."""

    pieces: tuple[tuple[int, ...] | Chunk, ...]
    chunks: tuple[Chunk, ...]
    """The chunks among the pieces, in the same order."""
    passages: tuple[Passage, ...] = ()
    num_context_overhead: int = 0
    """Tokens of numbering, titles and separators: they belong to the context, and are never compressed."""

    @property
    def num_context_tokens(self) -> int:
        """Tokens of the context (overhead and chunks); question, template, system text and history do not count."""
        return self.num_context_overhead + sum(len(chunk.token_ids) for chunk in self.chunks)

    def token_ids(self) -> list[int]:
        """All token ids, every chunk expanded."""
        return self.token_table.tolist()

    def chunk_texts(self) -> list[str]:
        """The characters of each chunk: what the encoder reads."""
        return [self.passages[chunk.passage].text[chunk.start : chunk.end] for chunk in self.chunks]

    @cached_property
    def token_table(self) -> np.ndarray:
        """`token_ids()` as an int64 array."""
        runs = (piece.token_ids if isinstance(piece, Chunk) else piece for piece in self.pieces)
        return np.fromiter(chain.from_iterable(runs), dtype=np.int64)

    @cached_property
    def piece_table(self) -> np.ndarray:
        """int64 [2 piece]: tokens of each piece, and its chunk index (-1: a plain run)."""
        rows = [(len(piece.token_ids), piece.index) if isinstance(piece, Chunk) else (len(piece), -1) for piece in self.pieces]
        return np.array(rows, dtype=np.int64).reshape(-1, 2).T


class _Part(NamedTuple):
    """A stretch of the prompt before it is tokenised."""

    kind: Literal["start", "control", "text", "context", "passage"]
    """BOS and system text · template text · outside text · numbering, titles, separators · place of a passage."""
    text: str = ""
    passage: int = -1


_Message = tuple[str, list[_Part]]


class PromptBuilder:
    """Builds prompts and chunks with one decoder tokenizer and one chunk size. Safe to share between threads."""

    def __init__(self, tokenizer: Any, *, chunk_size: int) -> None:
        """Raises InputError for a chunk size below 1 and for a tokenizer that is missing or not a fast one."""
        if chunk_size < 1:
            raise InputError(f"chunk_size must be 1 or more, was {chunk_size}: try 16.")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            given = "none" if tokenizer is None else f"a {type(tokenizer).__name__}"
            raise InputError(f"The decoder needs a fast tokenizer (a tokenizer.json), was {given}: save one beside the model with tokenizer.save_pretrained.")
        self.tokenizer = tokenizer
        self.chunk_size = chunk_size
        specification = backend.to_str()
        self._template = _quiet(Tokenizer.from_str(specification))
        self._safe = _safe_copy(specification)
        self._bos: int | None = tokenizer.bos_token_id
        self._adds_bos = self._bos is not None and self._template.encode("a").ids[:1] == [self._bos]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text from outside: no BOS, no control tokens."""
        return self._encode([text])[0].ids

    def chunk(self, text: str) -> ChunkedText:
        """The chunks of one text; an empty or whitespace-only text has none."""
        return self.chunk_batch([text])[0]

    def chunk_batch(self, texts: Sequence[str]) -> list[ChunkedText]:
        """The chunks of many texts, tokenised together."""
        return [self._chunked(text, encoding) for text, encoding in zip(texts, self._encode(texts), strict=True)]

    @staticmethod
    def chunk_texts(chunked: ChunkedText, text: str) -> list[str]:
        """The characters of each chunk of `text`."""
        return [text[start:end] for start, end in chunked.spans]

    def build(
        self,
        question: str,
        passages: Sequence[PassageLike] = (),
        *,
        system: str | None = None,
        history: Sequence[Turn] = (),
        passages_first: bool = True,
        chunked: Mapping[str, ChunkedText] | None = None,
    ) -> Prompt:
        """The prompt for a question, by the tokenizer's chat template where it has one, by a plain one else.

        Passages are numbered `[1]`, `[2]`, … through the whole prompt and stand before the question, or after it with
        `passages_first=False`; those of the history stand before their turns. `chunked` holds the chunks of passages
        (by id) that were tokenised before. A passage without text keeps its number and has no chunk.
        Raises InputError for a conversation that the chat template refuses and for chunks of another text or size.
        """
        turns = [*history, Turn("user", question, tuple(passages))]
        given = [passage for turn in turns for passage in turn.passages]
        numbered = tuple(Passage.from_any(passage, number) for number, passage in enumerate(given, 1))
        compose = self._chat if self.tokenizer.chat_template else self._plain
        parts = compose(_messages(turns, numbered), system, passages_first)
        return self._assemble(parts, numbered, chunked or {})

    def _plain(self, messages: list[_Message], system: str | None, passages_first: bool) -> list[_Part]:
        parts = [_Part("start", f"{system}\n\n" if system else "")]
        for role, (*context, text) in messages[:-1]:
            label = "Question" if role == "user" else "Answer"
            parts += [*context, _Part("text", f"{label}: {text.text}\n")]
        *context, question = messages[-1][1]
        if passages_first:
            return [*parts, *context, _Part("text", f"Question: {question.text}\nAnswer:")]
        return [*parts, _Part("text", f"Question: {question.text}\n"), *context, _Part("text", "Answer:")]

    def _chat(self, messages: list[_Message], system: str | None, passages_first: bool) -> list[_Part]:
        if not passages_first and len(messages[-1][1]) > 1:
            *context, question = messages[-1][1]
            messages = [*messages[:-1], ("user", [_Part("text", question.text + _NEWLINE), *context])]
        if system:
            try:
                return self._render([("system", [_Part("text", system)]), *messages])
            except InputError:  # many templates know no system role, or drop its text
                first = [role for role, _ in messages].index("user")
                folded = ("user", [_Part("text", f"{system}\n\n"), *messages[first][1]])
                messages = [*messages[:first], folded, *messages[first + 1 :]]
        return self._render(messages)

    def _render(self, messages: list[_Message]) -> list[_Part]:
        """The chat template's text around the messages' parts: it is rendered with a marker for each message."""
        from jinja2 import TemplateError

        markers = {f"refrag{secrets.token_hex(8)}": content for _, content in messages}
        conversation = [{"role": role, "content": marker} for (role, _), marker in zip(messages, markers, strict=True)]
        try:
            rendered = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            reason = str(error).strip().rstrip(".")
            raise InputError(f"The tokenizer's chat template refused the conversation ({reason}): let the history alternate 'user' and 'assistant' turns, the first by 'user'.") from error
        found = re.split(f"({'|'.join(markers)})", rendered)
        if sorted(found[1::2]) != sorted(markers):
            raise InputError("The tokenizer's chat template must show every turn once, but dropped or repeated one: pass a tokenizer with another chat_template.")
        parts = list(chain.from_iterable(markers.get(text) or [_Part("control", text)] for text in found))
        bos = self.tokenizer.bos_token
        return parts if not self._adds_bos or rendered.startswith(bos) else [_Part("start"), *parts]

    def _assemble(self, parts: list[_Part], passages: tuple[Passage, ...], chunked: Mapping[str, ChunkedText]) -> Prompt:
        runs = self._runs(parts)
        texts = self._chunked_passages(passages, chunked)
        pieces: list[tuple[int, ...] | Chunk] = []
        chunks: list[Chunk] = []
        for part, run in zip(parts, runs, strict=True):
            if part.kind == "passage":
                new = _chunks(texts[part.passage], part.passage, len(chunks))
                chunks += new
                pieces += new
            elif run:
                pieces.append(run)
        overhead = sum(len(run) for part, run in zip(parts, runs, strict=True) if part.kind == "context")
        return Prompt(tuple(pieces), tuple(chunks), passages, overhead)

    def _runs(self, parts: list[_Part]) -> list[tuple[int, ...]]:
        """Token ids of each part that is not a passage."""
        texts = list({part.text for part in parts if part.kind in ("start", "text", "context")})
        safe = dict(zip(texts, self._encode(texts), strict=True))
        runs: list[tuple[int, ...]] = []
        for kind, text, _ in parts:
            match kind:
                case "passage":
                    runs.append(())
                case "control":
                    runs.append(tuple(self._template.encode(text, add_special_tokens=False).ids))
                case "start":
                    bos = () if self._bos is None else (self._bos,)
                    runs.append((*bos, *safe[text].ids))
                case "text" | "context":
                    runs.append(tuple(safe[text].ids))
        return runs

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        try:
            return self._safe.encode_batch(list(texts), add_special_tokens=False)
        except TypeError as error:
            before = next((text[: half.start()] for text in texts if (half := re.search("[\ud800-\udfff]", text))), None)
            if before is None:
                raise
            raise InputError(f"A text must be valid Unicode, but one has half a character after {before[-40:]!r}: check the encoding it was read with.") from error

    def _chunked_passages(self, passages: tuple[Passage, ...], chunked: Mapping[str, ChunkedText]) -> list[ChunkedText]:
        missing = [passage.text for passage in passages if passage.id not in chunked]
        fresh = iter(self.chunk_batch(missing) if missing else ())
        return [self._checked(passage, chunked[passage.id]) if passage.id in chunked else next(fresh) for passage in passages]

    def _checked(self, passage: Passage, chunked: ChunkedText) -> ChunkedText:
        if chunked.chunk_size != self.chunk_size:
            raise InputError(f"The chunks of passage {passage.id!r} must hold {self.chunk_size} tokens, were made with {chunked.chunk_size}: chunk the passage again.")
        if chunked.spans and chunked.spans[-1][1] != len(passage.text):
            raise InputError(f"The chunks of passage {passage.id!r} must end with its text ({len(passage.text)} characters), end at {chunked.spans[-1][1]}: chunk the passage again.")
        return chunked

    def _chunked(self, text: str, encoding: Encoding) -> ChunkedText:
        if not text or text.isspace():
            return ChunkedText((), self.chunk_size, ())
        ids = tuple(encoding.ids)
        return ChunkedText(ids, self.chunk_size, _spans(encoding, len(ids), self.chunk_size, len(text)))


def _messages(turns: Sequence[Turn], passages: Sequence[Passage]) -> list[_Message]:
    """Per turn its role, the parts of its passages, and last the part of its text."""
    messages, number = [], 0
    for turn in turns:
        content = []
        for _ in turn.passages:
            title = passages[number].title
            heading = f"[{number + 1}] {title}\n" if title else f"[{number + 1}] "
            content += [_Part("context", heading), _Part("passage", passage=number), _Part("context", _NEWLINE)]
            number += 1
        messages.append((turn.role, [*content, _Part("text", turn.text)]))
    return messages


def _chunks(chunked: ChunkedText, passage: int, first: int) -> list[Chunk]:
    ids, size = chunked.token_ids, chunked.chunk_size
    return [Chunk(first + i, passage, start, end, ids[i * size : (i + 1) * size]) for i, (start, end) in enumerate(chunked.spans)]


def _spans(encoding: Encoding, num_tokens: int, chunk_size: int, num_characters: int) -> tuple[tuple[int, int], ...]:
    """Characters of each chunk. They cover the text: characters between two chunks, which no token holds, go to the first."""
    firsts = range(0, num_tokens, chunk_size)
    starts = [0, *(_characters(encoding, first)[0] for first in firsts[1:])]
    ends = [max(_characters(encoding, first - 1)[1], start) for first, start in zip(firsts[1:], starts[1:], strict=True)]
    return tuple(zip(starts, [*ends, num_characters], strict=True)) if num_tokens else ()


def _characters(encoding: Encoding, token: int) -> tuple[int, int]:
    characters = encoding.token_to_chars(token)
    assert characters is not None, "every token of a text comes from characters of it"
    return characters


def _quiet(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _safe_copy(specification: str) -> Tokenizer:
    """A copy of a tokenizer, ids unchanged, in which no text spells a control token.

    Each control token is renamed, wherever the tokenizer's JSON names it, to a name that nobody can know, and merges that
    would spell it are dropped: splitting special tokens is not enough for models whose own vocabulary holds them (Unigram,
    WordLevel, BPE with `ignore_merges`). Control tokens are the special ones and added ones that look like markup (`<think>`).
    """
    tokenizer = json.loads(specification)
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    for token in added:
        token["special"] = token["special"] or bool(len(token["content"]) > 1 and _MARKUP.fullmatch(token["content"]))
    names = {token["content"]: f"\0{secrets.token_hex(8)}" for token in added if token["special"] and len(token["content"]) > 1}
    for token in added:
        token["content"] = names.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): number for token, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("merges"):
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in names and names.keys().isdisjoint(pair)]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    tokenizer["post_processor"] = None  # it would trim the offsets
    copy = _quiet(Tokenizer.from_str(json.dumps(tokenizer)))
    copy.encode_special_tokens = True
    return copy
