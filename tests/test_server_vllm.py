"""The server over a vLLM server: what a client gets is what the decoder in this process would have said."""

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx2")

from serving import serving
from test_engine_vllm import GREEDY, RECORDING, Reply, closed_url, event, recorded
from test_engine_vllm import serving as replaying

from refrag import Refrag, VllmBackend, VllmSettings
from refrag.cli import main
from refrag.engine.reader import load_reader

ASKED = RECORDING["asked"]


def test_the_server_answers_with_what_vllm_decodes() -> None:
    here = Refrag.from_pretrained("bundled", device="cpu").answer(**ASKED, generation=GREEDY)
    body = {"question": ASKED["question"], "documents": ASKED["passages"], "policy": ASKED["policy"], "max_tokens": GREEDY.max_new_tokens, "stop": "\n"}
    with replaying(recorded("answer")) as vllm:
        engine, backend = Refrag(load_reader("bundled", device="cpu")), VllmBackend(VllmSettings(vllm.url))
        with serving(engine, backend=backend) as served:
            assert served.get("/health").json()["backend"] == "vllm"
            reply = served.post("/v1/answer", body)
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    assert answer["text"] == here.text and answer["citations"] == list(here.citations)
    assert answer["usage"]["context_slots"] == here.usage["context_slots"]


def test_a_vllm_server_that_is_away_is_a_503_and_no_ready(caplog) -> None:
    engine, backend = Refrag(load_reader("bundled", device="cpu")), VllmBackend(VllmSettings(closed_url()))
    with serving(engine, backend=backend) as served:
        assert served.get("/ready").status_code == 503
        reply = served.post("/v1/answer", {"question": ASKED["question"], "documents": ASKED["passages"], "policy": "none"})
        ready = served.get("/ready")
    for own in (reply, ready):
        assert own.status_code == 503 and "127.0.0.1" not in own.text and own.json()["error"]["message"].startswith("The engine that decodes cannot")
    assert "No vLLM server answered" in caplog.text


def test_what_is_wrong_with_vllm_is_not_the_clients_fault(caplog) -> None:
    ask = {"question": ASKED["question"], "documents": ASKED["passages"], "policy": "none"}
    cases = [
        (event(10**30), 503, "backend_failed", "The engine that decodes cannot take this request now: try again later; the server's log says why."),
        (event(5, 5, reason="length"), 400, "context_length_exceeded", "The prompt and its answer are too long for the vLLM server (it had room for 2 of 64 tokens): lower top_k or max_tokens."),
    ]
    for reply, status, code, message in cases:
        with replaying(Reply(reply)) as vllm:
            engine, backend = Refrag(load_reader("bundled", device="cpu")), VllmBackend(VllmSettings(vllm.url))
            with serving(engine, backend=backend) as served:
                answered = served.post("/v1/answer", ask)
        assert answered.status_code == status and answered.json()["error"]["code"] == code
        assert answered.json()["error"]["message"] == message
    assert f"the backend gave {10**30}" in caplog.text


def test_serve_refuses_before_the_model_is_loaded(capsys) -> None:
    assert main(["serve", "--engine", "vllm", "--vllm-url", closed_url(), "--model", "./absent"]) == 2
    assert "No vLLM server answered" in capsys.readouterr().err
