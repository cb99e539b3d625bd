"""data.py: copies on disk, the split as laws, leaks, streams, lengths."""

import json
import pickle
from pathlib import Path

import pytest

import refrag.training.data as data
from refrag.errors import InputError
from refrag.text import PromptBuilder
from refrag.training.data import Document, Question, Rows, Stream, check_disjoint, check_long_enough, lengths, load
from refrag.training.settings import TrainSettings

datasets = pytest.importorskip("datasets")
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of `datasets`, and the test's folder as the current one, so that places are short."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return tmp_path / "cache"


def write(name: str, content: str) -> str:
    Path(name).write_text(content, encoding="utf-8")
    return name


def json_lines(name: str, rows) -> str:
    return write(name, "".join(json.dumps(row) + "\n" for row in rows))


def texts(number: int, start: int = 0) -> list[dict]:
    return [{"id": f"d{i}", "text": f"Text number {i} of many."} for i in range(start, start + number)]


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


# ── copies on disk ──


def test_rows_are_a_sequence_read_from_disk():
    rows = load(settings(json_lines("a.jsonl", texts(1000))), "documents").train
    assert isinstance(rows, Rows) and len(rows) == 1000
    assert rows[3] == Document("d3", "Text number 3 of many.") and rows[-1].id == "d999"
    assert [row.id for row in rows[10:16:2]] == ["d10", "d12", "d14"]
    with pytest.raises(IndexError):
        rows[1000]
    copy = pickle.dumps(rows)
    assert len(copy) < 15_000 < Path("a.jsonl").stat().st_size  # the positions, but not the texts
    assert list(pickle.loads(copy)) == list(rows)


def test_the_copy_is_made_once_and_anew_when_a_file_changes(monkeypatch):
    made = []
    monkeypatch.setattr(data, "_arrow_rows", lambda *given, make=data._arrow_rows: made.append(1) or make(*given))
    json_lines("a.jsonl", texts(5))
    assert read("a.jsonl") == read("a.jsonl") and len(made) == 1
    json_lines("a.jsonl", texts(5, start=1))
    assert read("a.jsonl")[0][0] == "d1" and len(made) == 2
    load(settings("a.jsonl"), "documents"), read("a.jsonl", text_field="id"), read("a.jsonl", skip_bad=True)
    assert len(made) == 4


def test_nothing_is_left_of_a_run_that_stops(cache):
    write("a.jsonl", '{"text": "One."}\nno json\n')
    error_of("a.jsonl")
    assert not list(cache.rglob("*.arrow"))
    assert len(read("a.jsonl", skip_bad=True)) == 1
    assert error_of("a.jsonl").startswith("a.jsonl, line 2: ")


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(write(str(tmp_path / "file"), "x")) / "cache")
    assert "make room there, or set HF_DATASETS_CACHE to another folder" in error_of(json_lines("a.jsonl", texts(2)))


def test_duplicates_are_counted():
    rows = [*texts(3), {"text": "text  NUMBER 1 of many."}, *texts(1)]
    assert load(settings(json_lines("a.jsonl", rows)), "documents").counts == {
        "rows": 5, "bad": 0, "held_out": 0, "train": 5, "duplicates": 2, "evaluation": 0, "eval_bad": 0,
    }  # fmt: skip


# ── split ──


def ids_of(rows) -> set[str]:
    return {row.id for row in rows}


def split(rows, *, kind="documents", name="a.jsonl", **changes):
    loaded = load(settings(json_lines(name, rows), **({"eval_fraction": 0.2, "eval_rows": 10_000} | changes)), kind)
    return ids_of(loaded.train), ids_of(loaded.evaluation)


@pytest.mark.parametrize(("kind", "make"), [("documents", texts), ("questions", questions)])
def test_the_split_depends_on_nothing_but_the_row(kind, make):
    rows = make(600)
    train, held_out = split(rows, kind=kind)
    assert train | held_out == {row["id"] for row in rows} and not train & held_out
    assert 90 < len(held_out) < 150
    assert split(rows[::-1], kind=kind) == (train, held_out)
    assert split(rows[:300], kind=kind)[1] == held_out & {row["id"] for row in rows[:300]}
    assert split(rows, kind=kind, eval_fraction=0.1)[1] < held_out
    assert split(rows, kind=kind, eval_fraction=0.0) == (train | held_out, set())


def test_duplicates_are_on_one_side():
    rows = texts(300)
    again = [{"id": f"again-{row['id']}", "text": row["text"].upper() + "\n"} for row in rows]
    train, held_out = split(rows + again)
    assert held_out and all(f"again-{name}" in held_out for name in held_out if name.startswith("d"))
    assert all(f"again-{name}" in train for name in train if name.startswith("d"))


def test_turns_of_one_conversation_are_on_one_side():
    def turns(number):
        first, answer = {"role": "user", "text": f"Where is City_{number}?"}, {"role": "assistant", "text": f"In Country_{number}."}
        yield {"id": f"first-{number}", "question": first["text"], "answers": [answer["text"]], "passages": []}
        yield {"id": f"later-{number}", "question": "And its river?", "answers": ["River_1"], "passages": [], "history": [first, answer]}

    _, held_out = split([row for number in range(200) for row in turns(number)], kind="questions")
    assert {name.split("-")[1] for name in held_out if "first" in name} == {name.split("-")[1] for name in held_out if "later" in name} != set()


def test_eval_rows_are_a_sample_that_does_not_depend_on_the_order():
    rows = texts(600)
    _, held_out = split(rows)
    train, sample = split(rows, eval_rows=20)
    assert len(sample) == 20 and sample < held_out and not train & held_out
    assert split(rows[::-1], eval_rows=20)[1] == sample
    loaded = load(settings("a.jsonl", eval_fraction=0.2, eval_rows=20), "documents")
    assert loaded.counts["held_out"] == len(held_out) and loaded.counts["evaluation"] == 20
    assert loaded.counts["rows"] == loaded.counts["held_out"] + loaded.counts["train"]
    assert [row.id for row in loaded.evaluation] == [row["id"] for row in rows[::-1] if row["id"] in sample]


def test_some_rows_must_be_left_to_train_on():
    said = error_of(json_lines("a.jsonl", texts(1)), eval_fraction=0.9999)
    assert said == "Some rows must be left to train on, but all 1 are held out: lower --eval-fraction or pass --eval-data."


# ── leaks ──


@pytest.mark.parametrize("streaming", [False, True])
def test_evaluation_data_of_its_own(streaming):
    train, held_out = json_lines("train.jsonl", texts(50)), json_lines("eval.jsonl", texts(30, start=50))
    loaded = load(settings(train, eval_data=(held_out,), eval_fraction=0.9, eval_rows=25, streaming=streaming), "documents")
    assert len(list(loaded.train)) == 50 and len(loaded.evaluation) == 25
    assert ids_of(loaded.evaluation) <= {f"d{number}" for number in range(50, 80)}
    assert loaded.counts["evaluation"] == 25 and loaded.counts["train"] == 50 and loaded.counts["held_out"] == 0


def test_the_prototype_s_leak_is_found():
    """All 1,050 questions it was measured with were among the 5,250 it was trained on, in another order and form."""
    train = json_lines("aligned.jsonl", questions(5250))
    leaked = [{"id": f"test_{i}", "question": row["question"].lower(), "answers": row["answers"], "passages": []} for i, row in enumerate(questions(1050, start=2000)[::-1])]
    assert error_of(train, kind="questions", eval_data=(json_lines("test.jsonl", leaked),)) == (
        "No row may be both trained and evaluated on, but the evaluation row 'test.jsonl, line 1' is also the training row 'aligned.jsonl, line 3050', and so are 1049 more of 1050:"
        " take it out of --data, or leave --eval-data out so that a share of --data is held out."
    )
    clean = json_lines("clean.jsonl", questions(1050, start=5250))
    assert load(settings(train, eval_data=(clean,)), "questions").counts["train"] == 5250


def test_one_leak_far_from_the_rows_evaluated_on():
    train = json_lines("train.jsonl", texts(50))
    held_out = json_lines("eval.jsonl", [*texts(300, start=50), {"text": "TEXT number 7 of many."}])
    assert "the evaluation row 'eval.jsonl, line 301' is also the training row 'train.jsonl, line 8': take" in error_of(train, eval_data=(held_out,), eval_rows=3)


def test_a_stream_stops_at_a_leak():
    train, held_out = json_lines("train.jsonl", texts(50)), json_lines("eval.jsonl", [texts(1, start=60)[0], texts(1, start=40)[0]])
    loaded = load(settings(train, eval_data=(held_out,), streaming=True), "documents")
    stream = iter(loaded.train)
    assert [next(stream).id for _ in range(40)][-1] == "d39"
    with pytest.raises(InputError, match=r"the evaluation row 'eval\.jsonl, line 2' is also the training row 'train\.jsonl, line 41': take it out"):
        next(stream)


def test_check_disjoint_takes_any_rows():
    one, two, three = (Document(name, f"Text {name}.") for name in "abc")
    check_disjoint([one, two], [three])
    check_disjoint([], [one])
    check_disjoint([one], [])
    with pytest.raises(InputError, match="the evaluation row 'b' is also the training row 'b', and so are 1 more of 3: "):
        check_disjoint([one, two], [three, two, one])
    rows = load(settings(json_lines("a.jsonl", questions(5))), "questions").train
    check_disjoint(rows[:3], rows[3:])
    with pytest.raises(InputError, match=r"the evaluation row 'x' is also the training row 'a\.jsonl, line 3': "):
        check_disjoint(rows[1:], [Question("x", "which river flows through city_2", ("river_2",), (), None)])


# ── streams ──


def test_a_stream_is_in_order_and_can_be_read_again():
    names = [json_lines("b.jsonl", texts(20)), json_lines("a.jsonl", texts(20, start=20))]
    stream = load(settings(*names, streaming=True), "documents").train
    assert isinstance(stream, Stream)
    assert [row.id for row in stream] == [row.id for row in stream] == [f"d{number}" for number in range(40)]
    assert [row.id for row in pickle.loads(pickle.dumps(stream))] == [f"d{number}" for number in range(40)]
    assert stream.counts == {"rows": 40, "bad": 0, "held_out": 0, "train": 40, "evaluation": 0}


@pytest.mark.parametrize(("kind", "make"), [("documents", texts), ("questions", questions)])
def test_a_stream_holds_out_what_the_split_holds_out(kind, make):
    rows = make(600)
    train, held_out = split(rows, kind=kind)
    loaded = load(settings("a.jsonl", eval_fraction=0.2, eval_rows=20, streaming=True), kind)
    assert [row.id for row in loaded.train] == [row["id"] for row in rows if row["id"] in train]
    in_reach = [row["id"] for row in rows[: 2 * 20 * 5] if row["id"] in held_out]
    assert [row.id for row in loaded.evaluation] == in_reach[:20]
    assert loaded.counts == {"rows": 600, "bad": 0, "held_out": len(held_out), "train": len(train), "evaluation": 20}


def test_a_stream_copies_nothing(cache):
    read(json_lines("a.jsonl", texts(20)), streaming=True)
    assert not list(cache.rglob("*.arrow"))


# ── lengths ──


def test_lengths_by_hand(tokenizer):
    builder = PromptBuilder(tokenizer, chunk_size=4)
    documents = [Document(str(number), "!" * number) for number in (5, 1, 3, 2, 4, 9)]
    counts = [len(builder.encode(document.text)) for document in documents]
    assert lengths(documents, builder) == {
        "documents": 6, "tokens": sum(counts), "shortest": min(counts), "p10": sorted(counts)[0], "median": sorted(counts)[2], "p90": sorted(counts)[4], "longest": max(counts),
    }  # fmt: skip
    assert set(lengths([], builder).values()) == {0}


def test_texts_that_are_all_too_short():
    check_long_enough({"documents": 3, "longest": 2048}, 2048)
    with pytest.raises(InputError, match=r"^A text must have 2048 tokens or more, the longest of 3 has 245: pass longer texts, or lower --max-chunks\.$"):
        check_long_enough({"documents": 3, "longest": 245}, 2048)
    with pytest.raises(InputError, match=r"or lower --context-tokens\.$"):
        check_long_enough({"documents": 3, "longest": 245}, 246, lower="--context-tokens")


# ── public data ──


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data sets")
@pytest.mark.parametrize("name", ["nq_qed", "musique", "2wikimultihop", "hotpotqa_distractor"])
def test_public_question_sets_load_and_do_not_leak(name):
    loaded = load(settings(str(SHARED / name / "train.jsonl.gz"), eval_data=(str(SHARED / name / "dev.jsonl.gz"),)), "questions")
    assert loaded.counts["bad"] == loaded.counts["eval_bad"] == 0 and loaded.counts["evaluation"] == (164 if name == "2wikimultihop" else 200)
    assert all(any(question.gold) for question in loaded.evaluation)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data sets")
def test_public_stories_load():
    name = str(SHARED / "tinystories" / "valid.txt.gz")
    counts = load(settings(name, eval_fraction=0.1), "documents").counts
    assert counts["rows"] == 600 and 30 < counts["held_out"] < 90
    assert sum(1 for _ in load(settings(name, streaming=True), "documents").train) == 600
