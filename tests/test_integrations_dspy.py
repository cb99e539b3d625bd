"""DSPy through the server: the bodies that dspy 3.4.1 sends for the example of docs/integrations.md, without depending on it."""

from importlib import import_module
from importlib.util import find_spec

import pytest

QUESTION = "What do the workshops of Dorelux produce?"
DOCUMENTS = [{"title": "Dorelux", "text": "Dorelux was established in 1871. The workshops of Dorelux produce lamps."}]
SENT = {"model": "bundled", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0.0, "max_tokens": 32}


@pytest.fixture(scope="module")
def client(almanac):
    if find_spec("refrag.server") is None:
        pytest.skip("this installation has no server")
    for package in ("fastapi", "prometheus_client"):
        pytest.importorskip(package)
    from fastapi.testclient import TestClient

    server = import_module("refrag.server")
    app = server.create_app(almanac[0], server.ServerSettings(model_name="bundled"))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


def test_documents_come_apart_from_the_question(client):
    reply = client.post("/v1/chat/completions", json=SENT | {"documents": DOCUMENTS})
    assert reply.status_code == 200
    assert "lamps" in reply.json()["choices"][0]["message"]["content"]


def test_without_documents_the_server_retrieves(client):
    reply = client.post("/v1/chat/completions", json=SENT | {"expand_fraction": 0.25})
    assert reply.status_code == 200
    assert reply.json()["usage"]["prompt_tokens"] > 50
