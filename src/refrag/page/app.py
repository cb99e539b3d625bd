"""The live page as a Gradio app: `mount` puts it into a FastAPI app, `serve` runs it alone."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from typing import Any

from ..config import LOOPBACK, POLICIES, GenerationSettings
from ..errors import InputError, missing_extra
from .views import Reading, View, views

MAX_TOP_K = 32
SLIDER_STEP = 0.01
OWN_POLICY = "model's own"
HINT = View(answer='<p class="rf-note">Ask a question: the answer, what it was read from and what it cost appear here.</p>')

POLICY_OF_CONTENT = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio compiles its own templates; values are not compiled
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "base-uri 'self'",
        "object-src 'none'",
        "frame-ancestors 'self'",
    )
)
"""Sent with the page: a browser then asks no other host for anything, whatever Gradio's page names."""


def mount(app: Any, engine: Any, *, path: str = "/ui", reading: Reading | None = None, examples: Sequence[str] = ()) -> None:
    """Put the page of an engine that has an index into a FastAPI app. `reading` is what the controls start with.

    One question is answered both ways before, so that no visitor's first figures are those of loading.
    Raises InputError for an engine without an index, MissingExtraError without Gradio.
    """
    if engine.index is None:
        raise InputError("The page asks about an index, this engine has none: build it with  Refrag.from_pretrained(…, index=…).")
    gradio = _gradio()
    reading = reading or Reading()
    _warm_up(engine, reading)
    gradio.mount_gradio_app(
        app,
        _page(gradio, engine, reading, examples),
        path=path,
        theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="green"),
        css=(files("refrag.page") / "page.css").read_text(encoding="utf-8"),
        footer_links=[],
        run_history=False,  # else questions and answers stay in the browser
        ssr_mode=False,
        app_kwargs={"middleware": [_middleware()]},
        show_error=False,
    )


def serve(engine: Any, listener: socket.socket, *, started: Callable[[], object], **how: Any) -> None:
    """Serve the page on a listening socket until the process is told to stop; `how` goes to `mount`. `started` is called before."""
    app = page_app(engine, host=listener.getsockname()[0], **how)
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    started()
    server.run(sockets=[listener])


def page_app(engine: Any, *, host: str, **how: Any) -> Any:
    """An application of the page alone. Bound to this machine's own address (`host`) it answers to this machine's names only: a web page elsewhere could
    otherwise reach it by a name that it points here."""
    _gradio()
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if host in LOOPBACK:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"], www_redirect=False)
    mount(app, engine, path="/", **how)
    return app


def _warm_up(engine: Any, reading: Reading) -> None:
    once = replace(reading, top_k=1, generation=GenerationSettings(max_new_tokens=1))
    for _ in views(engine, "Is it warm?", once):
        pass


def check_installed() -> None:
    """Raises MissingExtraError without Gradio."""
    _gradio()


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise missing_extra("gradio", "ui", "The live page") from error
    return gradio


def _middleware() -> Any:
    from starlette.middleware import Middleware

    return Middleware(_LockedIn)


class _LockedIn:
    """ASGI middleware that adds the content policy to every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def locked(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY_OF_CONTENT.encode()), (b"referrer-policy", b"no-referrer")]
            await send(message)

        await self.app(scope, receive, locked)


def _page(gradio: Any, engine: Any, reading: Reading, examples: Sequence[str]) -> Any:
    """The Blocks of the page."""

    def show(question: str | None, policy: str, fraction: float, top_k: float, compare: bool) -> Iterator[tuple[str, str, str, str]]:
        untouched = reading.expand_fraction is None and abs(fraction - own_fraction) <= SLIDER_STEP / 2 + 1e-9  # the slider rounds
        chosen = Reading(None if policy == OWN_POLICY else policy, None if untouched else fraction, int(top_k), reading.mode, reading.generation)
        shown = views(engine, question, chosen, compare=compare) if question and question.strip() else iter([HINT])
        for view in shown:
            yield view.answer, view.plain, view.figures, view.passages

    learned = engine.model.has_trained_policy
    policies = [OWN_POLICY, *(name for name in POLICIES if name != "all" and (name != "learned" or learned))]
    own_fraction = engine.model.config.expand_fraction
    fraction = own_fraction if reading.expand_fraction is None else reading.expand_fraction
    most = max(2, min(MAX_TOP_K, engine.index.count))  # a slider needs two ends
    with gradio.Blocks(title="refrag", analytics_enabled=False) as page:
        gradio.HTML(_header(engine), elem_id="rf-header")
        with gradio.Row():
            question = gradio.Textbox(label="Question", placeholder="Ask about the passages", max_lines=4, max_length=4000, autofocus=True, scale=8, elem_id="rf-question")
            ask = gradio.Button("Ask", variant="primary", scale=1, min_width=96, elem_id="rf-ask")
        if examples:
            gradio.Examples([[example] for example in examples], [question], label="For example", cache_examples=False)
        with gradio.Row():
            controls = [
                gradio.Dropdown(policies, value=reading.policy or OWN_POLICY, label="Policy", info="who decides which chunks are expanded", min_width=200, elem_id="rf-policy"),
                gradio.Slider(0, 1, value=fraction, step=SLIDER_STEP, label="Budget", info="share of the chunks that may be expanded", min_width=200, elem_id="rf-budget"),
                gradio.Slider(1, most, value=min(reading.top_k, most), step=1, label="Passages", info="how many to retrieve (top-k)", min_width=200, elem_id="rf-top-k"),
                gradio.Checkbox(value=True, label="Compare with plain RAG", min_width=200, elem_id="rf-compare"),
            ]
        with gradio.Row():
            answers = [_column(gradio, "REFRAG", HINT.answer, "rf-ours"), _column(gradio, "Plain RAG", "", "rf-plain")]
        outputs = [*answers, gradio.HTML(elem_id="rf-figures"), gradio.HTML(elem_id="rf-passages")]
        policy, budget, top_k, compare = controls
        triggers = [ask.click, question.submit, policy.input, budget.input, top_k.input, compare.input]
        gradio.on(triggers, show, [question, *controls], outputs, trigger_mode="always_last", show_progress="hidden", api_visibility="private")
    return page.queue(max_size=32)


def _column(gradio: Any, title: str, html: str, name: str) -> Any:
    with gradio.Column(min_width=280, elem_classes="rf-column"):
        gradio.HTML(f"<h2>{title}</h2>")
        return gradio.HTML(html, elem_id=name, min_height=56)


def _header(engine: Any) -> str:
    name = escape(os.path.basename(engine.index.manifest.model_name) or "a model made in memory")
    return f'<h1>refrag</h1><p class="rf-note">{engine.index.count:,} passages · read by {name} in chunks of {engine.model.config.chunk_size} tokens</p>'
