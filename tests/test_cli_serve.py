"""`refrag serve` as a process: it says where it listens, answers, stops by SIGTERM, and refuses wrong options in one sentence."""

import json
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from refrag.cli import main
from refrag.server import ServerSettings
from refrag.server.running import guarded


@pytest.mark.skipif(sys.platform == "win32", reason="SIGTERM ends a process at once there")
def test_sigterm_finishes_what_was_accepted(tiny_model, tmp_path) -> None:
    tiny_model.save_pretrained(tmp_path / "tiny")
    command = [sys.executable, "-m", "refrag.cli", "serve", "--model", str(tmp_path / "tiny"), "--model-name", "tiny", "--device", "cpu", "--port", "0"]
    process = subprocess.Popen([*command, "--max-running", "2"], stderr=subprocess.PIPE, text=True, env=None)
    try:
        assert process.stderr is not None
        line = ""
        while "http" not in line:
            line = process.stderr.readline()
            assert line, "it ended"
        url = re.search(r"Serving tiny on (http://127\.0\.0\.1:\d+)", line)[1]  # type: ignore[index]
        body = {"messages": [{"role": "user", "content": "Who?"}], "documents": ["Anna Torrel."], "max_tokens": 300, "stream": True}
        told = []

        def ask(_: int) -> str:
            with httpx2.stream("POST", url + "/v1/chat/completions", json=body, timeout=120) as response:
                lines = response.iter_lines()
                first = next(lines)
                told.append(first)
                if len(told) == 2:
                    process.send_signal(signal.SIGTERM)
                return [first, *(line for line in lines if line)][-1]

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, range(4))) == ["data: [DONE]"] * 4  # two were running, two were waiting
        assert process.wait(60) in (0, -signal.SIGTERM)
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(url + "/health")
    finally:
        process.kill()
        rest = process.communicate()[1]
    assert "Traceback" not in rest and "Torrel" not in rest


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--port", "70000"], "port must lie between 0 and 65535, was 70000."),
        (["--max-running", "0"], "--max-running must be 1 or more, was 0."),
        (["--default-new-tokens", "9", "--max-new-tokens", "8"], "--default-new-tokens must be at most --max-new-tokens (8), was 9."),
        (["--shutdown-s", "0"], "--shutdown-s must be above 0, was 0.0."),
        (["--api-key-file", "nowhere.txt"], "There is no file nowhere.txt: check --api-key-file."),
        (["--index", "nowhere.index"], "There is no index at nowhere.index"),
        (["--model", "./nowhere"], "There is no model folder at ./nowhere: check --model."),
        (["--host", "203.0.113.7"], "The server cannot listen on 203.0.113.7 port 8000"),
    ],
)
def test_wrong_options_are_one_sentence(options: list[str], sentence: str, capsys, tiny_model, tmp_path) -> None:
    if options[0] == "--host":
        tiny_model.save_pretrained(tmp_path / "tiny")
        options = [*options, "--model", str(tmp_path / "tiny"), "--device", "cpu"]
    assert main(["serve", *options]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    assert sentence in said.err.strip().splitlines()[-1]


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch, capsys) -> None:
    from refrag.cli import _parse

    file = tmp_path / "key"
    file.write_text("  one two \nthree", encoding="utf-8")
    assert _parse(["serve", "--api-key-file", str(file)])._api_key() == "one two"
    assert _parse(["serve"])._api_key() is None
    monkeypatch.setenv("REFRAG_API_KEY", "four")
    assert _parse(["serve"])._api_key() == "four"
    monkeypatch.setenv("REFRAG_API_KEY", " ")
    assert main(["serve"]) == 2
    assert "The API key must be some ASCII characters, REFRAG_API_KEY holds none or others: write one there." in capsys.readouterr().err


def test_the_page_is_refused_beside_a_key(monkeypatch, capsys) -> None:
    monkeypatch.setenv("REFRAG_API_KEY", "secret")
    assert main(["serve", "--page", "--model", "./never-looked-at"]) == 2
    assert capsys.readouterr().err == "refrag: The page under /ui asks for no key, and this server has one: leave --page out, or run  refrag ui  beside it.\n"


def test_this_machines_own_address_answers_to_its_own_names() -> None:
    assert guarded(ServerSettings(), "127.0.0.1", model="bundled").allowed_hosts == ("127.0.0.1", "localhost", "::1")
    assert guarded(ServerSettings(), "0.0.0.0", model="bundled").allowed_hosts == ()
    own = guarded(ServerSettings(allowed_hosts=("a.example",), model_name="mine"), "127.0.0.1", model="bundled")
    assert (own.allowed_hosts, own.model_name) == (("a.example",), "mine")


def test_a_missing_package_names_the_extra() -> None:
    code = "import sys; sys.modules['fastapi'] = None\nfrom refrag.cli import main; sys.exit(main(['serve']))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stderr.strip().splitlines()[-1] == "refrag: The server needs the package 'fastapi': install it with  pip install 'refrag[serve]'"


def test_the_description_of_the_api_can_be_read(tiny_model) -> None:
    from refrag import Refrag
    from refrag.server import create_app

    paths = json.loads(json.dumps(create_app(Refrag(tiny_model)).openapi()))["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/answer", "/v1/models", "/v1/passages", "/v1/passages/search", "/health", "/ready", "/metrics"} <= paths.keys()
