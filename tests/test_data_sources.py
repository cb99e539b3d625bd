"""sources.py, through load: every format, what is missing or damaged, bad rows named or counted."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pytest

from refrag.errors import InputError, MissingExtraError, NotFoundError
from refrag.training.data import load
from refrag.training.settings import TrainSettings

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of `datasets`, and the test's folder as the current one, so that places are short."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path / "cache"


def write(name: str, content: str | bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    raw = content if isinstance(content, bytes) else content.encode()
    Path(name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return name


def json_lines(name: str, rows) -> str:
    return write(name, "".join(json.dumps(row) + "\n" for row in rows))


def questions(number: int, start: int = 0) -> list[dict]:
    return [{"id": f"q{i}", "question": f"Which river flows through City_{i}?", "answers": [f"River_{i}"], "passages": [f"About city {i}."]} for i in range(start, start + number)]


def settings(*names: str, **changes) -> TrainSettings:
    return TrainSettings(data=names, **({"eval_fraction": 0.0} | ({"num_steps": 1} if changes.get("streaming") else {}) | changes))


def read(*names: str, kind="documents", **changes):
    """(id, text) of all rows to train on."""
    return [(item.id, getattr(item, "text", None) or item.question) for item in load(settings(*names, **changes), kind).train]


def error_of(*names: str, kind="documents", error=InputError, **changes) -> str:
    with pytest.raises(error) as caught:
        loaded = load(settings(*names, **changes), kind)
        list(loaded.train)  # a stream meets its rows here
    return str(caught.value)


ROWS = [{"id": "a", "text": "One."}, {"text": "Two.", "meta": {"redpajama_set_name": "RedPajamaC4"}}]


# ── formats ──


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "second"),
    [
        ("a.jsonl", '{"id": "a", "text": "One."}\n\n{"text": "Two.", "meta": {"set": 1}}\n', "line 3"),
        ("a.jsonl", '\ufeff{"id": "a", "text": "One."}\r\n{"text": "Two.", "meta": null}', "line 2"),
        ("a.ndjson", '{"id": "a", "text": "One."}\n{"text": "Two."}\n', "line 2"),
        ("a.jsonl.gz", '{"id": "a", "text": "One."}\n{"text": "Two."}\n', "line 2"),
        ("a.json", '[{"id": "a", "text": "One."},\n "Two."]', "row 2"),
        ("a.JSON", '\n{"id": "a", "text": "One."}\n{"text": "Two."}\n', "line 3"),
        ("a.json.gz", '[{"id": "a", "text": "One."}, {"text": "Two."}]', "row 2"),
    ],
)
def test_json(name, content, second, streaming):
    assert read(write(name, content), streaming=streaming) == [("a", "One."), (f"{name}, {second}", "Two.")]


def test_json_of_one_row_over_many_lines():
    assert read(write("a.json", json.dumps(ROWS[0], indent=1))) == [("a", "One.")]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("One.\n\nStill one.\n", ["One.\n\nStill one."]),
        ("One.\n<|endoftext|>\n\nTwo.\r\nTwo.\n<|endoftext|>\n", ["One.", "Two.\nTwo."]),
        ("<|endoftext|>One.<|endoftext|>Two.\nTwo.", ["One.", "Two.\nTwo."]),
        ("\n<|endoftext|>\n \n<|endoftext|>\nOne.", ["One."]),
    ],
)
def test_text_files_are_one_document_unless_they_are_separated(content, documents, streaming):
    for name in ("a.txt", "a.txt.gz"):
        expected = [(f"{name}, document {number}", text) for number, text in enumerate(documents, 1)]
        assert read(write(name, content), streaming=streaming) == expected


def test_zstandard():
    with pa.output_stream("a.jsonl.zst", compression="zstd") as file:
        file.write(b'{"text": "One."}\n{"text": "Two."}\n')
    assert read("a.jsonl.zst") == [("a.jsonl.zst, line 1", "One."), ("a.jsonl.zst, line 2", "Two.")]


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet(streaming):
    datasets.Dataset.from_list(ROWS).to_parquet("a.parquet")
    assert read("a.parquet", streaming=streaming) == [("a", "One."), ("a.parquet, row 2", "Two.")]
    datasets.Dataset.from_list(questions(2)).to_parquet("q.parquet")
    found = load(settings("q.parquet"), "questions").train
    assert [(q.id, q.answers, [p.text for p in q.passages]) for q in found] == [("q0", ("River_0",), ["About city 0."]), ("q1", ("River_1",), ["About city 1."])]


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_data_sets_and_their_splits(streaming):
    datasets.Dataset.from_list(ROWS).save_to_disk("one")
    assert read("one", streaming=streaming) == [("a", "One."), ("one, row 2", "Two.")]
    parts = {"train": datasets.Dataset.from_list(ROWS[:1]), "test": datasets.Dataset.from_list([{"text": "Test."}])}
    datasets.DatasetDict(parts).save_to_disk("two")
    assert read("two", streaming=streaming) == [("a", "One.")]
    assert read("two:test", streaming=streaming) == [("two, row 1", "Test.")]
    datasets.DatasetDict({"all": parts["train"]}).save_to_disk("three")
    assert read("three", streaming=streaming) == [("a", "One.")]


def test_a_saved_data_set_may_have_been_formatted_for_another_use():
    row = questions(1)[0] | {"passages": [{"text": "One.", "is_gold": True}, {"text": "Two.", "is_gold": False}]}
    datasets.Dataset.from_list([row]).with_format("numpy").save_to_disk("saved")
    assert load(settings("saved"), "questions").train[0].gold == (True, False)


def test_folders_are_read_in_the_order_of_names():
    json_lines("folder/b.jsonl", [{"text": "Last."}])
    json_lines("folder/a/c.jsonl.gz", ROWS[:1])
    write("folder/README.md", "not data")
    write("folder/.hidden/d.jsonl", "not json")
    write("folder/b.txt", "Text.")
    assert read("folder") == [("a", "One."), ("folder/b.jsonl, line 1", "Last."), ("folder/b.txt, document 1", "Text.")]


def test_text_files_are_left_aside_for_questions():
    json_lines("folder/a.jsonl", questions(1))
    write("folder/notes.txt", "not data")
    assert [item.id for item in load(settings("folder"), "questions").train] == ["q0"]


def test_many_names_follow_each_other():
    assert [text for _, text in read(write("b.txt", "B."), write("a.txt", "A."))] == ["B.", "A."]


def test_another_text_field():
    assert read(json_lines("a.jsonl", [{"id": "cpt-0", "tokens": "One."}]), text_field="tokens") == [("cpt-0", "One.")]
    said = error_of("a.jsonl")
    assert said == "a.jsonl, line 1: the field 'text' is missing (there are 'id', 'tokens'): name the text's field with --text-field, or leave such rows out with --skip-bad."


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_names(monkeypatch, streaming):
    asked = []

    def load_dataset(name, *, split, streaming):
        asked.append((name, split, streaming))
        found = datasets.Dataset.from_list(ROWS)
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/some-texts", streaming=streaming) == [("a", "One."), ("owner/some-texts, row 2", "Two.")]
    assert read("texts:validation", streaming=streaming)[0] == ("a", "One.")
    assert asked == [("owner/some-texts", "train", streaming), ("texts", "validation", streaming)]


# ── what cannot be read ──


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "One."}\n{"text": "Two."\n', "a.jsonl, line 2: this is not JSON (Expecting ',' delimiter, column 16): mend it"),
        ("a.json", '[{"text": "One."},\n{"text" "Two."},\n', "a.json: this is not JSON (Expecting ':' delimiter, line 2, column 9): mend it"),
        ("a.jsonl", b'{"text": "One."}\n{"text": "gro\xdfe"}\n', "a.jsonl, line 2: this is not UTF-8 text (byte 0xdf): convert it"),
        ("a.txt", b"One.\n<|endoftext|>\nTwo.\ngro\xdfe\n", "a.txt, line 4: this is not UTF-8 text (byte 0xdf): convert it"),
        ("a.jsonl", '{"text": "One."}\n{"text": "half \\ud83d"}\n', "a.jsonl, line 2: a text must be valid Unicode, has half a character after 'half ': mend it"),
        ("a.jsonl", '{"text": "One."}\n{"text": 3}\n', "a.jsonl, line 2: the field 'text' must be a text, was a number: mend it"),
        ("a.parquet", "PAR1 and so on", "a.parquet, row 1: the file cannot be read from here (Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file): copy it again"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_stop_the_run_with_their_place(name, content, said, streaming):
    assert error_of(write(name, content), streaming=streaming) == f"{said}, or leave such rows out with --skip-bad."


def test_brackets_in_brackets():
    assert error_of(write("a.jsonl", '{"text": "One."}\n' + "[" * 200_000)).startswith("a.jsonl, line 2: this is not JSON (")


def test_a_file_that_is_cut_short():
    rows = [{"text": f"{random.Random(i).random()}"} for i in range(2000)]
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    Path("a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    said = error_of("a.jsonl.gz")
    assert "the file cannot be read from here (Compressed file ended before the end-of-stream marker was reached): copy it again" in said
    loaded = load(settings("a.jsonl.gz", skip_bad=True), "documents")
    assert loaded.counts["bad"] == 1 and 500 < loaded.counts["train"] < 1500


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_left_out_and_counted_on_wish(caplog, streaming):
    name = write("a.jsonl", '{"text": "One."}\nno json\n{"txt": "?"}\n{"text": "Two."}\n')
    loaded = load(settings(name, skip_bad=True, streaming=streaming), "documents")
    assert [document.text for document in loaded.train] == ["One.", "Two."]
    assert {key: loaded.counts[key] for key in ("rows", "bad", "train")} == {"rows": 4, "bad": 2, "train": 2}
    assert streaming or "2 of 4 rows are left out, the first: a.jsonl, line 2: this is not JSON" in caplog.text


def test_only_bad_rows():
    assert error_of(write("a.jsonl", "no json\n"), skip_bad=True).startswith(
        "The data must have rows that can be used, but all 1 are bad, the first: a.jsonl, line 1: this is not JSON (Expecting value"
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_no_rows(name, streaming):
    assert error_of(write(name, "\n"), streaming=streaming) == f"The data must have one row or more, {name} has none: check --data and --eval-data."


def test_no_data():
    assert error_of() == "Training needs data, none was given: pass --data with a file, a folder or a hub name."


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/missing", "a/b/c", "missing.txt.gz", "missing.parquet"])
def test_missing_files(name):
    assert error_of(name, error=NotFoundError) == f"No data {name!r} was found: check the name."


def test_a_hub_name_that_cannot_be_reached():
    said = error_of("nobody/no-such-texts", error=NotFoundError)
    assert said.startswith("No data 'nobody/no-such-texts' (split 'train') was found here or on the hub (") and said.endswith("): check the name.")


def test_files_of_other_formats():
    said = "a.csv: documents are read from .jsonl, .ndjson, .json, .parquet, .md, .markdown, .text or .txt files, .gz and .zst too: convert it or give it its ending."
    assert error_of(write("a.csv", "text\nOne.")) == said
    said = "a.txt: questions are read from .jsonl, .ndjson, .json or .parquet files, .gz and .zst too: convert it or give it its ending."
    assert error_of(write("a.txt", "One."), kind="questions") == said


def test_markdown_is_text_but_a_readme_is_about_the_others():
    write("notes/a.md", "# One\n\nTwo.")
    write("notes/b.md", "Three.")
    assert [row for _, row in read("notes")] == ["# One\n\nTwo.", "Three."]
    write("notes/README.md", "Four.")
    assert [row for _, row in read("notes")] == ["# One\n\nTwo.", "Three."] and [row for _, row in read("notes/README.md")] == ["Four."]
    assert error_of("notes/a.md", kind="questions").startswith("notes/a.md: questions are read from")


def test_folders_without_data():
    write("folder/a.csv", "text")
    assert error_of("folder") == (
        "The folder folder must hold .jsonl, .ndjson, .json, .parquet, .md, .markdown, .text or .txt files with documents or a saved data set, has neither: convert what it holds, or name another."
    )
    assert error_of("folder:test", error=NotFoundError) == "No data 'folder:test' was found, folder is no saved data set with splits: check the name."


def test_saved_data_sets_that_cannot_be_used():
    part = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"one": part, "two": part}).save_to_disk("saved")
    assert error_of("saved") == "The saved data set saved has the splits one, two: name one, as in saved:one."
    assert error_of("saved:three") == "The saved data set saved has the splits one, two: name one, as in saved:one."
    write("damaged/state.json", "{")
    assert error_of("damaged").startswith("The saved data set damaged cannot be read (")


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    json_lines("a.jsonl", ROWS)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert error_of("a.jsonl", error=MissingExtraError) == "Reading a data set needs the package 'datasets': install it with  pip install 'refrag[data]'"
    assert len(read("a.jsonl", streaming=True)) == 2  # plain files need no package
