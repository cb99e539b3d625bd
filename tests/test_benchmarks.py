"""The scripts of benchmarks/ that no other test runs: they use the library as a user does, and must not fall behind it."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import refrag
from refrag.demo.almanac import evaluation_rows

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not SCRIPTS.exists(), reason="the repository is not here")


def script(name: str):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: object) -> None:
    """The script in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(refrag.__file__).parents[1])}
    ended = subprocess.run([sys.executable, SCRIPTS / f"{name}.py", *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr


def test_recall_on_questions_with_marked_paragraphs(tmp_path):
    rows = list(evaluation_rows(6, num_passages=4))
    with gzip.open(tmp_path / "dev.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows if any(passage["is_gold"] for passage in row["passages"]))
    run("squad_recall", "--data", tmp_path / "dev.jsonl.gz", "--checked", 2, "--out", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["paragraphs"] == 4 * found["questions"] and all(row["equal"] == 1 for row in found["search"].values())
    assert all(0.5 < row["recall@8"] <= row["recall@20"] == 1 for row in found["modes"].values())


def test_a_conversation_deals_its_passages_out_and_asks_about_any():
    rows = list(script("conversations").conversations(10, turns=3, per_turn=2, seed=0))
    for row, flat in zip(rows, evaluation_rows(10, num_passages=6), strict=True):
        users, assistants = row["history"][::2], row["history"][1::2]
        assert [len(turn["passages"]) for turn in users] == [2, 2] and len(row["passages"]) == 2
        assert [*users[0]["passages"], *users[1]["passages"], *row["passages"]] == flat["passages"]
        assert (row["question"], row["answers"]) == (flat["question"], flat["answers"])
        for number, (turn, answer) in enumerate(zip(users, assistants, strict=True)):
            cited, words = answer["text"][1], answer["text"][4:]
            assert words in turn["passages"][int(cited) - 1 - 2 * number]["text"] and turn["text"] != row["question"]
    assert any(not any(passage["is_gold"] for passage in row["passages"]) for row in rows if row["kind"] != "unanswerable")


@pytest.mark.parametrize("name", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_every_script_finds_what_it_imports(name, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    assert callable(script(name).main)
