"""What the server refuses and gives up: bad requests of every kind, each by one sentence in OpenAI's shape, and what keys, hosts and limits forbid."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from serving import Served, serving
from test_server import ASK, CHAT, HARBOUR, LAMP, QUESTION, SETTINGS, endless, until, value

from refrag import PassageIndex, Refrag
from refrag.server import ServerSettings
from refrag.server.http import over_http

ANSWER = "/v1/answer"


@pytest.fixture(scope="module")
def engine(tiny_model, tmp_path_factory) -> Refrag:
    index = PassageIndex.create(tmp_path_factory.mktemp("refusing") / "index", tiny_model)
    index.add([HARBOUR, LAMP])
    return Refrag(tiny_model, index=index)


@pytest.fixture(scope="module")
def served(engine: Refrag):
    with serving(engine, SETTINGS) as served:
        yield served


BAD: list[tuple[str, object, int, str]] = [
    (CHAT, b"", 400, "body"),
    (CHAT, b"{", 400, "JSON decode error"),
    (CHAT, b"[" * 100_000, 400, ""),
    (CHAT, b"\xff\xfe", 400, ""),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "valid Unicode"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "documents": ["\\ud800"]}', 400, "valid Unicode"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 1}', 400, "unicode"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400, "finite"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', 400, "finite"),
    (CHAT, [], 400, "dictionary"),
    (CHAT, {}, 400, "messages: Field required"),
    (CHAT, {"messages": []}, 400, "at least 1"),
    (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, 400, "role"),
    (CHAT, {"messages": [{"role": "user", "content": "   "}]}, 400, "must hold some text"),
    (CHAT, {"messages": [{"role": "assistant", "content": "a"}]}, 400, "last message must be by the user"),
    (CHAT, {"messages": [{"role": "system", "content": "a"}]}, 400, "last message must be by the user"),
    (CHAT, {"messages": [*ASK["messages"], {"role": "system", "content": "a"}, *ASK["messages"]]}, 400, "must come before all others"),
    (CHAT, {"messages": [{"role": "system", "content": "a", "documents": ["b"]}, *ASK["messages"]]}, 400, "cannot bring documents"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "documents": []}], "documents": []}, 400, "given twice"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "content"),
    (CHAT, ASK | {"max_completion_tokens": 3}, 400, "not both"),
    (CHAT, ASK | {"n": 2}, 400, "n: this is not supported here, was 2: leave it out"),
    (CHAT, ASK | {"tools": [{"type": "function"}]}, 400, "tools: this is not supported here, was a list of 1: leave it out"),
    (CHAT, ASK | {"functions": []}, 400, "functions: there is no such field: leave it out"),
    (CHAT, ASK | {"stop": ["a"] * 17}, 400, "stop: List should have at most 16 items after validation, not 17, was a list of 17"),
    (CHAT, ASK | {"where": ""}, 400, "where: Value error, the text is blank"),
    (CHAT, ASK | {"logprobs": True}, 400, "logprobs: this is not supported here, was true"),
    (CHAT, ASK | {"passages": ["a"]}, 400, "passages: there is no such field (did you mean 'documents'?)"),
    (CHAT, {"messages": [{"role": "user", "contents": "a"}]}, 400, "messages.0.content: Field required (\"contents\" is no field)"),
    (CHAT, ASK | {"question": "a"}, 400, "question: there is no such field: leave it out"),
    (CHAT, ASK | {"metadata": {"n": 1}}, 400, "Input should be a valid string, was 1"),
    (CHAT, ASK | {"expand_fracton": 0.1}, 400, "did you mean 'expand_fraction'?"),
    (CHAT, ASK | {"temperature": "x" * 99}, 400, "xxx… (101 characters)"),
    (CHAT, ASK | {"temperature": "1"}, 400, "temperature"),
    (CHAT, ASK | {"temperature": -1}, 400, "temperature"),
    (CHAT, ASK | {"top_p": 0}, 400, "top_p"),
    (CHAT, ASK | {"seed": 2**63}, 400, "seed"),
    (CHAT, ASK | {"stop": ""}, 400, "stop"),
    (CHAT, ASK | {"stop": "x" * 201}, 400, "stop"),
    (CHAT, ASK | {"max_tokens": 0}, 400, "max_tokens"),
    (CHAT, ASK | {"max_slots": 10**30}, 400, "max_slots"),
    (CHAT, ASK | {"messages": ASK["messages"] * 1001}, 400, "messages"),
    (CHAT, ASK | {"max_tokens": 5000}, 400, "max_tokens may be at most 1024 here, was 5000."),
    (CHAT, ASK | {"max_tokens": 600}, 400, "lower top_k or lower max_tokens"),
    (CHAT, ASK | {"top_k": 0}, 400, "top_k"),
    (CHAT, ASK | {"top_k": 1000}, 400, "at most 128 passages"),
    (CHAT, ASK | {"documents": ["a"] * 129}, 400, "at most 128 passages"),
    (CHAT, ASK | {"documents": [{"title": "no text"}]}, 400, "must have a text, or the id"),
    (CHAT, ASK | {"documents": [{"id": "nobody"}]}, 400, "no passage with its id"),
    (CHAT, ASK | {"documents": [{"text": "a", "colour": "red"}]}, 400, "documents.0.colour: there is no such field"),
    (CHAT, ASK | {"documents": "text"}, 400, "documents"),
    (CHAT, ASK | {"policy": "best"}, 400, "policy"),
    (CHAT, ASK | {"policy": "learned"}, 400, "no trained policy"),
    (CHAT, ASK | {"policy": "all", "expand_chunks": 0, "documents": ["a"]}, 400, "expands all"),
    (CHAT, ASK | {"expand_fraction": 0.5, "expand_chunks": 1}, 400, "keep one"),
    (CHAT, ASK | {"expand_fraction": 1.5}, 400, "expand_fraction: Input should be less than or equal to 1, was 1.5"),
    (CHAT, ASK | {"max_slots": 1}, 400, "raise max_slots to"),
    (CHAT, ASK | {"mode": "psychic"}, 400, "mode"),
    (CHAT, ASK | {"where": "no such column = 1"}, 400, "cannot be used"),
    (CHAT, ASK | {"documents": ["word " * 2000], "policy": "all"}, 400, "positions"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 2000}], "documents": []}, 400, "positions"),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 2000}]}, 400, "window"),
    (ANSWER, b'{"question": "a", "documents": [{"id": "x\\ud800"}]}', 400, "documents.0.id: Value error, the text has half a character"),
    (CHAT, b'{"messages": [{"role": "user", "content": "a", "documents": [{"id": "\\ud800", "text": "b"}]}]}', 400, "half a character"),
    (CHAT, ASK | {"documents": [{"id": "lamp", "title": "Mine"}]}, 400, "leave title and metadata out"),
    (CHAT, ASK | {"where": "id = 'lamp'; nonsense )))"}, 400, "one condition"),
    (CHAT, ASK | {"where": "1=1) or (1=1"}, 400, "one condition"),
    (CHAT, ASK | {"where": "true /* and the rest"}, 400, "one condition"),
    (CHAT, ASK | {"logit_bias": {"1": 2.0}}, 400, "logit_bias: "),
    ("/v1/completions", {"prompt": ["a", "b"]}, 400, "prompt: List should have at most 1 item"),
    ("/v1/completions", {"prompt": "a", "echo": True}, 400, "echo"),
    (ANSWER, {"question": QUESTION, "stream": True}, 400, "there is no such field"),
    (ANSWER, {"question": 7}, 400, "question"),
    ("/v1/passages", {"passages": [{"text": "no id"}]}, 400, "id"),
    ("/v1/passages", {"passages": [{"id": "", "text": "a"}]}, 400, "id"),
    ("/v1/passages", {"passages": [{"id": "a", "text": "b"}, {"id": "a", "text": "c"}]}, 400, "two have the same"),
    ("/v1/passages", {"passages": [{"id": "a", "text": ""}]}, 400, "text"),
    ("/v1/passages", {"passages": [{"id": "a", "text": " \n"}]}, 400, "passages.0.text: Value error, the text is blank"),
    ("/v1/passages", {"passages": [{"id": "a", "text": "word " * 9000}]}, 400, "A passage may have at most 2048 tokens here, title included, 'a' has"),
    ("/v1/passages", {"passages": [{"id": "b", "text": "a"}, {"id": "a", "text": "b", "title": "word " * 9000}]}, 400, "title included, 'a' has"),
    ("/v1/passages", b'{"passages": [{"id": "a", "text": "b", "metadata": {"c": ["\\ud800"]}}]}', 400, "half a character"),
    ("/v1/passages/search", {"question": " "}, 400, "was blank"),
    ("/v1/passages/search", {"question": "a", "top_k": 129}, 400, "at most 128"),
    ("/v1/passages/search", {"question": "a", "where": "1 +"}, 400, "cannot be used"),
    ("/v1/nothing", {}, 404, "Not Found"),
    ("/v1/models", {}, 405, "Method Not Allowed"),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), BAD, ids=[f"{path.split('/')[-1]}-{number}" for number, (path, *_) in enumerate(BAD)])
def test_every_bad_request_is_refused_in_one_sentence(served: Served, path: str, body: object, status: int, words: str) -> None:
    response = served.post(path, body, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == status, error
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error" and error["code"]
    assert words in error["message"]
    assert "--" not in error["message"] or "--allow" in error["message"]


def test_where_an_error_is_without_the_parsers_words(served: Served) -> None:
    for body, place in ((b"{", None), (ASK | {"stop": [""]}, "stop.0"), (ASK | {"documents": [{"id": 1.5}]}, "documents.0.id"), (ASK | {"top_n": 1}, "top_n")):
        assert served.post(CHAT, body, headers={"Content-Type": "application/json"}).json()["error"]["param"] == place


def test_what_changes_nothing_is_accepted(served: Served) -> None:
    nothing = {"tools": [], "tool_choice": "none", "parallel_tool_calls": False, "top_logprobs": 0, "service_tier": "auto", "metadata": {}, "trace": None, "stop": None}
    assert served.post(CHAT, ASK | nothing).json()["choices"] == served.post(CHAT, ASK).json()["choices"]
    assert served.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "suffix": None, "best_of": 1, "logprobs": None}).status_code == 200
    for path in ("/health", "/ready"):
        assert httpx2.head(served.url + path).status_code == 200
    assert served.get("/redoc").status_code == 404  # it would be loaded from elsewhere


def test_errors_name_the_field_and_the_form(served: Served) -> None:
    assert served.post(CHAT, ASK | {"max_tokens": 5000}).json()["error"]["param"] == "max_tokens"
    said = httpx2.post(served.url + CHAT, content=b'{"messages": []}', headers={"Content-Type": "text/plain"}).json()["error"]["message"]
    assert said == "The body must be JSON and say so: send the header  Content-Type: application/json"
    said = served.post(CHAT, b"[" * 100_000, headers={"Content-Type": "application/json"}).json()["error"]["message"]
    assert said == "The body must be JSON in UTF-8, not nested too deeply, and its numbers not too long."


def test_the_smallest_temperatures_decode_greedily(served: Served) -> None:
    ask = {"question": QUESTION, "max_tokens": 8}
    greedy = served.post(ANSWER, ask).json()["text"]
    assert [served.post(ANSWER, ask | {"temperature": own}).json()["text"] for own in (1e-6, 1e-38, 1e-300)] == [greedy] * 3


def test_a_semicolon_in_a_filters_text_is_text(served: Served) -> None:
    assert served.post("/v1/passages/search", {"question": "a", "where": "text = 'a; b -- (c' or id = 'lamp'"}).json()["data"][0]["id"] == "lamp"


def test_the_models_own_policy_is_not_used_where_it_is_not_allowed(engine: Refrag) -> None:
    ask = {"question": QUESTION, "expand_fraction": 0.5}
    with serving(engine, ServerSettings(model_name="tiny")) as served:
        assert {entry["rule"] for entry in served.post(ANSWER, ask).json()["trace"]} == {"similarity"}
    with serving(engine, ServerSettings(model_name="tiny", policies=("first", "none"))) as served:
        assert {entry["rule"] for entry in served.post(ANSWER, ask).json()["trace"]} == {"first"}
        assert served.post(ANSWER, ask | {"policy": "similarity"}).status_code == 400


def test_a_request_that_names_no_number_reads_as_many_passages_as_are_allowed(engine: Refrag) -> None:
    with serving(engine, ServerSettings(model_name="tiny", max_documents=1)) as served:
        assert len(served.post(ANSWER, {"question": QUESTION}).json()["passages"]) == 1
        assert len(served.post("/v1/passages/search", {"question": QUESTION}).json()["data"]) == 1
        assert served.post(ANSWER, {"question": QUESTION, "top_k": 2}).status_code == 400


def test_samples_differ_unless_a_seed_is_given(served: Served) -> None:
    ask = {"question": QUESTION, "documents": [], "temperature": 5.0, "max_tokens": 12}
    assert len({served.post(ANSWER, ask).json()["text"] for _ in range(5)}) > 1
    assert len({served.post(ANSWER, ask | {"seed": 3}).json()["text"] for _ in range(3)}) == 1


def test_the_clients_own_replies_go_back_as_history(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        assert client.models.retrieve("tiny").id == "tiny"
        with pytest.raises(openai.NotFoundError, match="ask for 'tiny'"):
            client.models.retrieve("other")
        first = client.chat.completions.create(model="tiny", messages=ASK["messages"], max_tokens=3)
        messages = [*ASK["messages"], first.choices[0].message.model_dump() | {"tool_calls": []}, *ASK["messages"]]
        again = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3, logit_bias={}, store=False)
        assert again.usage.prompt_tokens > first.usage.prompt_tokens


def test_an_idle_server_has_no_queue(served: Served) -> None:
    def total(name: str) -> float:
        line = next(line for line in served.get("/metrics").text.splitlines() if line.startswith(f"refrag:{name}_sum"))
        return float(line.split()[1])

    queued, whole = total("request_queue_time_seconds"), total("e2e_request_latency_seconds")
    served.post(ANSWER, {"question": QUESTION, "max_tokens": 4})
    assert 0 <= total("request_queue_time_seconds") - queued < (total("e2e_request_latency_seconds") - whole) / 2


def test_deep_metadata_is_read_or_refused(served: Served) -> None:
    deep = b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "documents": [{"text": "b", "metadata": {"c": %s}}]}'
    stored = b'{"passages": [{"id": "deep", "text": "b", "metadata": {"c": %s}}]}'
    for depth in (200, 600, 900, 5000):
        nest = b"[" * depth + b"]" * depth
        for path, body in ((CHAT, deep), ("/v1/passages", stored)):
            reply = served.post(path, body % nest, headers={"Content-Type": "application/json"})
            assert reply.status_code in (200, 400), reply.text
            assert depth > 200 or reply.status_code == 200
    assert httpx2.request("DELETE", served.url + "/v1/passages", json={"ids": ["deep"]}).json() == {"deleted": 1}


def test_what_is_refused_is_refused_before_a_stream_begins(served: Served) -> None:
    response = served.post(CHAT, ASK | {"stream": True, "max_tokens": 600})
    assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"


def test_bodies_end_at_the_limit_with_and_without_a_length(engine: Refrag) -> None:
    with serving(engine, ServerSettings(model_name="tiny", max_body_bytes=2000)) as served:
        long = ASK | {"documents": ["x" * 3000]}
        assert served.post(CHAT, long).status_code == 413
        chunks = (b'{"messages": [' + b" " * 500 for _ in range(20))
        refused = httpx2.post(served.url + CHAT, content=chunks, headers={"Content-Type": "application/json"})
        assert refused.status_code == 413 and refused.json()["error"]["code"] == "body_too_large"
        assert served.post(CHAT, ASK | {"documents": []}).status_code == 200


def test_plain_text_is_not_taken_for_json(served: Served) -> None:
    """A web page elsewhere can send text/plain to this machine without asking; JSON it cannot."""
    body = b'{"ids": ["velmoor"]}'
    assert httpx2.request("DELETE", served.url + "/v1/passages", content=body, headers={"Content-Type": "text/plain"}).status_code == 400
    assert httpx2.request("DELETE", served.url + "/v1/passages", content=body).status_code == 400
    assert served.get("/v1/passages/velmoor").status_code == 200


def test_advice_names_fields_instead_of_options() -> None:
    assert over_http("lower --top-k or lower --max-new-tokens, set --max-slots 3.") == "lower top_k or lower max_tokens, set max_slots 3."


def test_the_key_and_the_host_are_checked(engine: Refrag) -> None:
    settings = ServerSettings(model_name="tiny", allowed_hosts=("127.0.0.1", "localhost", "::1"))
    with serving(engine, settings, api_key="secret") as served:
        assert served.get("/v1/models").status_code == 401
        for wrong in ("Bearer wrong", "secret", "Bearer", "Basic secret", "Bearer secrét"):
            refused = served.get("/v1/models", headers={"Authorization": wrong.encode()})
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert served.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert served.get("/health").status_code == served.get("/metrics").status_code == 200
        assert served.get("/openapi.json").status_code == served.get("//v1/models").status_code == 401
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=served.url + "/v1", api_key="wrong", max_retries=0).models.list()
        assert served.get("/health", headers={"Host": "evil.example:8000"}).status_code == 400
        assert served.get("/health", headers={"Host": "[::1]:8000"}).status_code == 200


def test_changes_wait_in_a_short_queue_and_end_with_their_time(tiny_model, tmp_path, monkeypatch) -> None:
    index = PassageIndex.create(tmp_path / "index", tiny_model)
    open_now, add = threading.Event(), PassageIndex.add

    def slow(self, passages):
        assert open_now.wait(30)
        return add(self, passages)

    monkeypatch.setattr(PassageIndex, "add", slow)
    settings = ServerSettings(model_name="tiny", allow_writes=True, max_changes=2, request_timeout_s=0.5, shutdown_s=0.5)
    with serving(Refrag(tiny_model, index=index), settings) as served, ThreadPoolExecutor(3) as pool:

        def put(identity: str):
            return pool.submit(served.post, "/v1/passages", {"passages": [{"id": identity, "text": "A lamp."}]})

        running = put("a")
        until(lambda: len(served.service._changes) == 1)
        waiting = put("b")
        until(lambda: len(served.service._changes) == 2)
        refused = served.post("/v1/passages", {"passages": [{"id": "c", "text": "A lamp."}]})
        assert refused.status_code == 429 and refused.json()["error"]["message"] == "2 changes of the index wait or run already: try again in a moment."
        assert value(served.get("/metrics").text, "requests_refused_total") == 1
        assert [own.result().status_code for own in (running, waiting)] == [504, 504]
        assert running.result().json()["error"]["message"] == "The change takes longer than this server waits: it goes on, look for the passages later."
        assert waiting.result().json()["error"]["message"] == "The change takes longer than this server waits: try again later."
        until(lambda: len(served.service._changes) == 1)  # who waited has left
        open_now.set()
        until(lambda: not served.service._changes)
        assert index.count == 1
        open_now.clear()
        object.__setattr__(served.service.settings, "request_timeout_s", 60.0)
        cut_off = put("d")
        until(lambda: len(served.service._changes) == 1)
        served.server.should_exit = True
        assert cut_off.result().status_code == 503 and cut_off.result().json()["error"]["message"].startswith("The server is shutting down")
        open_now.set()


def test_tokens_of_answers_that_nobody_waits_for_are_counted(engine: Refrag) -> None:
    with serving(engine, ServerSettings(model_name="tiny", request_timeout_s=0.3)) as served:
        assert served.post(CHAT, endless()).status_code == 504
        text = served.get("/metrics").text
        assert value(text, "time_to_first_token_seconds_count") == 1 and value(text, "generation_tokens_total") > 1
        assert value(text, "inter_token_latency_seconds_count") == value(text, "generation_tokens_total") - 1
        assert value(text, "e2e_request_latency_seconds_count") == 0
