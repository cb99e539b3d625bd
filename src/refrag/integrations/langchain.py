"""LangChain: `ChatRefrag`, a chat model that receives documents apart from the question, and `RefragRetriever` over an index."""

from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import public_name
from ..engine import Answer, Refrag, Request
from ..errors import InputError, missing_extra
from ..index import PassageIndex
from ..text import Passage, Turn
from . import as_passage, check_options, facts, source_of

try:
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun, CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage
    from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
    from langchain_core.retrievers import BaseRetriever
    from pydantic import Field, field_validator
except ImportError as error:
    raise missing_extra("langchain-core", "langchain", "The LangChain adapter") from error


class ChatRefrag(BaseChatModel):
    """Answers the last human message; earlier turns are history, system messages the system text.

    `chat.bind(documents=[…])` gives it the documents to read (LangChain's, or anything that `Refrag.answer` takes as a passage).
    Every option of `Refrag.answer` can be given, for all calls here, `ChatRefrag(engine=engine, policy="similarity")`, or by `chat.bind`.
    Without documents the engine retrieves; an engine without index and retriever answers from the messages alone.
    """

    engine: Any = Field(exclude=True)
    """The `refrag.Refrag` that answers, or what `Refrag.from_pretrained` loads it by."""
    temperature: float = 0.0
    max_tokens: int = 64
    stop: list[str] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of `Refrag.answer` for every call."""

    def __init__(self, engine: Any = None, **values: Any) -> None:
        """Raises InputError for an engine that is none and for options that `Refrag.answer` does not have or take."""
        engine = Refrag.from_pretrained(engine) if isinstance(engine, str | Path) else engine
        if not isinstance(engine, Refrag):
            raise InputError(f"engine must be a refrag.Refrag or the name of its model, was {type(engine).__name__}: write  ChatRefrag(engine=Refrag.from_pretrained(…)).")
        known = {name for field, own in type(self).model_fields.items() for name in (field, own.alias)}
        loose = {name: values.pop(name) for name in [*values] if name not in known}
        if given := {"documents", "passages", "question"} & loose.keys():
            raise InputError(f"{' and '.join(sorted(given))} belong to a call: write  chat.bind(documents=[…]).invoke(question)")
        if not isinstance(options := values.get("options") or {}, dict):
            raise InputError(f"options must be a dict of options of Refrag.answer, was {type(options).__name__}.")
        values["options"] = check_options(options | loose)
        super().__init__(engine=engine, **values)

    @property
    def model_name(self) -> str:
        """The name that the model was loaded by."""
        return str(self.engine.model.name_or_path or "refrag")

    @property
    def _llm_type(self) -> str:
        return "refrag"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"model_name": self.model_name, "temperature": self.temperature, "max_tokens": self.max_tokens, **self.options}

    def _generate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any
    ) -> ChatResult:
        answer = self.engine.answer(self._request(messages, stop, **kwargs))
        return self._result(answer)

    async def _agenerate(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any
    ) -> ChatResult:
        return self._result(await self.engine.aanswer(self._request(messages, stop, **kwargs)))

    def _stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: CallbackManagerForLLMRun | None = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        with self.engine.stream(self._request(messages, stop, **kwargs)) as pieces:
            for piece in pieces:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
            yield self._last_chunk(pieces.answer)

    async def _astream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, run_manager: AsyncCallbackManagerForLLMRun | None = None, **kwargs: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        pieces = self.engine.astream(self._request(messages, stop, **kwargs))
        try:
            async for piece in pieces:
                chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
                if run_manager:
                    await run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
            yield self._last_chunk(pieces.answer)
        finally:
            await pieces.aclose()

    def _request(self, messages: Sequence[BaseMessage], stop: Sequence[str] | None, *, documents: Any = None, **options: Any) -> Request:
        """What the messages ask. Raises InputError for messages other than texts of the human, the model and the system."""
        system = [_text(message) for message in messages if isinstance(message, SystemMessage)]
        turns = [Turn(_role(message), _text(message)) for message in messages if not isinstance(message, SystemMessage)]
        if not turns or turns[-1].role != "user":
            raise InputError("The last message must be the human's question: end the messages with a HumanMessage.")
        own: dict[str, Any] = {"temperature": self.temperature, "max_new_tokens": self.max_tokens, "stop": tuple(stop or self.stop or ())}
        own |= {"history": tuple(turns[:-1]), "system": "\n\n".join(system) or None}
        if "max_tokens" in options:
            options["max_new_tokens"] = options.pop("max_tokens")
        passages = None if documents is None else [_passage(document, number) for number, document in enumerate(documents, 1)]
        return Request.make(turns[-1].text, source_of(self.engine, passages), **own | self.options | options)

    def _result(self, answer: Answer) -> ChatResult:
        message = AIMessage(content=answer.text, **self._facts(answer))
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _last_chunk(self, answer: Answer) -> ChatGenerationChunk:
        return ChatGenerationChunk(message=AIMessageChunk(content="", chunk_position="last", **self._facts(answer)))

    def _facts(self, answer: Answer) -> dict[str, Any]:
        """What an answer cost and rests on: input tokens are decoder slots, the details count what they stand for."""
        usage = answer.usage
        details = {name: int(usage[name]) for name in ("context_tokens", "context_slots", "num_chunks", "expanded_chunks")}
        slots, written = int(usage["prompt_slots"]), int(usage["completion_tokens"])
        counts = {"input_tokens": slots, "output_tokens": written, "total_tokens": slots + written, "input_token_details": details}
        return {"usage_metadata": counts, "response_metadata": {"model_name": public_name(self.model_name), "model_provider": "refrag", **facts(answer)}}


class RefragRetriever(BaseRetriever):
    """Finds passages in a refrag index: `RefragRetriever(index="my.index", k=8)`. `k` can be given per call too."""

    index: Any
    """A PassageIndex, or its folder."""
    k: int = 8
    """Passages to find."""
    mode: str = "dense"
    """`dense`, `text` or `hybrid`."""
    where: str | None = None
    """SQL filter on the index's columns."""

    @field_validator("index")
    @classmethod
    def _open(cls, index: Any) -> PassageIndex:
        return PassageIndex.open(index) if isinstance(index, str | Path) else index

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None) -> list[Document]:
        hits = self.index.search(query, top_k=self.k if k is None else k, mode=self.mode, where=self.where)
        return [
            Document(id=hit.passage.id, page_content=hit.passage.text, metadata=hit.passage.metadata | {"title": hit.passage.title, "score": hit.score})
            for hit in hits
        ]


def _passage(document: Any, number: int) -> Passage:
    if isinstance(document, Document):
        return as_passage(document.id, document.page_content, document.metadata, number=number)
    return Passage.from_any(document, number)


def _role(message: BaseMessage) -> str:
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, AIMessage):
        return "assistant"
    raise InputError(f"Messages must come from the human, the model or the system, one was a {type(message).__name__}: leave it out.")


def _text(message: BaseMessage) -> str:
    """The text of a message. Raises InputError for images and other content."""
    blocks = [] if isinstance(message.content, str) else message.content
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else "text"
        if kind != "text":
            raise InputError(f"A message must be text, one held a block of type {kind!r}: send its text alone.")
    return str(message.text)
