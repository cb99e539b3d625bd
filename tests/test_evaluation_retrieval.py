"""refrag eval retrieval: recall and reciprocal rank of the gold passage over a pool and over an index, and what is refused."""

import json

import pytest

from refrag.cli import main
from refrag.evaluation.provenance import read_result

FACTS = {"Velmoor": "Ann Torrel", "Ostrand": "Ben Halm", "Quillby": "Cora Finn", "Tarnwick": "Dan Moss"}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Four questions, each with its own gold passage, and one that nothing answers."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"id": town, "question": f"Who founded the harbour of {town}?", "answers": [name], "passages": [{"title": town, "text": f"The harbour of {town} was founded by {name}.", "is_gold": True}]}
        for town, name in FACTS.items()
    ]
    rows.append({"id": "no", "question": "Who founded Nowhere?", "answers": [], "unanswerable": True, "passages": ["Rain fell for days."]})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "a.jsonl"


def run(capsys, *arguments):
    status = main(["eval", "retrieval", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_pool_is_searched_by_meaning_and_by_words(data, capsys, tmp_path):
    status, table, _ = run(capsys, "--data", "a.jsonl", "--pool", "--cutoffs", 1, 3, "--modes", "dense", "text", "--out", "r.json")
    assert status == 0 and "recall@3" in table and "gold by marks" in table
    content = read_result(tmp_path / "r.json", kind="retrieval")
    assert content["passages"] == 5 and content["data"]["questions"] == 4
    for own in content["modes"].values():
        assert own["recall@1"] == own["recall@3"] == own["mrr"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 4}
        assert own["search_s"]["p95"] >= own["search_s"]["p50"] > 0


def test_an_index_is_searched_without_a_model_and_without_marks(data, capsys, tmp_path):
    (tmp_path / "passages.jsonl").write_text("".join(json.dumps({"id": town, "text": f"{name} founded the harbour of {town}."}) + "\n" for town, name in list(FACTS.items())[1:]))
    assert main(["index", "build", "passages.jsonl", "--index", "i", "--quiet"]) == 0
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps({key: row[key] for key in ("id", "question", "answers")}) + "\n" for row in rows[:4]))
    capsys.readouterr()
    status, out, _ = run(capsys, "--data", "bare.jsonl", "--index", "i", "--modes", "dense", "--cutoffs", 2, "--json", "--quiet")
    content = json.loads(out)
    assert status == 0 and content["data"]["gold_by"] == "answer strings"
    assert content["modes"]["dense"]["recall@2"]["mean"] == content["modes"]["dense"]["mrr"]["mean"] == 0.75  # one passage is not there


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "a.jsonl"], "Retrieval needs something to search in: give --index FOLDER, or --pool for the passages of all rows together."),
        (["--data", "a.jsonl", "--pool", "--cutoffs", "0"], "cutoffs must be 1 or more, was 0."),
        (["--data", "a.jsonl", "--pool", "--sentence-encoder", "./nothing"], "There is no retriever folder at ./nothing: check --retriever."),
    ],
)
def test_what_is_refused(data, arguments, said, capsys):
    status, _, err = run(capsys, *arguments, "--quiet")
    assert status == 2 and err == f"refrag: {said}\n"


def test_only_unanswerable_questions(data, capsys, tmp_path):
    (tmp_path / "u.jsonl").write_text(data.read_text().splitlines()[-1] + "\n")
    status, _, err = run(capsys, "--data", "u.jsonl", "--pool", "--quiet")
    assert status == 2 and err == "refrag: Retrieval is measured on questions with an answer, the data has none: check --data.\n"
