"""`refrag ui`: the live page."""

import errno
import logging
import signal
import socket
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ..errors import InputError
from .ask import Decoding
from .options import Messages, ModelOptions

logger = logging.getLogger(__name__)

LOCAL = "127.0.0.1", "::1", "localhost"
NUM_CASES = 20
"""Questions of the invented world, eight passages each."""
NUM_EXAMPLES = 6


@dataclass(frozen=True)
class Ui:
    """Open a page to ask questions: answers, the passages with what was expanded, and plain RAG beside it.

    Without an index the page asks about an invented world, like `refrag demo`. Its address is printed on stdout.
    """

    decoding: Decoding
    model: ModelOptions
    messages: Messages
    index: str | None = None
    """Folder of the index to ask about, or an object store's address."""
    mode: Literal["dense", "text", "hybrid"] = "dense"
    """Retrieval by meaning, by words (BM25), or by both."""
    host: str = "127.0.0.1"
    """Address to listen on. The page has no password: whoever reaches it can read the index."""
    port: int = 7860
    """Port to listen on; 0: any free one."""

    def run(self) -> int:
        """Serve until interrupted."""
        console = self.messages.console()
        from ..page import Reading, check_installed, serve

        check_installed()
        with _listening(self.host, self.port) as listener:
            from ..engine import Refrag
            from ..index import PassageIndex

            if self.index is not None:  # what can be refused is refused before the model is loaded
                PassageIndex.open(self.index)
            model = self.model.load()
            with _world(model, console) if self.index is None else nullcontext((self.index, ())) as (index, examples):
                engine = Refrag(model, index=index)
                if self.host not in LOCAL:
                    logger.warning("The page has no password, and %s can be reached from other machines.", self.host)
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # uvicorn passes it on; temporary folders go
                reading = Reading(mode=self.mode, generation=self.decoding)
                serve(engine, listener, reading=reading, examples=examples, started=lambda: print(_address(listener), flush=True))
        return 0


@contextmanager
def _listening(host: str, port: int) -> Generator[socket.socket]:
    """A socket that listens. Raises InputError when the address cannot be had."""
    if not 0 <= port < 2**16:
        raise InputError(f"--port must lie between 0 and {2**16 - 1}, was {port}.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"Port {port} is in use: choose another with --port, or 0 for any free one.") from error
        raise InputError(f"{host} port {port} cannot be listened on ({error.strerror}): check --host and --port.") from error
    with listener:
        yield listener


@contextmanager
def _world(model: Any, console: Console) -> Generator[tuple[Any, list[str]]]:
    """A temporary index of the held-out almanac, and questions about it."""
    from ..demo.almanac import evaluation_cases
    from ..demo.run import index_cases

    cases = list(evaluation_cases(NUM_CASES))
    with tempfile.TemporaryDirectory() as folder:
        index, _ = index_cases(model, cases, Path(folder), console=console)
        yield index, [question.text for _, question in cases[:NUM_EXAMPLES]]


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
