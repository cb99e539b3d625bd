"""The vLLM engine: servers started with --enable-prompt-embeds decode what this process compressed.

One prompt is one streamed `POST /v1/completions`: its embeddings go there as a saved tensor in base64, token ids come back.
"""

import asyncio
import base64
import io
import json
import logging
import math
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import GenerationSettings, VllmSettings
from ..errors import BackendError, InputError, MismatchError, RefragError, missing_extra
from .limits import PromptTooLongError

log = logging.getLogger(__name__)

COOL_DOWN_S = 10.0
"""So long a server that failed is the last choice."""
PAUSE_S = 0.2
"""Before the only server is asked a second time."""
SERVE = "vllm serve FOLDER --enable-prompt-embeds  (FOLDER by  refrag export decoder)"


class VllmBackend:
    """A `Backend` (see backend.py): vLLM servers of the model's own decoder, which `refrag export decoder` writes for them.

    They must be trusted and closed to others: vLLM loads whatever tensor it is sent.
    """

    name = "vllm"

    def __init__(self, settings: VllmSettings) -> None:
        """Nothing is connected yet. Raises MissingExtraError without the package httpx2, InputError for a key that cannot be sent."""
        self.settings = settings
        self._servers = [_Server(url) for url in settings.urls]
        self._http = _import_httpx()
        self._errors = (self._http.HTTPError, self._http.InvalidURL)
        self._client = self._http.AsyncClient(
            headers={"Content-Type": "application/json"} | _authorization(settings.api_key or os.environ.get("VLLM_API_KEY", "")),
            timeout=self._http.Timeout(None, connect=settings.connect_timeout_s),
            limits=self._http.Limits(max_connections=None, max_keepalive_connections=None),
        )

    async def decode(self, prompt_embeds: Float[Tensor, "slot hidden"], settings: GenerationSettings) -> AsyncGenerator[Sequence[int]]:
        """The token ids of one answer as they come; closing the generator stops the server's decoding too.

        When a server fails before the first token, another one is tried, or the only one once more.
        Raises BackendError when none gave a token, and when one broke off later or refused; InputError for a prompt that is
        too long for the server, MismatchError for a server of another decoder.
        """
        body = await asyncio.to_thread(request_body, prompt_embeds, settings, model=self.settings.model)
        failures: dict[str, _Failure] = {}
        for last in (*[False] * max(1, len(self._servers) - 1), True):
            server = self._choose(failures)
            given, finish_reason = 0, None
            try:
                async with aclosing(self._stream(server, body)) as runs:
                    async for token_ids, ended in runs:
                        if token_ids and given == settings.max_new_tokens:
                            log.warning("The vLLM server at %s decodes more than the %d tokens that were asked for.", server.url, given)
                            return
                        token_ids = token_ids[: settings.max_new_tokens - given]
                        given, finish_reason = given + len(token_ids), ended
                        if token_ids:
                            yield token_ids
                if finish_reason is None and given < settings.max_new_tokens:
                    raise _Failure("the connection was closed")
            except _Failure as failure:
                server.failed_at = time.monotonic()
                if given:
                    raise BackendError(f"The vLLM server at {server.url} broke off after {given} tokens ({failure}): ask again, its log may say why.") from failure
                failures[server.url] = failure
                log.warning("The vLLM server at %s failed: %s.", server.url, failure)
                if last or self._client.is_closed or (failure.is_slow and len(self._servers) == 1):
                    raise _no_token(failures) from failure
                await asyncio.sleep(PAUSE_S if len(self._servers) == 1 else 0)
            else:
                if finish_reason == "length" and given < settings.max_new_tokens:
                    raise _too_long(server.url, f"it had room for {given} of {settings.max_new_tokens} tokens")
                return

    async def check(self) -> None:
        """Returns when a server answers. Raises BackendError, saying why not, when none does or one refuses the key."""
        failures: dict[str, _Failure] = {}
        for server in self._servers:
            try:
                async with asyncio.timeout(self.settings.connect_timeout_s):
                    response = await self._client.get(f"{server.url}/v1/models")
                if response.status_code == 200:
                    return
                raise _failure(server.url, response.status_code, response.content)
            except _Failure as failure:
                failures[server.url] = failure
            except TimeoutError:
                failures[server.url] = _Failure(f"no answer within {self.settings.connect_timeout_s:g} s")
            except self._errors as error:
                failures[server.url] = _transport_failure(error)
        raise _no_token(failures)

    async def aclose(self) -> None:
        """Close the connections; prompts that are still decoding end with BackendError."""
        await self._client.aclose()

    def _choose(self, failures: Mapping[str, "_Failure"]) -> "_Server":
        """The least busy server; one that failed lately, or for this prompt, only where no other is left."""
        now = time.monotonic()
        return min(self._servers, key=lambda server: (server.url in failures, now - server.failed_at < COOL_DOWN_S, server.busy))

    async def _stream(self, server: "_Server", body: bytes) -> AsyncGenerator[tuple[Sequence[int], str | None]]:
        """(token ids, finish reason) of each event of one request. Raises _Failure for what another try may mend."""
        wait, what, now = self.settings.first_token_timeout_s, "first", asyncio.get_running_loop().time
        until = now() + wait
        server.busy += 1
        try:
            async with aclosing(self._events(server.url, body)) as events:
                while True:
                    async with asyncio.timeout_at(until):
                        event = await anext(events, None)
                    if event is None:
                        return
                    yield event
                    if event[0]:
                        wait, what = self.settings.token_timeout_s, "further"
                        until = now() + wait
        except TimeoutError as error:
            raise _Failure(f"no {what} token within {wait:g} s", is_slow=True) from error
        except self._errors as error:
            raise _transport_failure(error) from error
        finally:
            server.busy -= 1

    async def _events(self, url: str, body: bytes) -> AsyncGenerator[tuple[Sequence[int], str | None]]:
        async with self._client.stream("POST", f"{url}/v1/completions", content=body) as response:
            if response.status_code != 200:
                raise _failure(url, response.status_code, await response.aread())
            async with aclosing(aiter(self._http.EventSource(response))) as events:
                async for event in events:
                    if event.data == "[DONE]":
                        return
                    if (read := _read_event(url, event.data)) is not None:
                        yield read


@dataclass
class _Server:
    """One address, and what is known about it."""

    url: str
    busy: int = 0
    """Requests of ours that run there now."""
    failed_at: float = -math.inf
    """When it failed last, by `time.monotonic`."""


class _Failure(Exception):
    """A server failed in a way that another one, or the same one a moment later, may not. Its text is the reason."""

    def __init__(self, reason: str, *, is_slow: bool = False) -> None:
        super().__init__(reason)
        self.is_slow = is_slow


def request_body(prompt_embeds: Float[Tensor, "slot hidden"], settings: GenerationSettings, *, model: str | None = None) -> bytes:
    """The JSON of one request; `model` is the name that the decoder is served under.

    Every sampling setting is said, since the server would take what is not from the decoder's generation_config.json.
    """
    file = io.BytesIO()
    torch.save(prompt_embeds.detach().cpu().clone(), file)  # cloned: a view would be saved with all that it is a part of
    content = {
        "model": model,
        "prompt": None,
        "prompt_embeds": base64.b64encode(file.getbuffer()).decode(),
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": 0.0,
        "repetition_penalty": settings.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": settings.seed,
        "stream": True,
        "return_token_ids": True,
    }
    return json.dumps(content).encode()


def _read_event(url: str, data: str) -> tuple[Sequence[int], str | None] | None:
    """(token ids, finish reason) of an event; None where it has none. Raises _Failure for one that reports an error."""
    try:
        event = json.loads(data)
        if error := event.get("error"):
            raise _Failure(_line(error["message"]))
        choice = next(iter(event["choices"]), None)
        if choice is None:  # a count of tokens
            return None
        token_ids, reason = choice["token_ids"], choice["finish_reason"]
        if not all(type(token_id) is int and token_id >= 0 for token_id in token_ids):
            raise ValueError("token ids must be numbers")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BackendError(f"The server at {url} does not answer with token ids as vLLM does, but with {_line(data)}: check --vllm-url, or update vLLM.") from error
    if reason not in (None, "stop", "length"):
        raise _Failure(f"it ended with {reason}")
    return token_ids, reason


def _failure(url: str, status: int, content: bytes) -> "_Failure | RefragError":
    """What an HTTP status other than 200 means: a _Failure where another try may help."""
    said = _message(content)
    reason = f"HTTP {status}: {said}" if said else f"HTTP {status}"
    if status == 429 or status >= 500:
        return _Failure(reason)
    if status in (401, 403):
        return BackendError(f"The vLLM server at {url} refused the key ({reason}): set VLLM_API_KEY to what it was started with as --api-key.")
    if status == 404:
        return BackendError(f"The vLLM server at {url} does not serve that ({reason}): check --vllm-url and --vllm-model.")
    if "enable-prompt-embeds" in said:
        return BackendError(f"The vLLM server at {url} takes no prompt embeddings: start it again with --enable-prompt-embeds.")
    if "hidden_size" in said:
        return MismatchError(f"The vLLM server at {url} serves another decoder ({said}): start it with  {SERVE}.")
    if "max_model_len" in said or "context length" in said:
        return _too_long(url, said)
    if status == 400:  # a setting that it has other limits for, such as a temperature above 2
        return InputError(f"The vLLM server at {url} refused the request ({said or reason}): change what it names, or check --vllm-url.")
    return BackendError(f"The vLLM server at {url} refused the request ({reason}): check that --vllm-url is a vLLM server, and update it.")


def _too_long(url: str, reason: str) -> PromptTooLongError:
    return PromptTooLongError(f"The prompt and its answer are too long for the vLLM server at {url} ({reason}): lower --top-k or --max-new-tokens, or start it with a larger --max-model-len.")


def _no_token(failures: Mapping[str, _Failure]) -> BackendError:
    """The error after the last try."""
    tried = "; ".join(f"{url}: {failure}" for url, failure in failures.items())
    if all(failure.is_slow for failure in failures.values()):
        return BackendError(f"No vLLM server answered in time ({tried}): raise --first-token-timeout-s, or start more servers and name each with --vllm-url.")
    return BackendError(f"No vLLM server answered ({tried}): check --vllm-url and the server's log, or start one with  {SERVE}.")


def _transport_failure(error: Exception) -> _Failure:
    """What went wrong beneath HTTP; `Connect…` errors come before a connection, SSEError is about what came over it."""
    name, said = type(error).__name__, _line(str(error))
    kind = "no connection" if name.startswith("Connect") else "" if name == "SSEError" else "the connection broke"
    return _Failure(", ".join(filter(None, (kind, said))))


def _message(content: bytes) -> str:
    """The message of an error reply: {"error": {"message": …}}, {"error": …}, or else its text."""
    text = content.decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        return _line(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError):
        return _line(text)


def _line(text: str) -> str:
    return " ".join(str(text).split())[:200].rstrip(" .")


def _authorization(key: str) -> dict[str, str]:
    """The header for a key. Raises InputError, which does not show it, for one that no header can hold."""
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError("The key of vLLM must be printable ASCII text: check the variable VLLM_API_KEY.")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _import_httpx() -> Any:
    try:
        import httpx2
    except ImportError as error:
        raise missing_extra("httpx2", "vllm", "The vLLM engine") from error
    return httpx2
