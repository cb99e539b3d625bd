"""The vLLM engine over real HTTP: a small server replays what a real vLLM server said (tests/data/vllm.json), or fails as one does.

`benchmarks/vllm_server.py` recorded it; `pytest -m vllm` asks real servers.
"""

import asyncio
import base64
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from refrag.cli import main
from refrag.config import GenerationSettings, VllmSettings
from refrag.engine import Refrag, VllmBackend
from refrag.engine.backend import Backend
from refrag.engine.limits import PromptTooLongError
from refrag.engine.vllm import request_body
from refrag.errors import BackendError, InputError, MismatchError, MissingExtraError, RefragError
from refrag.evaluation.provenance import read_result

ROOT = Path(__file__).parents[1]
RECORDING = json.loads((ROOT / "tests" / "data" / "vllm.json").read_text(encoding="utf-8"))
EXCHANGES = RECORDING["exchanges"]
GREEDY = GenerationSettings(max_new_tokens=32, stop=("\n",))
EMBEDS = torch.zeros(2, 8)


@dataclass
class Reply:
    """What the server does with one request."""

    content: str
    status: int = 200
    content_type: str = "text/event-stream; charset=utf-8"
    events: int | None = None
    """Events of the content to send before the connection is dropped."""
    stall: bool = False
    """Wait for the client to go away, instead of dropping it."""
    silent: bool = False
    """Wait before anything is sent."""


@dataclass
class Served:
    url: str
    requests: list[bytes] = field(default_factory=list)
    headers: list[Any] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    """A client closed its connection while the server waited."""


def recorded(name: str, **changes: Any) -> Reply:
    """The reply of a recorded exchange."""
    kept = EXCHANGES[name]
    return replace(Reply(kept["reply"], kept["status"], kept["content_type"]), **changes)


@contextmanager
def serving(*replies: Reply) -> Iterator[Served]:
    """A server that gives the replies in turn, the last one for ever."""
    script = list(replies)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            served.requests.append(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            served.headers.append(self.headers)
            reply = script.pop(0) if len(script) > 1 else script[0]
            if reply.silent:
                self._wait()
                return
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.content_type)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            pieces = [f"{piece}\n\n" for piece in reply.content.split("\n\n") if piece]
            for piece in pieces[: reply.events]:
                self.wfile.write(f"{len(piece.encode()):x}\r\n{piece}\r\n".encode())
            self.wfile.flush()
            if reply.stall:
                self._wait()
            elif reply.events is None:
                self.wfile.write(b"0\r\n\r\n")
            else:
                self.close_connection = True

        def _wait(self) -> None:
            if not self.connection.recv(1):
                served.gone.set()
            self.close_connection = True

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Served(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


def closed_url() -> str:
    """An address at which nobody listens."""
    with serving(Reply("")) as served:
        return served.url


def decode(backend: VllmBackend, embeds: torch.Tensor = EMBEDS, settings: GenerationSettings = GREEDY) -> list[int]:
    """All token ids of one prompt."""

    async def run() -> list[int]:
        async with aclosing(backend.decode(embeds, settings)) as runs:
            ids = [token_id async for some in runs for token_id in some]
        await backend.aclose()
        return ids

    return asyncio.run(run())


def failure(kind: type[RefragError], *urls: str, **settings: Any) -> str:
    """The sentence of the error that decoding ends with, of exactly this kind; addresses are written A, B, …"""
    with pytest.raises(RefragError) as caught:
        decode(VllmBackend(VllmSettings(urls, **settings)))
    assert type(caught.value) is kind
    said = str(caught.value)
    for url, letter in zip(urls, "ABC", strict=False):
        said = said.replace(url, letter)
    return said


def embeds_of(body: str | bytes) -> torch.Tensor:
    return torch.load(io.BytesIO(base64.b64decode(json.loads(body)["prompt_embeds"])), weights_only=True)


# ── what a real server said ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_recording_names_its_server() -> None:
    assert RECORDING["vllm_version"].count(".") == 2
    assert RECORDING["provenance"]["versions"]["torch"]


@pytest.mark.parametrize("name", ["answer", "cut_short", "sampled"])
def test_our_request_is_the_recorded_one_byte_for_byte(name: str) -> None:
    kept = EXCHANGES[name]
    settings = GenerationSettings(**kept["settings"] | {"stop": tuple(kept["settings"]["stop"])})
    made = request_body(embeds_of(kept["request"]), settings).decode()
    if torch.__version__.split("+")[0] != RECORDING["provenance"]["versions"]["torch"].split("+")[0]:  # another may write tensors otherwise
        made, kept = ({**json.loads(body), "prompt_embeds": embeds_of(body).tolist()} for body in (made, kept["request"]))
        assert made == kept
    else:
        assert made == kept["request"]


def test_a_view_is_sent_without_what_it_is_a_part_of() -> None:
    whole = torch.arange(5000 * 8.0).view(5000, 8)
    body = request_body(whole[:2], GREEDY)
    assert len(body) < 4000
    assert torch.equal(embeds_of(body), whole[:2])
    assert embeds_of(request_body(whole[:2].bfloat16(), GREEDY)).dtype == torch.bfloat16


def test_the_engine_asks_as_recorded_and_answers_as_this_process_does() -> None:
    asked = RECORDING["asked"] | {"generation": GREEDY}
    here = Refrag.from_pretrained("bundled", device="cpu").answer(**asked)
    with serving(recorded("answer")) as served:
        engine = Refrag.from_pretrained("bundled", device="cpu", backend=VllmBackend(VllmSettings(served.url)))
        there = engine.answer(**asked)
        with engine.stream(**asked) as stream:
            pieces = list(stream)
    assert there.text and there.text == here.text == "".join(pieces)
    assert (there.citations, there.usage, there.finish_reason) == (here.citations, here.usage, "stop")
    assert len(pieces) > 1
    sent, kept = (json.loads(body) for body in (served.requests[0], EXCHANGES["answer"]["request"]))
    torch.testing.assert_close(embeds_of(served.requests[0]), embeds_of(EXCHANGES["answer"]["request"]), atol=1e-4, rtol=1e-4)
    assert sent | {"prompt_embeds": ""} == kept | {"prompt_embeds": ""}


def test_ids_come_as_they_were_sent() -> None:
    events = [json.loads(line[6:]) for line in EXCHANGES["answer"]["reply"].splitlines() if line.startswith("data: {")]
    ids = [token_id for event in events for token_id in event["choices"][0]["token_ids"]]
    counts = 'data: {"choices":[],"usage":{"prompt_tokens":2}}\n\n'
    with serving(recorded("answer"), Reply(counts + EXCHANGES["answer"]["reply"])) as served:
        assert decode(VllmBackend(VllmSettings(served.url))) == decode(VllmBackend(VllmSettings(served.url))) == ids
    assert len(ids) > 3
    with serving(recorded("cut_short")) as served:
        assert decode(VllmBackend(VllmSettings(served.url)), settings=replace(GREEDY, max_new_tokens=2)) == ids[:2]


def test_it_is_a_backend_that_says_whether_it_can_decode(monkeypatch) -> None:
    async def check(*urls: str) -> None:
        backend = VllmBackend(VllmSettings(urls, connect_timeout_s=0.2))
        assert isinstance(backend, Backend)
        try:
            await backend.check()
        finally:
            await backend.aclose()

    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with serving(recorded("models")) as served:
        asyncio.run(check(served.url))
        asyncio.run(check(closed_url(), served.url))
        assert [headers["Authorization"] for headers in served.headers] == ["Bearer secret"] * 2
    with serving(Reply("", silent=True)) as slow, pytest.raises(BackendError, match=r"^No vLLM server answered \(.*: no answer within 0.2 s; .*: no connection"):
        asyncio.run(check(slow.url, closed_url()))


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────────

NOBODY = "check --vllm-url and the server's log, or start one with  vllm serve FOLDER --enable-prompt-embeds  (FOLDER by  refrag export decoder)."


@pytest.mark.parametrize(
    ("reply", "kind", "sentence"),
    [
        ("other_width", MismatchError, r"The vLLM server at A serves another decoder \(.*hidden_size 512.*hidden_size 256.*\): start it with  vllm serve FOLDER --enable-prompt-embeds  \(FOLDER by  refrag export decoder\)\."),
        ("other_model", BackendError, r"The vLLM server at A does not serve that \(HTTP 404: .*absent.*\): check --vllm-url and --vllm-model\."),
        ("too_long", PromptTooLongError, r"The prompt and its answer are too long for the vLLM server at A \(.*4096.*\): lower --top-k or --max-new-tokens, or start it with a larger --max-model-len\."),
        ("no_key", BackendError, r"The vLLM server at A refused the key \(HTTP 401: Unauthorized\): set VLLM_API_KEY to what it was started with as --api-key\."),
        ("no_embeds", BackendError, r"The vLLM server at A takes no prompt embeddings: start it again with --enable-prompt-embeds\."),
        ("died", BackendError, r"The vLLM server at A broke off after \d+ tokens \(.+\): ask again, its log may say why\."),
    ],
)  # fmt: skip
def test_what_a_real_server_refuses(reply: str, kind: type[RefragError], sentence: str) -> None:
    with serving(recorded(reply)) as served:
        assert re.fullmatch(sentence, failure(kind, served.url))
        assert len(served.requests) == 1  # what will not get better is not tried again


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        (Reply("", 500, "text/plain"), f"No vLLM server answered (A: HTTP 500): {NOBODY}"),
        (Reply('{"error": {"message": "out of\\nmemory."}}', 503, "application/json"), f"No vLLM server answered (A: HTTP 503: out of memory): {NOBODY}"),
        (Reply("<html>", 429, "text/html"), f"No vLLM server answered (A: HTTP 429: <html>): {NOBODY}"),
        (Reply("x", events=0), f"No vLLM server answered (A: the connection broke, peer closed connection without sending complete message body (incomplete chunked read)): {NOBODY}"),
        (Reply(""), f"No vLLM server answered (A: the connection was closed): {NOBODY}"),
        (Reply('data: {"error": {"message": "EngineCore died."}}\n\ndata: [DONE]\n\n'), f"No vLLM server answered (A: EngineCore died): {NOBODY}"),
        (Reply("<html>", content_type="text/html"), f"No vLLM server answered (A: Expected response with content type 'text/event-stream', got 'text/html'): {NOBODY}"),
    ],
)  # fmt: skip
def test_what_may_get_better_is_tried_once_more(reply: Reply, sentence: str) -> None:
    with serving(reply) as served:
        assert failure(BackendError, served.url) == sentence
        assert len(served.requests) == 2
    with serving(reply, recorded("answer")) as served:
        assert len(decode(VllmBackend(VllmSettings(served.url)))) > 3


def test_nobody_there() -> None:
    said = "no connection, All connection attempts failed"
    assert failure(BackendError, closed_url()) == f"No vLLM server answered (A: {said}): {NOBODY}"
    assert failure(BackendError, closed_url(), closed_url(), closed_url()) == f"No vLLM server answered (A: {said}; B: {said}; C: {said}): {NOBODY}"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "the connection broke, peer closed connection without sending complete message body (incomplete chunked read)"),
        ({"stall": True}, "no further token within 0.3 s"),
    ],
)
def test_after_the_first_token_nothing_is_tried_again(changes: dict[str, Any], reason: str) -> None:
    with serving(recorded("answer", events=3, **changes), recorded("answer")) as served:
        assert failure(BackendError, served.url, token_timeout_s=0.3) == f"The vLLM server at A broke off after 3 tokens ({reason}): ask again, its log may say why."
        assert len(served.requests) == 1


def test_a_server_that_is_slow_to_begin() -> None:
    late = "raise --first-token-timeout-s, or start more servers and name each with --vllm-url."
    for slow in (Reply("", silent=True), recorded("answer", events=0, stall=True)):
        with serving(slow) as served:
            assert failure(BackendError, served.url, first_token_timeout_s=0.3) == f"No vLLM server answered in time (A: no first token within 0.3 s): {late}"
            assert len(served.requests) == 1  # asking it again would make it slower
            assert served.gone.wait(5)
        with serving(slow) as served, serving(recorded("answer")) as other:
            assert len(decode(VllmBackend(VllmSettings((served.url, other.url), first_token_timeout_s=0.3)))) > 3


@pytest.mark.parametrize(
    "content",
    ["data: <html>\n\n", 'data: {"choices": [{"text": "Anna", "finish_reason": null}]}\n\n', 'data: {"choices": 3}\n\n', "data: 3\n\n", *(f'data: {{"choices": [{{"token_ids": {ids}, "finish_reason": null}}]}}\n\n' for ids in ("null", '["7"]', "[-5]", "[true]"))],
)
def test_replies_of_something_else(content: str) -> None:
    with serving(Reply(content)) as served:
        said = content.strip().removeprefix("data: ")
        assert failure(BackendError, served.url) == f"The server at A does not answer with token ids as vLLM does, but with {said}: check --vllm-url, or update vLLM."
    with serving(Reply("nothing here", 302, "text/plain")) as served:
        assert failure(BackendError, served.url) == "The vLLM server at A refused the request (HTTP 302: nothing here): check that --vllm-url is a vLLM server, and update it."


def test_a_setting_that_vllm_has_other_limits_for() -> None:
    said = '{"error": {"message": "temperature must be in [0, 2], got 5.0. (parameter=temperature, value=5.0)", "code": 400}}'
    with serving(Reply(said, 400, "application/json")) as served:
        assert failure(InputError, served.url) == (
            "The vLLM server at A refused the request (temperature must be in [0, 2], got 5.0. (parameter=temperature, value=5.0)): "
            "change what it names, or check --vllm-url."
        )


def test_an_answer_that_its_server_cuts_short() -> None:
    with serving(recorded("cut_short")) as served:
        said = failure(PromptTooLongError, served.url)
    assert said == "The prompt and its answer are too long for the vLLM server at A (it had room for 2 of 32 tokens): lower --top-k or --max-new-tokens, or start it with a larger --max-model-len."


def event(*token_ids: int, reason: str | None = None) -> str:
    return f"data: {json.dumps({'choices': [{'token_ids': token_ids, 'finish_reason': reason}]})}\n\n"


def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sec\nret")
    assert failure(InputError, "http://a") == "The key of vLLM must be printable ASCII text: check the variable VLLM_API_KEY."


def test_without_httpx_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    said = failure(MissingExtraError, "http://a")
    assert said == "The vLLM engine needs the package 'httpx2': install it with  pip install 'refrag[vllm]'"


def test_closing_the_backend_ends_what_it_decodes() -> None:
    async def run(number: int) -> None:
        backend = VllmBackend(VllmSettings(served.url))
        stream = backend.decode(EMBEDS, GREEDY)
        for _ in range(number):
            await anext(stream)
        waiting = asyncio.ensure_future(anext(stream))
        while len(served.requests) == 0:
            await asyncio.sleep(0.01)
        await backend.aclose()
        with pytest.raises(BackendError, match="broke off after 1 tokens" if number else "No vLLM server answered"):
            await waiting

    for number in (0, 1):
        with serving(recorded("answer", events=number, stall=True)) as served:
            asyncio.run(run(number))


# ── several servers ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_server_that_failed_is_left_alone_for_a_while() -> None:
    async def run() -> None:
        backend = VllmBackend(VllmSettings((bad.url, good.url)))
        for _ in range(3):
            async with aclosing(backend.decode(EMBEDS, GREEDY)) as runs:
                assert [token_id async for some in runs for token_id in some]
        await backend.aclose()

    with serving(Reply("", 500, "text/plain")) as bad, serving(recorded("answer")) as good:
        asyncio.run(run())
        assert (len(bad.requests), len(good.requests)) == (1, 3)


def test_each_prompt_goes_to_the_least_busy_server_and_closing_frees_it() -> None:
    async def run() -> None:
        backend = VllmBackend(VllmSettings((one.url, two.url)))
        streams = [backend.decode(EMBEDS, GREEDY) for _ in range(4)]
        for stream in streams:
            await anext(stream)
        assert (len(one.requests), len(two.requests)) == (2, 2)
        await streams[1].aclose()
        assert await asyncio.to_thread(two.gone.wait, 5)
        streams.append(backend.decode(EMBEDS, GREEDY))
        await anext(streams[-1])
        assert (len(one.requests), len(two.requests)) == (2, 3)
        reader = asyncio.ensure_future(anext(streams[0]))
        await asyncio.sleep(0.05)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert await asyncio.to_thread(one.gone.wait, 5)
        for stream in streams:
            await stream.aclose()
        await backend.aclose()

    stalled = recorded("answer", events=1, stall=True)
    with serving(stalled) as one, serving(stalled) as two:
        asyncio.run(run())


# ── the command line ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_ask_decodes_on_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = RECORDING["asked"]
    (tmp_path / "passages.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in asked["passages"]), encoding="utf-8")
    ask = ["ask", asked["question"], "--passages", str(tmp_path / "passages.jsonl"), "--policy", asked["policy"], "--stop", "\n", "--max-new-tokens", "32", "--device", "cpu"]
    assert main(ask) == 0
    here = capsys.readouterr().out
    with serving(recorded("models"), recorded("answer")) as served:
        assert main([*ask, "--engine", "vllm", "--vllm-url", f"{served.url}/v1/"]) == 0
    assert here.strip() and capsys.readouterr().out == here
    with serving(recorded("models"), recorded("answer", events=2)) as served:
        assert main([*ask, "--engine", "vllm", "--vllm-url", served.url]) == 2
    assert "refrag: The vLLM server at http://127.0.0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--engine", "vllm"], "The vLLM engine needs the address of a server: pass --vllm-url http://localhost:8000."),
        (["--vllm-url", "http://localhost:8000"], "An address of vLLM was given, but this process decodes: add --engine vllm."),
        (["--engine", "vllm", "--vllm-url", "localhost:8000"], "The address of a vLLM server must look like http://localhost:8000, was 'localhost:8000': check --vllm-url."),
        (["--engine", "vllm", "--vllm-url", "http://a:b"], "The address of a vLLM server must look like http://localhost:8000, was 'http://a:b': check --vllm-url."),
        (["--engine", "vllm", "--vllm-url", "http://a", "--token-timeout-s", "nan"], "--token-timeout-s must lie above 0, and be finite, was nan: leave it out for the usual wait."),
        (["--engine", "vllm", "--vllm-url", "CLOSED"], f"No vLLM server answered (CLOSED: no connection, All connection attempts failed): {NOBODY}"),
    ],
)
def test_ask_refuses_before_the_model_is_loaded(options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = closed_url()
    (tmp_path / "passages.txt").write_text("A passage.", encoding="utf-8")
    options = [url if word == "CLOSED" else word for word in options]
    assert main(["ask", "Why?", "--passages", str(tmp_path / "passages.txt"), "--model", "./absent", *options]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"refrag: {sentence.replace('CLOSED', url)}\n")


@pytest.mark.vllm
def test_real_servers_decode_the_same_tokens(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "vllm_server.py"), "compare", "--out", str(tmp_path / "vllm.json")]
    subprocess.run(command, check=True)
    servers = read_result(tmp_path / "vllm.json", kind="vllm")["servers"]
    assert list(servers) == ["tensor_parallel_1", "tensor_parallel_2"]
    for row in (row for server in servers.values() for row in server["policies"].values()):
        assert row["same_answers"] == row["same_token_ids_as_generate"] == row["questions"] == 100
