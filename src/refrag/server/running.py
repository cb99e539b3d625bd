"""One uvicorn process: serves until SIGTERM or SIGINT, then finishes what it accepted."""

import asyncio
import logging
import socket
from dataclasses import replace
from typing import Any

import uvicorn
from fastapi import FastAPI

from ..config import LOOPBACK
from ..errors import InputError
from .settings import ServerSettings

log = logging.getLogger(__name__)

LAST_SECONDS = 5
"""What requests that were cut off get to tell their clients so."""


class Server(uvicorn.Server):
    """Stops in two steps: accepted requests are finished, and those that are not over in time end with an error of their own."""

    def __init__(self, config: uvicorn.Config, service: Any, settings: ServerSettings) -> None:
        super().__init__(config)
        self.service, self.server_settings = service, settings

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn calls this once it was told to stop; it closes the port first and then waits."""
        self.service.stopping = True
        timer = asyncio.get_running_loop().call_later(self.server_settings.shutdown_s, self.service.cut_off)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def run(app: FastAPI, settings: ServerSettings, *, host: str = "127.0.0.1", port: int = 8000, started: Any = None) -> None:
    """Serves until a signal; `started` is called with the port once it is open (port 0 takes any free one).

    Raises InputError when the port cannot be opened.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,  # the program's own logging; uvicorn's access log holds paths, no bodies
        access_log=False,
        timeout_graceful_shutdown=int(settings.shutdown_s) + LAST_SECONDS,
        h11_max_incomplete_event_size=64 * 1024,
        server_header=False,
    )
    with _opened(host, port) as opened:
        if started is not None:
            started(opened.getsockname()[1])
        Server(config, app.state.service, settings).run(sockets=[opened])


def guarded(settings: ServerSettings, host: str, *, model: str) -> ServerSettings:
    """What the operator left open: the model's name, and that on this machine's own address only its own names are answered."""
    hosts = settings.allowed_hosts or (LOOPBACK if host in LOOPBACK else ())
    return replace(settings, allowed_hosts=hosts, model_name=settings.model_name or model)


def _opened(host: str, port: int) -> socket.socket:
    """A listening socket, before the model is loaded into a server that nobody can reach."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((host, port))
    except (OSError, OverflowError) as error:
        opened.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"The server cannot listen on {host} port {port} ({reason}): give another --port or --host.") from error
    opened.listen(2048)
    return opened
