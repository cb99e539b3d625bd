"""`refrag ui`: what it refuses, each in one sentence with exit status 2. Serving is tested in test_page_browser.py."""

import socket
import sys
from types import ModuleType

import pytest

from refrag.cli import main
from refrag.index import PassageIndex


@pytest.fixture(autouse=True)
def gradio(monkeypatch):
    """A module of that name: nothing here comes as far as using it."""
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))


def refused(arguments, capsys) -> str:
    assert main(["ui", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    return said.err.strip().splitlines()[-1]


def test_gradio_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert refused([], capsys) == "refrag: The live page needs the package 'gradio': install it with  pip install 'refrag[ui]'"


def test_the_port_is_in_use(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused(["--port", str(port)], capsys) == f"refrag: Port {port} is in use: choose another with --port, or 0 for any free one."


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "--port must lie between 0 and 65535, was 70000."),
        (["--host", "192.0.2.1", "--port", "0"], "192.0.2.1 port 0 cannot be listened on"),
        (["--host", "no such host", "--port", "0"], "no such host port 0 cannot be listened on"),
        (["--index", "no/such/index", "--port", "0"], "There is no index at"),
        (["--model", "no/such/model", "--port", "0"], "no/such/model"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be 1 or more"),
    ],
)
def test_what_cannot_be_served(arguments, said, capsys):
    assert said in refused(arguments, capsys)


def test_an_index_of_another_model(tiny_model, tmp_path, capsys):
    PassageIndex.create(tmp_path / "other", tiny_model)
    said = refused(["--index", str(tmp_path / "other"), "--port", "0"], capsys)
    assert "was made with" in said and "refrag index build" in said
