"""The server over HTTP, as clients see it: a real uvicorn on a free port, the official openai client, and raw requests."""

import asyncio
import json
import logging
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx2
import openai
import pytest
from serving import Served, serving

from refrag import GenerationSettings, Passage, PassageIndex, Refrag, Turn
from refrag.demo.almanac import evaluation_cases
from refrag.engine import Request
from refrag.errors import BackendError
from refrag.server import ServerSettings
from refrag.server.tracing import Tracer

QUESTION = "Who founded the harbour of Velmoor?"
HARBOUR = Passage("velmoor", "The harbour of Velmoor was founded in 1742 by the shipwright Anna Torrel.", "Velmoor", {"year": 1742})
LAMP = Passage("lamp", "A lighthouse was built beside the old mill; its lamp burned for ninety years.", "Lamp")
DOCUMENTS = [{"id": own.id, "text": own.text, "title": own.title} for own in (HARBOUR, LAMP)]
ASK = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8}
CHAT = "/v1/chat/completions"
SETTINGS = ServerSettings(model_name="tiny", allow_writes=True, allow_filters=True)


@pytest.fixture(scope="module")
def engine(tiny_model, tmp_path_factory) -> Refrag:
    index = PassageIndex.create(tmp_path_factory.mktemp("served") / "index", tiny_model)
    index.add([HARBOUR, LAMP])
    return Refrag(tiny_model, index=index)


@pytest.fixture(scope="module")
def served(engine: Refrag):
    with serving(engine, SETTINGS) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)


def answer_of(engine: Refrag, *args, **options):
    return engine.answer(*args, **({"max_new_tokens": 8} | options))


# ── the official client ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_chat_is_the_engines_answer(client: openai.OpenAI, engine: Refrag) -> None:
    budget = {"policy": "first", "expand_chunks": 2}
    reply = client.chat.completions.create(model="tiny", **ASK, extra_body={"documents": DOCUMENTS, **budget, "trace": True})
    expected = answer_of(engine, QUESTION, [HARBOUR, LAMP], policy="first", expand_chunks=2)
    assert reply.choices[0].message.content == expected.text and reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == expected.finish_reason
    assert reply.id.startswith("chatcmpl-") and reply.model == "tiny"
    usage = expected.usage
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (usage["prompt_slots"], usage["completion_tokens"])
    assert reply.usage.total_tokens == usage["prompt_slots"] + usage["completion_tokens"]
    assert reply.usage.prompt_tokens_details.model_extra == {
        "context_tokens": usage["context_tokens"],
        "context_slots": usage["context_slots"],
        "compressed_chunks": usage["num_chunks"] - 2,
        "expanded_chunks": 2,
        "compression_rate": usage["compression_rate"],
    }
    assert reply.refrag["citations"] == list(expected.citations)
    assert reply.refrag["passages"] == expected.passages and reply.refrag["trace"] == expected.trace


def test_a_streamed_chat_is_the_same_in_pieces(client: openai.OpenAI, engine: Refrag) -> None:
    options = {"documents": DOCUMENTS, "policy": "none"}
    stream = client.chat.completions.create(model="tiny", **ASK, stream=True, stream_options={"include_usage": True}, extra_body=options)
    chunks = list(stream)
    expected = answer_of(engine, QUESTION, [HARBOUR, LAMP], policy="none")
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + [expected.finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage.prompt_tokens == expected.usage["prompt_slots"]
    assert chunks[-2].refrag["passages"] == expected.passages
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 4


def test_completions_whole_and_streamed(client: openai.OpenAI, served: Served, engine: Refrag) -> None:
    expected = answer_of(engine, QUESTION, [HARBOUR])
    options = {"model": "tiny", "prompt": QUESTION, "max_tokens": 8, "extra_body": {"documents": [HARBOUR.text]}}
    expected = answer_of(engine, QUESTION, [HARBOUR.text])
    reply = client.completions.create(**options)
    assert reply.choices[0].text == expected.text and reply.object == "text_completion"
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)) == expected.text
    events = served.events("/v1/completions", {"prompt": [QUESTION], "documents": [HARBOUR.text], "max_tokens": 8})
    assert events[-1] == "[DONE]" and events[-2]["choices"][0]["finish_reason"] == expected.finish_reason


def test_models_and_the_asynchronous_client(client: openai.OpenAI, served: Served, engine: Refrag) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]

    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none") as own:
            return (await own.chat.completions.create(model="tiny", **ASK, extra_body={"documents": []})).choices[0].message.content

    assert asyncio.run(ask()) == answer_of(engine, QUESTION, []).text


def test_the_clients_errors_are_openais(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=ASK["messages"], extra_body={"top_n": 3})
    assert refused.value.code == "extra_forbidden" and refused.value.param == "top_n"
    with pytest.raises(openai.NotFoundError, match=r"^.*This server has no model of that name: ask for 'tiny'\."):
        client.chat.completions.create(model="gpt-7", **ASK)


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_documents_the_index_is_asked(served: Served, engine: Refrag) -> None:
    body = served.post("/v1/chat/completions", ASK | {"top_k": 1}).json()
    expected = answer_of(engine, QUESTION, top_k=1)
    assert body["choices"][0]["message"]["content"] == expected.text
    assert body["refrag"]["passages"] == expected.passages and expected.passages[0]["id"] == "velmoor"
    filtered = served.post("/v1/chat/completions", ASK | {"where": "id = 'lamp'", "mode": "text"}).json()
    assert [passage["id"] for passage in filtered["refrag"]["passages"]] in ([], ["lamp"])


def test_documents_may_be_named_by_their_id(served: Served, engine: Refrag) -> None:
    body = served.post("/v1/chat/completions", ASK | {"documents": [{"id": "lamp"}, HARBOUR.text]}).json()
    expected = answer_of(engine, QUESTION, [LAMP, HARBOUR.text])
    assert body["choices"][0]["message"]["content"] == expected.text
    assert [passage["id"] for passage in body["refrag"]["passages"]] == ["lamp", "2"]


def test_passages_of_the_history_are_compressed_where_they_stand(served: Served, engine: Refrag) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How long did the lamp burn?", "documents": [DOCUMENTS[1]]},
        {"role": "assistant", "content": [{"type": "text", "text": "Ninety "}, {"type": "text", "text": "years."}]},
        {"role": "user", "content": QUESTION, "documents": [DOCUMENTS[0]]},
    ]
    body = served.post("/v1/chat/completions", {"messages": messages, "max_tokens": 8, "policy": "none"}).json()
    history = [Turn("user", "How long did the lamp burn?", [LAMP]), Turn("assistant", "Ninety years.")]
    expected = answer_of(engine, QUESTION, [HARBOUR], history=history, system="Be brief.", policy="none")
    assert body["choices"][0]["message"]["content"] == expected.text
    assert body["usage"]["prompt_tokens"] == expected.usage["prompt_slots"]
    assert body["usage"]["prompt_tokens_details"]["compressed_chunks"] == expected.usage["num_chunks"]


def test_sampling_is_the_engines_own(served: Served, engine: Refrag) -> None:
    options = {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 11}
    body = served.post("/v1/chat/completions", ASK | options | {"documents": [], "sample_top_k": 30, "stop": ["zz", "qq"]}).json()
    settings = GenerationSettings(max_new_tokens=8, top_k=30, stop=("zz", "qq"), **options)
    assert body["choices"][0]["message"]["content"] == engine.answer(Request(QUESTION, [], generation=settings)).text


def test_answer_is_the_whole_answer(served: Served, engine: Refrag) -> None:
    options = {"policy": "similarity", "expand_fraction": 0.5}
    body = served.post("/v1/answer", {"question": QUESTION, "documents": DOCUMENTS, "max_tokens": 8, "system": "Be brief.", **options}).json()
    expected = answer_of(engine, QUESTION, [HARBOUR, LAMP], system="Be brief.", **options).to_dict()
    assert body.keys() == expected.keys()
    timings = body.pop("timings"), expected.pop("timings")
    scores = [[entry.pop("score") for entry in own["trace"]] for own in (body, expected)]
    assert body == expected
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert timings[0].keys() == timings[1].keys() and timings[0]["total_s"] >= timings[0]["ttft_s"] > 0


# ── the index ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_passages_are_added_changed_found_and_deleted(served: Served) -> None:
    mill = {"id": "the/mill", "text": "The mill of Ostrava grinds rye.", "title": "Mill", "metadata": {"source": "b.txt"}}
    assert served.post("/v1/passages", {"passages": [mill]}).json() == {"added": 1, "updated": 0, "unchanged": 0, "chunks": 8} | served_chunks(served, mill)
    assert served.get("/v1/passages/the/mill").json() == mill
    found = served.post("/v1/passages/search", {"question": "What does the mill grind?", "top_k": 1}).json()["data"]
    assert found[0].pop("score") > 0.3 and found == [mill]
    changed = served.post("/v1/passages", {"passages": [mill | {"text": "The mill of Ostrava grinds oats."}]}).json()
    assert (changed["added"], changed["updated"]) == (0, 1)
    trace = served.post("/v1/answer", {"question": "What does the mill grind?", "documents": [{"id": "the/mill"}], "max_tokens": 1}).json()["trace"]
    assert "".join(entry["text"] for entry in trace) == "The mill of Ostrava grinds oats."
    body = {"ids": ["the/mill", "nobody"]}
    assert httpx2.request("DELETE", served.url + "/v1/passages", json=body).json() == {"deleted": 1}
    assert served.get("/v1/passages/the/mill").status_code == 404


def served_chunks(served: Served, passage: dict) -> dict[str, int]:
    """How many chunks the model cuts a passage into."""
    return {"chunks": len(served.service.engine.builder.chunk(passage["text"]).spans)}


def test_the_index_is_changed_and_filtered_only_where_the_operator_says(engine: Refrag) -> None:
    with serving(engine, ServerSettings(model_name="tiny")) as served:
        passage = {"id": "x", "text": "y"}
        for method, path, body in (
            ("POST", "/v1/passages", {"passages": [passage]}),
            ("DELETE", "/v1/passages", {"ids": ["velmoor"]}),
            ("POST", "/v1/passages/search", {"question": "q", "where": "id = 'lamp'"}),
        ):
            refused = httpx2.request(method, served.url + path, json=body)
            assert refused.status_code == 403 and refused.json()["error"]["type"] == "permission_error"
        assert served.post("/v1/answer", {"question": "q", "where": "true"}).status_code == 403
    assert engine.index.count == 2


def test_a_server_without_an_index_needs_documents(tiny_model) -> None:
    with serving(Refrag(tiny_model)) as served:
        refused = served.post("/v1/chat/completions", ASK)
        assert refused.status_code == 400 and "send the passages as documents" in refused.json()["error"]["message"]
        assert served.post("/v1/chat/completions", ASK | {"documents": []}).status_code == 200
        assert served.post("/v1/passages/search", {"question": "q"}).status_code == 404
        assert served.get("/v1/passages/a").status_code == 404


# ── many at once ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def almanac() -> tuple[Refrag, list]:
    return Refrag.from_pretrained("bundled", device="cpu"), list(evaluation_cases(24, split="held-out", seed=3))


def test_concurrent_clients_get_the_engines_own_answers(almanac) -> None:
    engine, cases = almanac
    policies = ("learned", "none", "first", "all")
    asked = [
        (question.text, case.passages, {"policy": policies[number % 4]} | ({"temperature": 1.2, "seed": number} if number % 5 == 0 else {}))
        for number, (case, question) in enumerate(cases)
    ]
    expected = [engine.answer(text, passages, max_new_tokens=24, **options) for text, passages, options in asked]
    assert len({answer.text for answer in expected}) > 15
    with serving(engine, ServerSettings(model_name="bundled", max_running=5)) as served:

        def ask(number: int) -> tuple[str, int]:
            text, passages, options = asked[number]
            documents = [{"id": own.id, "text": own.text, "title": own.title} for own in passages]
            body = {"messages": [{"role": "user", "content": text}], "documents": documents, "max_tokens": 24, **options}
            if number % 2:
                events = served.events(CHAT, body | {"stream_options": {"include_usage": True}})
                pieces = [event["choices"][0]["delta"].get("content", "") for event in events[:-2]]
                return "".join(pieces), events[-2]["usage"]["completion_tokens"]
            reply = served.post(CHAT, body).json()
            return reply["choices"][0]["message"]["content"], reply["usage"]["completion_tokens"]

        order = random.Random(0).sample(range(len(asked)), len(asked))
        with ThreadPoolExecutor(12) as pool:
            got = dict(zip(order, pool.map(ask, order), strict=True))
    assert [got[number] for number in range(len(asked))] == [(answer.text, answer.usage["completion_tokens"]) for answer in expected]


def endless(**more) -> dict:
    """A request that decodes for a while: the random model hardly ever ends by itself."""
    return {"messages": ASK["messages"], "documents": [], "max_tokens": 400, **more}


def until(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_full_queue_says_when_to_come_back(engine: Refrag) -> None:
    with serving(engine, ServerSettings(model_name="tiny", max_running=1, max_waiting=1)) as served, ThreadPoolExecutor(2) as pool:
        replies = [pool.submit(served.post, CHAT, endless()) for _ in range(2)]
        until(lambda: (served.service.running, served.service.waiting) == (1, 1))
        refused = served.post(CHAT, ASK | {"documents": []})
        assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert served.get("/ready").status_code == 429 and served.get("/health").status_code == 200
        assert [reply.result().status_code for reply in replies] == [200, 200]
        assert served.post(CHAT, ASK | {"documents": []}).status_code == 200
        assert "refrag:requests_refused_total 1.0" in served.get("/metrics").text


def test_the_models_folder_is_not_told(almanac, tiny_model, tmp_path) -> None:
    tiny_model.save_pretrained(tmp_path / "my-model")
    for engine, name in ((almanac[0], "bundled"), (Refrag.from_pretrained(str(tmp_path / "my-model")), "my-model")):
        with serving(engine, ServerSettings()) as served:
            assert [own["id"] for own in served.get("/v1/models").json()["data"]] == [name]


def test_requests_gather_while_others_are_decoded(engine: Refrag, monkeypatch) -> None:
    short = ASK | {"documents": [], "max_tokens": 2}
    with serving(engine, ServerSettings(model_name="tiny", max_running=8)) as served, ThreadPoolExecutor(6) as pool:
        service, groups = served.service, []
        prepare = service._prepare
        monkeypatch.setattr(service, "_prepare", lambda requests: groups.append(len(requests)) or prepare(requests))
        running = [pool.submit(served.post, CHAT, endless()) for _ in range(3)]
        until(lambda: len(service.backend.batch.rows) == 3)
        groups.clear()
        service._prepare_s = 60.0  # the longest wait; it ends when as many wait as are decoded
        waiting = [pool.submit(served.post, CHAT, short) for _ in range(3)]
        assert [reply.result().status_code for reply in waiting] == [200] * 3 and (groups == [3] or all(reply.done() for reply in running))
        service._prepare_s = 0.01  # alone it waits no longer than this
        assert [served.post(CHAT, short).status_code, *(reply.result().status_code for reply in running)] == [200] * 4


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_the_decoding(served: Served, stream: bool) -> None:
    before = served.service.metrics.failed.labels("cancelled")._value.get()
    body = json.dumps(endless(stream=stream)).encode()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        until(lambda: served.service.backend.batch.rows)
    until(lambda: served.service.running == served.service.waiting == 0 and not served.service.backend.batch.rows)
    assert served.service.metrics.failed.labels("cancelled")._value.get() == before + 1


def test_a_request_that_takes_too_long_is_given_up(engine: Refrag) -> None:
    with serving(engine, ServerSettings(model_name="tiny", request_timeout_s=0.15)) as served:
        late = served.post(CHAT, endless())
        assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
        events = served.events(CHAT, endless())
        assert events[0]["choices"] and events[-1]["error"]["code"] == "timeout"
        until(lambda: not served.service.backend.batch.rows)


def test_stopping_finishes_what_runs_and_refuses_the_rest(engine: Refrag) -> None:
    with serving(engine, ServerSettings(model_name="tiny", max_running=2)) as served, ThreadPoolExecutor(4) as pool:
        streamed = [pool.submit(served.events, CHAT, endless(max_tokens=100)) for _ in range(4)]
        until(lambda: (served.service.running, served.service.waiting) == (2, 2))
        served.server.should_exit = True
        until(lambda: served.service.stopping)
        with pytest.raises(httpx2.ConnectError):
            served.post(CHAT, ASK)
        assert [events.result()[-1] for events in streamed] == ["[DONE]"] * 4


def test_what_does_not_finish_in_time_ends_with_an_error(engine: Refrag) -> None:
    with serving(engine, ServerSettings(model_name="tiny", max_running=1, shutdown_s=0.3)) as served, ThreadPoolExecutor(2) as pool:
        running = pool.submit(served.events, CHAT, endless())
        until(lambda: served.service.running == 1)
        waiting = pool.submit(served.post, CHAT, endless())
        until(lambda: served.service.waiting == 1)
        served.server.should_exit = True
        assert running.result()[-1]["error"]["message"] == "The server is shutting down: send the request again, to another one."
        assert waiting.result().status_code == 503 and waiting.result().headers["Retry-After"] == "1"


# ── what is seen from outside ────────────────────────────────────────────────────────────────────────────────────────


def value(text: str, name: str) -> float:
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"refrag:{name} "))


def test_metrics_count_what_was_asked(tiny_model) -> None:
    with serving(Refrag(tiny_model)) as served:
        body = ASK | {"documents": [HARBOUR.text], "policy": "first", "expand_chunks": 1}
        replies = [served.post(CHAT, body).json() for _ in range(3)]
        text = served.get("/metrics").text
        usage = replies[0]["usage"]
        details = usage["prompt_tokens_details"]
        assert value(text, "prompt_tokens_total") == 3 * usage["prompt_tokens"]
        assert value(text, "generation_tokens_total") == 3 * usage["completion_tokens"]
        assert value(text, "context_tokens_total") == 3 * details["context_tokens"]
        assert value(text, "expanded_chunks_total") == 3
        assert value(text, "compressed_chunks_total") == 3 * details["compressed_chunks"]
        assert value(text, "time_to_first_token_seconds_count") == value(text, "e2e_request_latency_seconds_count") == 3
        assert value(text, "inter_token_latency_seconds_count") == 3 * (usage["completion_tokens"] - 1)
        assert value(text, "num_requests_running") == value(text, "num_requests_waiting") == 0
        chunks = 1 + details["compressed_chunks"]
        assert f'chunk_vectors_total{{source="encoder"}} {chunks}.0' in text  # the first time
        assert f'chunk_vectors_total{{source="cache"}} {2 * chunks}.0' in text


@pytest.mark.parametrize("shown", [False, True])
def test_texts_are_logged_only_when_asked(engine: Refrag, caplog, shown: bool) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(engine, replace(SETTINGS, log_requests=shown)) as served:
        said = {"messages": [{"role": "user", "content": "Whispered Zanzibar?"}], "max_tokens": 4}
        served.post(CHAT, said | {"documents": ["Zanzibar is secret."]})
        served.post(CHAT, said | {"where": "id = 'Zanzibar'"})
        served.post(CHAT, said | {"max_tokens": 600, "documents": ["Zanzibar"]})
        served.post("/v1/passages/search", {"question": "Zanzibar", "where": "Zanzibar +"})
    own = [record.getMessage() for record in caplog.records if record.name.split(".")[0] in ("refrag", "uvicorn", "asyncio", "fastapi")]
    assert any("chat: " in line for line in own)
    assert any("Zanzibar" in line for line in own) == shown


def test_a_bug_is_told_in_general_words_and_logged_without_values(tiny_model, caplog, monkeypatch) -> None:
    engine = Refrag(tiny_model)

    def broken(requests):
        raise KeyError(f"secret {requests[0].question}")

    monkeypatch.setattr(engine, "prepare", broken)
    with serving(engine) as served:
        for stream in (False, True):
            failed = served.post(CHAT, ASK | {"documents": [], "stream": stream})
            assert failed.status_code == 500
            assert failed.json()["error"] == {"message": "The server failed, which is a bug: its log says where.", "type": "server_error", "param": None, "code": "internal_error"}
    assert "A bug: KeyError" in caplog.text and "in broken" in caplog.text and "secret" not in caplog.text.replace('raise KeyError(f"secret {requests[0].question}")', "")


class Failing:
    """A backend whose third token never comes."""

    name = "failing"

    async def decode(self, prompt_embeds, settings):
        for token_id in (50, 60):
            yield [token_id]
        raise BackendError("The decoder is away: try again.")

    async def check(self) -> None:
        raise BackendError("The decoder is away: try again.")

    async def aclose(self) -> None:
        pass


def test_any_backend_can_decode_and_its_failure_is_told(tiny_model) -> None:
    with serving(Refrag(tiny_model), backend=Failing()) as served:
        assert served.get("/health").json()["backend"] == "failing"
        assert served.get("/ready").status_code == 503
        failed = served.post(CHAT, ASK | {"documents": []})
        assert failed.status_code == 503 and failed.headers["Retry-After"] == "1"
        events = served.events(CHAT, ASK | {"documents": []})
        assert events[0]["choices"] and events[-1]["error"]["message"] == "The decoder is away: try again."


def test_spans_have_the_names_of_the_conventions(engine: Refrag) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serving(engine, tracer=Tracer(provider)) as served:
        reply = served.post(CHAT, ASK | {"documents": DOCUMENTS}, headers={"traceparent": parent}).json()
        served.events(CHAT, ASK | {"documents": DOCUMENTS})
        served.post("/v1/answer", {"question": QUESTION, "max_tokens": 600})
    whole, streamed, failed = exporter.get_finished_spans()
    assert [span.name for span in (whole, streamed, failed)] == ["chat tiny", "chat tiny", "answer tiny"]
    assert whole.attributes["gen_ai.operation.name"] == "chat" and whole.attributes["gen_ai.request.model"] == "tiny"
    assert whole.attributes["gen_ai.usage.input_tokens"] == reply["usage"]["prompt_tokens"] == streamed.attributes["gen_ai.usage.input_tokens"]
    assert whole.attributes["gen_ai.usage.output_tokens"] == reply["usage"]["completion_tokens"]
    assert f"{whole.context.trace_id:032x}" == parent.split("-")[1] and streamed.parent is None
    assert failed.attributes["error.type"] == "PromptTooLongError" and not failed.status.is_ok
    assert "Velmoor" not in str([span.to_json() for span in (whole, streamed, failed)])
