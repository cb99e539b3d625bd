"""Bodies become requests of the engine, answers become OpenAI's objects. No HTTP here."""

import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from ..config import MAX_SEED, Budget, GenerationSettings
from ..engine import Answer, Request
from ..errors import InputError
from ..text import Passage, Turn
from .schema import AnswerRequest, ChatRequest, CompletionRequest, Decoding, Document, Message, Reading
from .settings import ServerSettings

Given = str | Document


def chat_request(body: ChatRequest, stored: Mapping[str, Passage], settings: ServerSettings) -> Request:
    """The last message is the question, those before it the history; system messages come first.

    `stored`: the index's passages that documents name by id alone (see `named_ids`).
    """
    leading = next((number for number, message in enumerate(body.messages) if message.role in ("user", "assistant")), len(body.messages))
    system, turns = body.messages[:leading], body.messages[leading:]
    if any(message.role in ("system", "developer") for message in turns):
        raise InputError("System messages must come before all others: put them first.")
    if not turns or turns[-1].role != "user":
        raise InputError("The last message must be by the user: it is the question.")
    if any(message.documents for message in system):
        raise InputError("A system message cannot bring documents: put them beside the question.")
    if body.documents is not None and turns[-1].documents is not None:
        raise InputError("The question's documents were given twice, at the top and in its message: keep one.")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InputError("Give either max_completion_tokens or max_tokens, not both.")
    given = turns[-1].documents if body.documents is None else body.documents
    history = tuple(Turn(turn.role, _text(turn), _passages(turn.documents or (), stored)) for turn in turns[:-1])
    return Request(
        _text(turns[-1]),
        None if given is None else _passages(given, stored),
        generation=_generation(body, settings, longest=body.max_completion_tokens),
        system="\n\n".join(map(_text, system)) or None,
        history=history,
        **_reading(body, settings),
    )


def completion_request(body: CompletionRequest, stored: Mapping[str, Passage], settings: ServerSettings) -> Request:
    """The prompt is the question."""
    question = body.prompt if isinstance(body.prompt, str) else body.prompt[0]
    given = None if body.documents is None else _passages(body.documents, stored)
    return Request(question, given, generation=_generation(body, settings), **_reading(body, settings))


def answer_request(body: AnswerRequest, stored: Mapping[str, Passage], settings: ServerSettings) -> Request:
    """Field by field."""
    given = None if body.documents is None else _passages(body.documents, stored)
    return Request(body.question, given, system=body.system, generation=_generation(body, settings), **_reading(body, settings))


def named_ids(body: Reading) -> list[str]:
    """Ids of documents that came without a text: they are read from the index."""
    documents = [*(body.documents or ())]
    if isinstance(body, ChatRequest):
        documents += [document for message in body.messages for document in message.documents or ()]
    return [str(own.id) for own in documents if isinstance(own, Document) and own.text is None and own.id is not None]


def _passages(documents: Sequence[Given], stored: Mapping[str, Passage]) -> list[str | dict | Passage]:
    return [_passage(document, number, stored) for number, document in enumerate(documents, 1)]


def _passage(document: Given, number: int, stored: Mapping[str, Passage]) -> str | dict | Passage:
    if isinstance(document, str):
        return document
    if document.text is not None:
        return {name: value for name, value in document if value is not None}
    if document.id is None:
        raise InputError(f"Document {number} must have a text, or the id of a passage in the index, it has neither.")
    if str(document.id) not in stored:
        raise InputError(f"Document {number} has no text, and the index has no passage with its id: give the text.")
    if document.title is not None or document.metadata is not None:
        raise InputError(f"Document {number} has no text, so it is the index's passage of its id: leave title and metadata out, or give the text.")
    return stored[str(document.id)]


def _text(message: Message) -> str:
    return message.content if isinstance(message.content, str) else "".join(part.text for part in message.content)


def _reading(body: Reading, settings: ServerSettings) -> dict[str, Any]:
    """The fields of Request that say what is read and how."""
    budget = Budget(body.expand_fraction, body.expand_chunks, body.max_slots)
    names = "policy", "passages_first", "mode", "where"
    return {"budget": budget, "top_k": top_k(body.top_k, settings)} | {name: getattr(body, name) for name in names if getattr(body, name) is not None}


def top_k(asked: int | None, settings: ServerSettings) -> int:
    """Passages to retrieve: what was asked, else the engine's own number where the operator allows so many."""
    return min(Request.top_k, settings.max_documents) if asked is None else asked


def _generation(body: Decoding, settings: ServerSettings, *, longest: int | None = None) -> GenerationSettings:
    names = "temperature", "top_p", "repetition_penalty", "seed"
    given: dict[str, Any] = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    if body.temperature and body.seed is None:
        given["seed"] = secrets.randbelow(MAX_SEED + 1)
    if body.stop is not None:
        given["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.sample_top_k is not None:
        given["top_k"] = body.sample_top_k
    return GenerationSettings(max_new_tokens=longest or body.max_tokens or settings.default_new_tokens, **given)


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def usage_of(answer: Answer) -> dict[str, Any]:
    """OpenAI's usage: prompt tokens are decoder slots; what they stand for is in the details."""
    usage = answer.usage
    prompt, completion = int(usage["prompt_slots"]), int(usage["completion_tokens"])
    details = {
        "context_tokens": usage["context_tokens"],
        "context_slots": usage["context_slots"],
        "compressed_chunks": usage["num_chunks"] - usage["expanded_chunks"],
        "expanded_chunks": usage["expanded_chunks"],
        "compression_rate": usage["compression_rate"],
    }
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, "prompt_tokens_details": details}


def refrag_of(answer: Answer, *, trace: bool) -> dict[str, Any]:
    """What OpenAI has no place for: citations and the passages read, and the trace if it was asked for."""
    shown = {"citations": list(answer.citations), "passages": answer.passages, "timings": answer.timings}
    return shown | ({"trace": answer.trace} if trace else {})


class Shape:
    """The objects of one response: a chat's or a completion's."""

    def __init__(self, *, model: str, is_chat: bool) -> None:
        self.is_chat = is_chat
        self.base = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, answer: Answer, *, trace: bool) -> dict[str, Any]:
        """The response that does not stream."""
        content = {"message": {"role": "assistant", "content": answer.text}} if self.is_chat else {"text": answer.text}
        choice = {"index": 0, **content, "finish_reason": answer.finish_reason, "logprobs": None}
        return {**self.base, "choices": [choice], "usage": usage_of(answer), "refrag": refrag_of(answer, trace=trace)}

    def piece(self, text: str, *, first: bool = False) -> dict[str, Any]:
        """A chunk of a stream: the text that is new."""
        delta = {"delta": ({"role": "assistant"} if first else {}) | {"content": text}} if self.is_chat else {"text": text}
        return self._chunk([{"index": 0, **delta, "finish_reason": None, "logprobs": None}])

    def last(self, answer: Answer, *, trace: bool) -> dict[str, Any]:
        """The chunk that says why it ended."""
        delta: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
        choice = {"index": 0, **delta, "finish_reason": answer.finish_reason, "logprobs": None}
        return self._chunk([choice]) | {"refrag": refrag_of(answer, trace=trace)}

    def usage(self, answer: Answer) -> dict[str, Any]:
        """The chunk with the usage, for clients that asked for it."""
        return self._chunk([]) | {"usage": usage_of(answer)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.base, "object": "chat.completion.chunk" if self.is_chat else "text_completion", "choices": choices}
