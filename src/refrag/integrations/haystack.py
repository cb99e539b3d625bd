"""Haystack: `RefragGenerator`, a pipeline component that answers a query from documents."""

from contextlib import aclosing
from typing import Any

from ..config import BUNDLED_MODEL
from ..engine import Answer, Refrag
from ..errors import missing_extra
from . import as_passage, check_options, facts, source_of

try:
    from haystack import Document, component, default_from_dict, default_to_dict
    from haystack.dataclasses import ChatMessage, StreamingCallbackT, StreamingChunk, select_streaming_callback
except ImportError as error:
    raise missing_extra("haystack-ai", "haystack", "The Haystack adapter") from error


@component
class RefragGenerator:
    """Answers `query` from `documents`, or from an index: `RefragGenerator("bundled", options={"expand_fraction": 0.2})`."""

    def __init__(
        self,
        model: str = BUNDLED_MODEL,
        *,
        index: str | None = None,
        options: dict[str, Any] | None = None,
        device: str = "auto",
        streaming_callback: StreamingCallbackT | None = None,
    ) -> None:
        """`model`: a folder, hub name or `bundled`; `index`: folder to retrieve from when no documents are given; `options`: those
        of `Refrag.answer`. Raises InputError for options that do not exist. The model is loaded by `warm_up` or the first run.
        """
        self.model, self.index, self.device = model, index, device
        self.options = check_options(options or {})
        self.streaming_callback = streaming_callback
        self.engine: Refrag | None = None

    def warm_up(self) -> None:
        """Load the model."""
        if self.engine is None:
            self.engine = Refrag.from_pretrained(self.model, index=self.index, device=self.device)

    @component.output_types(replies=list[ChatMessage])
    def run(
        self, query: str, documents: list[Document] | None = None, streaming_callback: StreamingCallbackT | None = None
    ) -> dict[str, list[ChatMessage]]:
        """One reply; its meta holds finish reason, citations, usage, timings and trace. The callback receives the pieces.

        Without documents the index is searched; without an index the query is answered from no passages.
        """
        callback = select_streaming_callback(self.streaming_callback, streaming_callback, requires_async=False)
        with self._engine().stream(query, self._source(documents), **self.options) as pieces:
            for number, piece in enumerate(pieces):
                if callback is not None:
                    callback(self._chunk(piece, number))
            return {"replies": [self._reply(pieces.answer)]}

    @component.output_types(replies=list[ChatMessage])
    async def run_async(
        self, query: str, documents: list[Document] | None = None, streaming_callback: StreamingCallbackT | None = None
    ) -> dict[str, list[ChatMessage]]:
        """As `run`, beside other work of the event loop; the callback is awaited."""
        callback = select_streaming_callback(self.streaming_callback, streaming_callback, requires_async=True)
        async with aclosing(self._engine().astream(query, self._source(documents), **self.options)) as pieces:
            number = 0
            async for piece in pieces:
                sent = callback(self._chunk(piece, number)) if callback is not None else None
                if sent is not None:
                    await sent
                number += 1
            return {"replies": [self._reply(pieces.answer)]}

    def _engine(self) -> Refrag:
        self.warm_up()
        assert self.engine is not None
        return self.engine

    def _source(self, documents: list[Document] | None) -> Any:
        given = None if documents is None else [_passage(document, number) for number, document in enumerate(documents, 1)]
        return source_of(self._engine(), given)

    def _chunk(self, piece: str, number: int) -> StreamingChunk:
        return StreamingChunk(content=piece, index=0, start=number == 0, meta={"model": self.model})

    def _reply(self, answer: Answer) -> ChatMessage:
        usage = {**answer.usage, "prompt_tokens": answer.usage["prompt_slots"]}
        return ChatMessage.from_assistant(answer.text, meta={"model": self.model} | facts(answer) | {"usage": usage})

    def to_dict(self) -> dict[str, Any]:
        """For Haystack's pipeline files."""
        from haystack.utils import serialize_callable

        callback = serialize_callable(self.streaming_callback) if self.streaming_callback else None
        return default_to_dict(self, model=self.model, index=self.index, options=self.options, device=self.device, streaming_callback=callback)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RefragGenerator":
        """The component that `to_dict` described."""
        from haystack.utils import deserialize_callable

        own = data.get("init_parameters", {})
        if own.get("streaming_callback"):
            own["streaming_callback"] = deserialize_callable(own["streaming_callback"])
        return default_from_dict(cls, data)


def _passage(document: Document, number: int) -> Any:
    return as_passage(document.id, document.content, document.meta, number=number)
