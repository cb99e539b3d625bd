"""LlamaIndex: `RefragSynthesizer` receives the passages apart from the question; a retriever over an index, and a plain LLM."""

from collections.abc import AsyncGenerator, Generator, Sequence
from pathlib import Path
from typing import Any

from ..config import public_name
from ..engine import Refrag
from ..errors import missing_extra
from ..index import PassageIndex
from . import as_passage, check_options, facts

try:
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.llms import CompletionResponse, CompletionResponseGen, CustomLLM, LLMMetadata
    from llama_index.core.llms.callbacks import llm_completion_callback
    from llama_index.core.response_synthesizers.base import BaseSynthesizer
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
except ImportError as error:
    raise missing_extra("llama-index-core", "llama-index", "The LlamaIndex adapter") from error


class RefragSynthesizer(BaseSynthesizer):
    """Answers a query from its nodes, each read as one passage: `RefragSynthesizer(engine, expand_fraction=0.2)`.

    `options` are those of `Refrag.answer`. The response's metadata holds, under `refrag`, citations, usage, timings and trace;
    with `streaming`, once the last piece was read.
    """

    def __init__(self, engine: Refrag, *, streaming: bool = False, **options: Any) -> None:
        """Raises InputError for options that do not exist."""
        super().__init__(llm=RefragLLM(engine=engine), streaming=streaming)
        self.engine, self.options = engine, check_options(options)

    def synthesize(self, query: Any, nodes: list[NodeWithScore], additional_source_nodes: Sequence[NodeWithScore] | None = None, **response_kwargs: Any) -> Any:
        """As in LlamaIndex, with nodes kept whole: their ids find stored vectors, their titles are read."""
        said: dict[str, Any] = {}
        response = super().synthesize(query, nodes, additional_source_nodes, passages=_passages(nodes), said=said, **response_kwargs)
        return _with_facts(response, said)

    async def asynthesize(self, query: Any, nodes: list[NodeWithScore], additional_source_nodes: Sequence[NodeWithScore] | None = None, **response_kwargs: Any) -> Any:
        """As `synthesize`."""
        said: dict[str, Any] = {}
        response = await super().asynthesize(query, nodes, additional_source_nodes, passages=_passages(nodes), said=said, **response_kwargs)
        return _with_facts(response, said)

    def get_response(self, query_str: str, text_chunks: Sequence[str], *, passages: Any = None, said: dict[str, Any] | None = None, **response_kwargs: Any) -> Any:
        """The answer's text, or with `streaming` its pieces; `text_chunks` are read where no `passages` are given."""
        call = (query_str, list(text_chunks) if passages is None else passages)
        options, said = self.options | response_kwargs, {} if said is None else said
        if self._streaming:
            return self._pieces(*call, said, options)
        answer = self.engine.answer(*call, **options)
        said.update(facts(answer))
        return answer.text

    async def aget_response(self, query_str: str, text_chunks: Sequence[str], *, passages: Any = None, said: dict[str, Any] | None = None, **response_kwargs: Any) -> Any:
        """As `get_response`."""
        call = (query_str, list(text_chunks) if passages is None else passages)
        options, said = self.options | response_kwargs, {} if said is None else said
        if self._streaming:
            return self._apieces(*call, said, options)
        answer = await self.engine.aanswer(*call, **options)
        said.update(facts(answer))
        return answer.text

    def _pieces(self, question: str, passages: Any, said: dict[str, Any], options: dict[str, Any]) -> Generator[str]:
        with self.engine.stream(question, passages, **options) as pieces:
            yield from pieces
            said.update(facts(pieces.answer))

    async def _apieces(self, question: str, passages: Any, said: dict[str, Any], options: dict[str, Any]) -> AsyncGenerator[str]:
        pieces = self.engine.astream(question, passages, **options)
        try:
            async for piece in pieces:
                yield piece
            said.update(facts(pieces.answer))
        finally:
            await pieces.aclose()

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: Any) -> None:
        """The prompt is the engine's."""


class RefragRetriever(BaseRetriever):
    """Finds passages in a refrag index, as nodes: `RefragRetriever("my.index", top_k=8)`."""

    def __init__(self, index: str | Path | PassageIndex, *, top_k: int = 8, mode: str = "dense", where: str | None = None) -> None:
        """Raises NotFoundError when there is no index at the path."""
        super().__init__()
        self.index = PassageIndex.open(index) if isinstance(index, str | Path) else index
        self.top_k, self.mode, self.where = top_k, mode, where

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        hits = self.index.search(query_bundle.query_str, top_k=self.top_k, mode=self.mode, where=self.where)
        return [
            NodeWithScore(
                node=TextNode(id_=hit.passage.id, text=hit.passage.text, metadata=hit.passage.metadata | {"title": hit.passage.title}),
                score=float(hit.score),
            )
            for hit in hits
        ]


class RefragLLM(CustomLLM):
    """Completes a prompt without passages, for LlamaIndex's own prompts. A prompt that holds the passages cannot be compressed: use RefragSynthesizer."""

    engine: Any
    max_new_tokens: int = 64

    @property
    def metadata(self) -> LLMMetadata:
        """Window and name."""
        window = self.engine.model.decoder.config.get_text_config().max_position_embeddings
        return LLMMetadata(context_window=window, num_output=self.max_new_tokens, model_name=public_name(self.engine.model.name_or_path))

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """The completion of one prompt; `kwargs` are options of `Refrag.answer`."""
        answer = self.engine.answer(prompt, [], **{"max_new_tokens": self.max_new_tokens} | kwargs)
        return CompletionResponse(text=answer.text, raw=answer.to_dict())

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """The same, piece by piece."""

        def responses() -> CompletionResponseGen:
            text = ""
            with self.engine.stream(prompt, [], **{"max_new_tokens": self.max_new_tokens} | kwargs) as pieces:
                for piece in pieces:
                    text += piece
                    yield CompletionResponse(text=text, delta=piece)

        return responses()


def _passages(nodes: Sequence[NodeWithScore]) -> list[Any]:
    return [as_passage(own.node.node_id, own.node.get_content(MetadataMode.NONE), own.node.metadata, number=number) for number, own in enumerate(nodes, 1)]


def _with_facts(response: Any, said: dict[str, Any]) -> Any:
    response.metadata = {**(response.metadata or {}), "refrag": said}
    return response
