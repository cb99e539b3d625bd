"""The application: routes and nothing else."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import Response, StreamingResponse

from .. import __version__
from ..config import public_name
from ..engine import Answer, Refrag
from ..engine import Request as Asked
from ..engine.backend import Backend
from ..text import Passage
from .asked import Shape, answer_request, chat_request, completion_request, named_ids, top_k
from .http import Gate, JSONResponse, RefusedError, add_handlers, describe, dumps, unless_gone
from .metrics import Metrics
from .schema import AddRequest, AnswerRequest, ChatRequest, CompletionRequest, DeleteRequest, OpenAIRequest, Reading, SearchRequest
from .service import Service, allowed
from .settings import ServerSettings
from .tracing import Tracer

log = logging.getLogger(__name__)

GONE = 499
"""nginx's status for a client that went away; nobody receives it."""


def create_app(
    engine: Refrag,
    settings: ServerSettings | None = None,
    *,
    backend: Backend | None = None,
    api_key: str | None = None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """The application over an engine; `app.state.service` is its Service.

    `backend`: whoever decodes, by default this process. `api_key`: what requests must send as a bearer token. `tracer`: spans.
    """
    settings = settings or ServerSettings()
    metrics = Metrics()
    service = Service(engine, settings, metrics=metrics, backend=backend)
    metrics.watch(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        await service.aclose()

    app = FastAPI(title="refrag", version=__version__, lifespan=lifespan, redoc_url=None, default_response_class=JSONResponse)
    app.state.service = service
    routes = Routes(service, settings, model=settings.model_name or public_name(engine.model.name_or_path), tracer=tracer or Tracer())
    app.include_router(routes.router())
    add_handlers(app)
    app.add_middleware(Gate, settings=settings, api_key=api_key, hosts=settings.allowed_hosts)
    return app


class Routes:
    """The handlers, with what they share."""

    def __init__(self, service: Service, settings: ServerSettings, *, model: str, tracer: Tracer) -> None:
        self.service, self.settings, self.model, self.tracer = service, settings, model, tracer

    def router(self) -> APIRouter:
        """All routes."""
        router = APIRouter()
        errors: dict[int | str, dict[str, Any]] = {status: {"description": "An error in OpenAI's shape"} for status in (400, 401, 413, 429, 503, 504)}
        for path, handler, method in (
            ("/v1/chat/completions", self.chat, "POST"),
            ("/v1/completions", self.complete, "POST"),
            ("/v1/answer", self.answer, "POST"),
            ("/v1/models", self.models, "GET"),
            ("/v1/models/{name:path}", self.one_model, "GET"),
            ("/v1/passages", self.add, "POST"),
            ("/v1/passages", self.delete, "DELETE"),
            ("/v1/passages/search", self.search, "POST"),
            ("/v1/passages/{identity:path}", self.passage, "GET"),
            ("/health", self.health, "GET"),
            ("/health", self.health, "HEAD"),
            ("/ready", self.ready, "GET"),
            ("/ready", self.ready, "HEAD"),
            ("/metrics", self.metrics, "GET"),
        ):
            more: dict[int | str, dict[str, Any]] = {404: errors[400], 403: errors[400]} if path.startswith("/v1") else {}
            router.add_api_route(path, handler, methods=[method], responses=errors | more, response_model=None)
        return router

    # ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def chat(self, body: ChatRequest, http: Request) -> Response:
        """OpenAI's chat completions over compressed passages."""
        self._check_model(body.model)
        return await self._respond(chat_request(body, await self._named(body), self.settings), body, http)

    async def complete(self, body: CompletionRequest, http: Request) -> Response:
        """OpenAI's completions over compressed passages."""
        self._check_model(body.model)
        return await self._respond(completion_request(body, await self._named(body), self.settings), body, http)

    async def answer(self, body: AnswerRequest, http: Request) -> Response:
        """The whole Answer, with trace and timings."""
        self._check_model(body.model)
        request = answer_request(body, await self._named(body), self.settings)
        answer = await self._whole(request, http, "answer")
        return JSONResponse(answer.to_dict()) if answer else Response(status_code=GONE)

    async def _respond(self, request: Asked, body: OpenAIRequest, http: Request) -> Response:
        """Whole or streamed, as asked."""
        is_chat = isinstance(body, ChatRequest)
        shape = Shape(model=self.model, is_chat=is_chat)
        name = "chat" if is_chat else "text_completion"
        if not body.stream:
            answer = await self._whole(request, http, name)
            return JSONResponse(shape.whole(answer, trace=bool(body.trace))) if answer else Response(status_code=GONE)
        request = self._allowed(request)
        pieces = self._traced(request, http, name)
        try:
            first = await unless_gone(http, anext(pieces))  # what is refused is refused with a status of its own
        except BaseException:
            await pieces.aclose()
            raise
        if first is None:
            await pieces.aclose()
            return Response(status_code=GONE)
        return StreamingResponse(self._events(first, pieces, shape, body), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _whole(self, request: Asked, http: Request, name: str) -> Answer | None:
        """The Answer; None when the client has gone."""
        request = self._allowed(request)
        with self.tracer.span(name, model=self.model, request=request, headers=http.headers) as span:
            answer = await unless_gone(http, self.service.answer(request))
            if answer is not None:
                span.answered(answer)
                self._log(name, request, answer)
        return answer

    async def _traced(self, request: Asked, http: Request, name: str) -> AsyncGenerator[str | Answer]:
        with self.tracer.span(name, model=self.model, request=request, headers=http.headers) as span:
            async with aclosing(self.service.pieces(request)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, Answer):
                        span.answered(piece)
                        self._log(name, request, piece)
                    yield piece

    async def _events(self, first: str | Answer, pieces: AsyncGenerator[str | Answer], shape: Shape, body: OpenAIRequest) -> AsyncIterator[str]:
        """Server-sent events. An error in the middle is an event of its own, and then the stream ends without [DONE]."""
        async with aclosing(pieces):
            piece: str | Answer = first
            yield _event(shape.piece(piece if isinstance(piece, str) else "", first=True))
            try:
                if not isinstance(piece, Answer):
                    async for piece in pieces:
                        if isinstance(piece, str):
                            yield _event(shape.piece(piece))
            except Exception as error:
                yield _event(describe(error)[1])
                return
            assert isinstance(piece, Answer)
            yield _event(shape.last(piece, trace=bool(body.trace)))
            if body.stream_options and body.stream_options.include_usage:
                yield _event(shape.usage(piece))
            yield "data: [DONE]\n\n"

    def _allowed(self, request: Asked) -> Asked:
        self._check_filter(request.where)
        engine = self.service.engine
        request = allowed(request, self.settings, own_policy=self._own_policy)
        if request.passages is None and engine.index is None and engine.retriever is None:
            raise RefusedError(400, "This server has no index: send the passages as documents, an empty list for none.", code="no_index", param="documents")
        return request

    def _check_filter(self, where: str | None) -> None:
        if where is not None and not self.settings.allow_filters:
            raise RefusedError(403, "Filters (where) are not allowed here: the operator can allow them with --allow-filters.", code="not_allowed", param="where")

    @property
    def _own_policy(self) -> str:
        return "learned" if self.service.engine.model.has_trained_policy else "similarity"

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            raise RefusedError(404, f"This server has no model of that name: ask for {self.model!r}.", code="model_not_found", param="model")

    async def _named(self, body: Reading) -> dict[str, Passage]:
        """The index's passages that the body names by id."""
        ids = named_ids(body)
        return await self.service.stored(ids) if ids else {}

    def _log(self, name: str, request: Asked, answer: Answer) -> None:
        usage, timings = answer.usage, answer.timings
        log.info(
            "%s: %s slots for %s context tokens, %s tokens, first after %.3f s, all after %.3f s, %s",
            name, usage["prompt_slots"], usage["context_tokens"], usage["completion_tokens"], timings["ttft_s"], timings["total_s"], answer.finish_reason,
        )  # fmt: skip
        if self.settings.log_requests:
            log.info("%r was answered by %r", request.question, answer.text)

    # ── passages ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def add(self, body: AddRequest, http: Request) -> Response:
        """Adds passages, and replaces those whose id is there. Returns how many were added, updated, unchanged."""
        self._check_writable()
        passages = [Passage(own.id, own.text, own.title, own.metadata) for own in body.passages]
        if len({passage.id for passage in passages}) < len(passages):
            raise RefusedError(400, "Every passage needs an id of its own, two have the same: send each once.", code="invalid_value", param="passages")

        def add(index: Any) -> dict[str, int]:
            for passage in passages:
                self._check_length(passage)
            return index.add(passages)

        changed = await unless_gone(http, self.service.change(add))
        return JSONResponse(changed) if changed is not None else Response(status_code=GONE)

    def _check_length(self, passage: Passage) -> None:
        chunk, most = self.service.engine.builder.chunk, self.settings.max_passage_tokens
        if (length := len(chunk(passage.text).token_ids) + len(chunk(passage.title or "").token_ids)) > most:
            raise RefusedError(400, f"A passage may have at most {most} tokens here, title included, {passage.id!r} has {length}: split it.", code="invalid_value", param="passages")

    async def delete(self, body: DeleteRequest, http: Request) -> Response:
        """Deletes passages by id. Returns how many there were."""
        self._check_writable()
        deleted = await unless_gone(http, self.service.change(lambda index: index.delete(body.ids)))
        return JSONResponse({"deleted": deleted}) if deleted is not None else Response(status_code=GONE)

    async def search(self, body: SearchRequest) -> Response:
        """Passages for a question, best first."""
        most = top_k(body.top_k, self.settings)
        if most > self.settings.max_documents:
            raise RefusedError(400, f"top_k may be at most {self.settings.max_documents} here, was {most}.", code="invalid_value", param="top_k")
        self._check_filter(body.where)
        hits = await self.service.search(body.question, top_k=most, mode=body.mode, where=body.where)
        return JSONResponse({"object": "list", "data": [_passage(hit.passage) | {"score": float(hit.score)} for hit in hits]})

    async def passage(self, identity: str) -> Response:
        """One passage of the index."""
        found = await self.service.stored([identity])
        if identity not in found:
            raise RefusedError(404, "The index has no passage with this id.", code="not_found", param="id")
        return JSONResponse(_passage(found[identity]))

    def _check_writable(self) -> None:
        if not self.settings.allow_writes:
            raise RefusedError(403, "The index may not be changed here: the operator can allow it with --allow-writes.", code="not_allowed")

    # ── about ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def models(self) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, name: str) -> Response:
        """The model of that name."""
        self._check_model(name)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        details = {"chunk_size": self.service.engine.model.config.chunk_size, "policy": self._own_policy}
        return {"id": self.model, "object": "model", "created": 0, "owned_by": "refrag", "refrag": details}

    async def health(self) -> Response:
        """The process lives."""
        return JSONResponse({"status": "ok", "version": __version__, "backend": self.service.backend.name})

    async def ready(self) -> Response:
        """It can take a request now: 503 while it stops or the backend is away, 429 while the queue is full."""
        await self.service.check()
        return JSONResponse({"status": "ready", "running": self.service.running, "waiting": self.service.waiting})

    async def metrics(self) -> Response:
        """Prometheus."""
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _event(content: dict[str, Any]) -> str:
    return f"data: {dumps(content)}\n\n"


def _passage(passage: Passage) -> dict[str, Any]:
    return {"id": passage.id, "title": passage.title, "text": passage.text, "metadata": passage.metadata}
