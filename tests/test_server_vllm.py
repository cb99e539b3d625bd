"""The server over a vLLM server: what a client gets is what the decoder in this process would have said."""

from dataclasses import replace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx2")

from serving import serving
from test_engine_vllm import GREEDY, RECORDING, Reply, closed_url, decode, event, failure, recorded
from test_engine_vllm import serving as replaying

from refrag import Refrag, VllmBackend, VllmSettings
from refrag.cli import main
from refrag.engine.reader import load_reader
from refrag.errors import BackendError, MismatchError

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


def test_ids_that_the_decoder_does_not_have_are_another_decoders() -> None:
    reply = 'data: {"choices":[{"token_ids":[2261],"finish_reason":null}]}\n\n'
    with replaying(Reply(reply)) as served:
        engine = Refrag.from_pretrained("bundled", device="cpu", backend=VllmBackend(VllmSettings(served.url)))
        with pytest.raises(MismatchError, match=r"Token ids must be below 2261, the backend gave 2261: it has another decoder, start vLLM with what  refrag export decoder  writes\."):
            engine.answer(**RECORDING["asked"] | {"generation": GREEDY})


@pytest.mark.parametrize("reply", [event(*[5] * 500), event(5) * 500, event(*[5] * 20) * 500 + event(5, reason="stop")])
def test_a_server_that_decodes_too_much_is_cut_off(reply: str) -> None:
    with replaying(Reply(reply)) as served:
        assert decode(VllmBackend(VllmSettings(served.url)), settings=replace(GREEDY, max_new_tokens=8)) == [5] * 8


def test_events_without_tokens_are_no_sign_of_life() -> None:
    with replaying(Reply(event() * 3, stall=True)) as served:
        said = failure(BackendError, served.url, first_token_timeout_s=0.3, token_timeout_s=60.0)
    assert said.startswith("No vLLM server answered in time (A: no first token within 0.3 s)")


def test_serve_refuses_before_the_model_is_loaded(capsys) -> None:
    assert main(["serve", "--engine", "vllm", "--vllm-url", closed_url(), "--model", "./absent"]) == 2
    assert "No vLLM server answered" in capsys.readouterr().err
