"""A real server on a free port, in a thread of this process: what the server's tests talk to."""

import asyncio
import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import uvicorn

from refrag.server import ServerSettings, create_app
from refrag.server.running import Server


@dataclass
class Served:
    """Where it listens, and what is inside."""

    url: str
    service: Any
    server: Server
    loop: asyncio.AbstractEventLoop

    def post(self, path: str, body: Any = None, **options: Any) -> httpx2.Response:
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        return httpx2.post(self.url + path, timeout=120, **content, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=120, **options)

    def events(self, path: str, body: Any) -> list[Any]:
        """What a stream holds, event by event; the last one is the text [DONE] where it came."""
        response = self.post(path, body | {"stream": True})
        assert response.headers["content-type"].startswith("text/event-stream"), response.text
        blocks = response.text.strip().split("\n\n")
        assert all(block.startswith("data: ") for block in blocks)
        return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


@contextmanager
def serving(engine: Any, settings: ServerSettings | None = None, **options: Any) -> Generator[Served]:
    """Serves `engine` while the block runs, then stops as after SIGTERM."""
    settings = settings or ServerSettings(model_name="tiny")
    app = create_app(engine, settings, **options)
    server = Server(uvicorn.Config(app, port=0, log_config=None, access_log=False), app.state.service, settings)
    started = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.005)
        started.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(120)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Served(f"http://127.0.0.1:{port}", app.state.service, server, loops[0])
    finally:
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive()
