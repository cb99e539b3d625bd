"""What every route shares: errors in OpenAI's shape, the limit on bodies, the key, the Host header, and noticing that a client has gone."""

import asyncio
import hmac
import json
import logging
import re
import traceback
from collections.abc import Awaitable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException as RaisedHTTPException
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine.limits import PromptTooLongError
from ..errors import BackendError, InputError, MismatchError, MissingExtraError, NotFoundError, RefragError
from . import schema
from .service import BusyError
from .settings import ServerSettings

log = logging.getLogger(__name__)

OPEN = {"/health", "/ready", "/metrics"}
"""What needs no key."""
RETRY_AFTER_S = 1
KINDS: tuple[tuple[type[Exception], int, str, str], ...] = (
    (BusyError, 429, "rate_limit_error", "queue_full"),
    (PromptTooLongError, 400, "invalid_request_error", "context_length_exceeded"),
    (NotFoundError, 404, "invalid_request_error", "not_found"),
    (MismatchError, 409, "invalid_request_error", "mismatch"),
    (InputError, 400, "invalid_request_error", "invalid_value"),
    (MissingExtraError, 501, "server_error", "missing_extra"),
    (BackendError, 503, "server_error", "backend_failed"),
    (TimeoutError, 504, "server_error", "timeout"),
    (RecursionError, 400, "invalid_request_error", "nested_too_deeply"),
)
"""Exception, status, and OpenAI's type and code; the first that fits counts."""

FIELDS = frozenset(name for own in vars(schema).values() if isinstance(own, type) and issubclass(own, schema.Body) for name in own.model_fields)
"""Names that a body's fields have."""

OTHER_NAMES = {"passages": "documents", "context": "documents", "max_new_tokens": "max_tokens"}
"""What Python and others call a field."""

SENTENCES: dict[type[Exception], str] = {
    TimeoutError: "The request took too long: ask for a shorter answer, or try again later.",
    RecursionError: "The metadata is nested too deeply: flatten it.",
}

T = TypeVar("T")


class RefusedError(RaisedHTTPException):
    """A request that is refused with a status of its own. An HTTPException, since FastAPI lets only those out of reading a body."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(status, message)
        self.code, self.param = code, param


class JSONResponse(Response):
    """Any plain value. Not ASCII only, as models write all languages; half a character is escaped."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content).encode()


def dumps(content: Any) -> str:
    """JSON that can always be encoded."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return text if text.isascii() or not re.search("[\ud800-\udfff]", text) else json.dumps(content)


def error_body(message: str, *, kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for an exception; a bug is logged, without the values in it, and told in general words."""
    if isinstance(error, RefusedError):
        kinds = {401: "authentication_error", 403: "permission_error"}
        return error.status_code, error_body(error.detail, kind=kinds.get(error.status_code, "invalid_request_error"), code=error.code, param=error.param)
    if isinstance(error, MismatchError) and "vLLM" in str(error):
        error = BackendError(str(error))  # the operator's, not the client's
    for cls, status, kind, code in KINDS:
        if isinstance(error, cls):
            message = for_clients(error) if isinstance(error, RefragError) else str(error) if cls is TimeoutError and str(error) else SENTENCES[cls]
            return status, error_body(message, kind=kind, code=code, param=_field_of(message) if status == 400 else None)
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("A bug: %s\n%s", type(error).__name__, frames)
    return 500, error_body("The server failed, which is a bug: its log says where.", kind="server_error", code="internal_error")


def for_clients(error: RefragError) -> str:
    """What a client may read of it: where vLLM runs, and how to start it, are told to the log alone."""
    message = str(error)
    if "vLLM" not in message:
        return over_http(message)
    log.warning("%s", message)
    message = re.sub(r" at https?://\S+|, or (check|start it with) [^,.:]*", "", message)
    return over_http(message) if isinstance(error, InputError) else "The engine that decodes cannot take this request now: try again later; the server's log says why."


def _field_of(message: str) -> str | None:
    """The field that a message names first; those whose name is a word of English do not count."""
    return next((word for word in re.findall(r"[a-z_]+", message) if "_" in word and word in FIELDS), None)


def over_http(message: str) -> str:
    """The engine's advice names the options of the command line; here they are fields."""
    names = {"max-new-tokens": "max_tokens"}
    return re.sub(r"--([a-z][a-z-]*)", lambda option: names.get(option[1], option[1].replace("-", "_")), message)


def respond(error: Exception) -> JSONResponse:
    """The response to an exception."""
    status, body = describe(error)
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, status_code=status, headers=headers)


def add_handlers(app: FastAPI) -> None:
    """Every error leaves in OpenAI's shape."""

    async def invalid(http: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        deepest = max(error.errors(), key=lambda own: (len(own["loc"]), not own["type"].endswith("_type")))  # of the forms that a field may have, the one that fits best
        kind, path = deepest["type"], deepest["loc"][1:]
        known = [str(part) for part in path[:-1] if isinstance(part, int) or part in FIELDS]  # without pydantic's words for the form of a value
        last = [str(part) for part in path[-1:] if kind == "extra_forbidden" or isinstance(part, int) or part in FIELDS]
        place = "" if kind == "json_invalid" else ".".join(known + last)
        message = f"{place[:200] or 'The body'}: {_problem(deepest, error.errors(), http.url.path)}"
        if not place and "json" not in http.headers.get("content-type", ""):
            message = "The body must be JSON and say so: send the header  Content-Type: application/json"
        body = error_body(message, kind="invalid_request_error", code=deepest["type"], param=place or None)
        return JSONResponse(body, status_code=400)

    async def refused(_: Request, error: Exception) -> Response:
        if isinstance(error, RefusedError):
            return respond(error)
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if message == "There was an error parsing the body":
            message = "The body must be JSON in UTF-8, not nested too deeply, and its numbers not too long."
        body = error_body(message, kind="invalid_request_error", code="not_found" if error.status_code == 404 else "invalid_request")
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    async def failed(_: Request, error: Exception) -> Response:
        return respond(error)

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)
    for cls in (RefragError, TimeoutError):
        app.add_exception_handler(cls, failed)


def _problem(error: Mapping[str, Any], all_errors: Sequence[Mapping[str, Any]], route: str) -> str:
    """One of pydantic's errors in words: what must hold, what was given, what to do."""
    kind, place, given = error["type"], error["loc"], _shown(error.get("input"))
    name = str(place[-1])
    if kind == "extra_forbidden":
        fields = schema.BODIES[route].model_fields.keys() - schema.UNSUPPORTED if route in schema.BODIES and len(place) == 2 else set()
        meant = OTHER_NAMES.get(name) if OTHER_NAMES.get(name) in fields else next(iter(get_close_matches(name, fields, n=1, cutoff=0.8)), None)
        return "there is no such field" + (f" (did you mean {meant!r}?)" if meant else "") + ": leave it out"
    if kind == "missing":
        unknown = [str(own["loc"][-1]) for own in all_errors if own["type"] == "extra_forbidden" and own["loc"][:-1] == place[:-1]]
        return error["msg"] + (f" ({_shown(unknown[0])} is no field)" if unknown else "")
    if name in schema.UNSUPPORTED and (len(place) == 2 or place[1] == "messages"):
        return f"this is not supported here, was {given}: leave it out"
    return error["msg"] + ("" if kind in ("json_invalid", "value_error") else f", was {given}")


def _shown(value: Any) -> str:
    """A value in a message."""
    if not isinstance(value, str | int | float | None):
        return f"a list of {len(value)}" if isinstance(value, list) else "an object" if isinstance(value, dict) else "something else"
    shown = dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:50]}… ({len(shown)} characters)"


async def unless_gone(http: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`; None, and `work` cancelled, when the client goes away before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for own in (gone, task):
            own.cancel()
        await asyncio.wait({gone, task})


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


class Gate:
    """ASGI middleware: Host header, API key, and the size of bodies, before anything is read or parsed."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, *, api_key: str | None, hosts: Sequence[str]) -> None:
        self.app, self.settings, self.hosts = app, settings, frozenset(hosts)
        self.api_key = api_key.encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._check(scope["path"].removeprefix(scope.get("root_path", "")), dict(scope["headers"]))
            await self.app(scope, self._bounded(receive), noting)
        except Exception as error:  # handled here, since uvicorn would log its message, and with it perhaps text of the request
            response = respond(error)
            if not started:
                await response(scope, receive, send)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = re.sub(r":\d+$", "", host).strip("[]")
        if self.hosts and name not in self.hosts:
            raise RefusedError(400, f"This server answers to {', '.join(sorted(self.hosts))}, not to the host of this request.", code="unknown_host")
        if self.api_key is not None and path not in OPEN:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.api_key):
                raise RefusedError(401, "The API key is missing or wrong: send it as  Authorization: Bearer KEY", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.settings.max_body_bytes:
            raise self._too_large()

    def _bounded(self, receive: Receive) -> Receive:
        """Bodies without a length, too, end at the limit."""
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.settings.max_body_bytes:
                raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> RefusedError:
        return RefusedError(413, f"A request body may have at most {self.settings.max_body_bytes} bytes here: send fewer or shorter passages.", code="body_too_large")
