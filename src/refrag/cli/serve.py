"""`refrag serve`."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from ..config import LOOPBACK
from ..errors import InputError, NotFoundError
from ..server.settings import ServerSettings
from .options import EngineOptions, Messages, ModelOptions

API_KEY = "REFRAG_API_KEY"


@dataclass(frozen=True)
class Serve:
    """Answer over HTTP in OpenAI's shape, until SIGTERM or Ctrl-C: accepted requests are finished first.

    POST /v1/chat/completions, /v1/completions, /v1/answer, /v1/passages, /v1/passages/search; GET /v1/models, /health, /ready,
    /metrics, /docs. The API key, if there is to be one, is read from the variable REFRAG_API_KEY or from --api-key-file.
    """

    model: ModelOptions
    engine: EngineOptions
    limits: ServerSettings
    messages: Messages
    index: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Folder of the index to retrieve from; without one, requests bring their passages."""
    reranker: str | None = None
    """Cross-encoder that reorders the passages found: folder or name."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: every network of this machine."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    api_key_file: Path | None = None
    """File whose first line is the key that requests must send as a bearer token; /health, /ready and /metrics need none."""
    page: bool = False
    """Show the live page of `refrag ui` under /ui too. It has no password, so it is refused beside an API key."""
    otel: bool = False
    """Send OpenTelemetry spans where the variables OTEL_EXPORTER_OTLP_… say."""

    def run(self) -> int:
        """Loads everything, says where it listens, and serves."""
        console = self.messages.console()
        if not 0 <= self.port <= 65535:
            raise InputError(f"port must lie between 0 and 65535, was {self.port}.")
        key = self._api_key()
        if self.page and key is not None:
            raise InputError("The page under /ui asks for no key, and this server has one: leave --page out, or run  refrag ui  beside it.")
        if key is None and self.host not in LOOPBACK:
            logging.getLogger("refrag").warning("Whoever reaches %s can use this server: set %s, or listen on 127.0.0.1.", self.host, API_KEY)
        from ..server import create_app, run  # ahead of the model: a missing extra is said at once
        from ..server.running import guarded
        from ..server.tracing import otlp_tracer

        tracer = otlp_tracer() if self.otel else None
        from ..engine import Refrag
        from ..index import PassageIndex

        if self.index is not None:
            PassageIndex.open(self.index)
        backend = self.engine.backend()
        of_page = self.engine.backend() if self.page else None  # one of its own: a backend belongs to one event loop
        engine = Refrag(self.model.load(for_backend=backend is not None), index=self.index, reranker=self.reranker, backend=of_page)
        settings = guarded(self.limits, self.host, model=self.model.model)
        app = create_app(engine, settings, api_key=key, tracer=tracer, backend=backend)
        if self.page:
            from ..page import mount

            mount(app, engine)
        address = f"[{self.host}]" if ":" in self.host else self.host
        run(app, settings, host=self.host, port=self.port, started=lambda port: console.print(f"Serving {settings.model_name} on http://{address}:{port} (docs: /docs)"))
        return 0

    def _api_key(self) -> str | None:
        """The key, or None. Raises InputError for an empty one and NotFoundError for a file that is not there."""
        key = os.environ.get(API_KEY)
        if self.api_key_file is not None:
            if not self.api_key_file.is_file():
                raise NotFoundError(f"There is no file {self.api_key_file}: check --api-key-file.")
            key = self.api_key_file.read_text(encoding="utf-8").partition("\n")[0]
        if key is None:
            return None
        if not key.strip() or not key.isascii():
            where = f"--api-key-file {self.api_key_file}" if self.api_key_file else API_KEY
            raise InputError(f"The API key must be some ASCII characters, {where} holds none or others: write one there.")
        return key.strip()
