"""Building and mending an index from the command line: bad input costs nothing, damage and mistakes are one sentence."""

import gc
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import time
import tracemalloc
import weakref
from dataclasses import replace
from pathlib import Path

import lancedb
import pytest
from conftest import build_model

from refrag.cli import main
from refrag.config import IndexSettings
from refrag.errors import BackendError, InputError, MismatchError
from refrag.index import PassageIndex, SentenceEncoder, building, table
from refrag.index.manifest import Manifest
from refrag.index.seen import Seen
from refrag.text import Passage

FORKSERVER = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "own"
    tiny_model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def own_log_level():
    """`--quiet` sets it for the process."""
    level = logging.getLogger("refrag").level
    yield
    logging.getLogger("refrag").setLevel(level)


@pytest.fixture
def frozen_garbage():
    """What was there before is not searched for garbage, so that a collection takes no time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def run(model: str, tmp_path: Path, capsys):
    """run(command, *arguments): exit status, stdout and the last line of stderr; the index is `tmp_path/index`."""

    def run(command: str, *arguments: object) -> tuple[int, str, str]:
        status = main(["index", command, *map(str, arguments), "--index", str(tmp_path / "index"), "--model", model, "--quiet"])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return status, said.out, said.err.strip().rpartition("\n")[2]

    return run


def write(path: Path, *rows: object) -> Path:
    """JSON lines; a string is a line as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


GOOD = {"id": "a", "text": "The mill."}, {"id": "b", "text": "The lamp."}


@pytest.mark.parametrize("content", [b"{broken\n", b"", b'{"text": "Gr\xf6sse"}\n', b'{"id": "x", "text": "One."}\n{broken\n'])
def test_a_refused_rebuild_keeps_the_index(run, tmp_path, content):
    assert run("build", write(tmp_path / "good.jsonl", *GOOD))[0] == 0
    (tmp_path / "bad.jsonl").write_bytes(content)
    before = sorted(path.name for path in (tmp_path / "index").iterdir())
    assert run("build", tmp_path / "bad.jsonl", "--rebuild", "--storage", "int8")[0] == 2
    index = PassageIndex.open(tmp_path / "index")
    assert set(index.passages(["a", "b", "x"])) == {"a", "b"} and index.settings.storage == "float16" and index.verify() == []
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == before


def test_a_rebuild_replaces_the_index_in_the_end(run, tmp_path):
    assert run("build", write(tmp_path / "good.jsonl", *GOOD))[0] == 0
    (tmp_path / "index" / "notes.txt").write_text("mine")
    status, out, _ = run("build", write(tmp_path / "other.jsonl", {"id": "c", "text": "The ship."}), "--rebuild", "--storage", "int8")
    assert status == 0 and json.loads(out)["added"] == 1
    index = PassageIndex.open(tmp_path / "index")
    assert (index.count, index.settings.storage, index.verify()) == (1, "int8", [])
    assert index.search("ship", mode="text")[0].passage.id == "c"
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["notes.txt", "passages.lance"]


def test_an_index_stays_until_its_replacement_is_whole(tmp_path, tiny_model):
    with building(tmp_path / "index", tiny_model, IndexSettings()) as index:
        index.add([Passage("a", "The mill.")])
    with pytest.raises(KeyboardInterrupt), building(tmp_path / "index", tiny_model, IndexSettings(), rebuild=True) as index:
        index.add([Passage("b", "The lamp.")])
        assert PassageIndex.open(tmp_path / "index").passages(["a", "b"]).keys() == {"a"}
        raise KeyboardInterrupt
    assert PassageIndex.open(tmp_path / "index").passages(["a", "b"]).keys() == {"a"}


def rebuild_and_die(path: str, settings: IndexSettings, before_call: int) -> None:
    """Child process: rebuilds an index and is killed before its n-th rename, or (3) before the replaced files are removed."""
    names = []

    def deadly(function):
        def call(*arguments, **kwargs):
            if "rename" in str(function) or names:
                names.append(function)
                if len(names) == before_call:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **kwargs)

        return call

    with building(path, build_model(), settings, rebuild=True) as index:
        index.add([Passage("b", "The lamp.")])
        Path.rename, table.shutil.rmtree = deadly(Path.rename), deadly(table.shutil.rmtree)


@pytest.mark.parametrize(("before_call", "left", "kept"), [(1, {"passages", "rebuild"}, "a"), (2, {"replaced", "rebuild"}, "b"), (3, {"passages", "replaced"}, "b")])
def test_sigkill_while_a_rebuild_comes_into_use(tmp_path, tiny_model, before_call, left, kept):
    path, settings = str(tmp_path / "index"), IndexSettings()
    with building(path, tiny_model, settings) as index:
        index.add([Passage("a", "The mill.")])
    child = FORKSERVER.Process(target=rebuild_and_die, args=(path, settings, before_call))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert {folder.stem for folder in (tmp_path / "index").iterdir()} == left
    index = PassageIndex.open(path, model=tiny_model)
    assert index.passages(["a", "b"]).keys() == {kept} and index.verify() == []
    with building(path, tiny_model, settings, rebuild=True) as index:  # the same command finishes what it began
        index.add([Passage("b", "The lamp.")])
    assert PassageIndex.open(path).passages(["a", "b"]).keys() == {"b"}
    assert [folder.name for folder in (tmp_path / "index").iterdir()] == ["passages.lance"]


@pytest.mark.parametrize("command", ["build", "add", "info", "verify"])
@pytest.mark.parametrize("names", [("replaced", "rebuild"), ("replaced",)])
def test_every_command_finishes_a_swap_that_was_cut_short(run, tmp_path, command, names):
    good = write(tmp_path / "good.jsonl", *GOOD)
    assert run("build", good)[0] == 0
    for name in names:  # with both, `rebuild` is the one that is whole
        shutil.copytree(tmp_path / "index" / "passages.lance", tmp_path / "index" / f"{name}.lance")
    if len(names) == 2:
        shutil.rmtree(tmp_path / "index" / "replaced.lance" / "data")
    shutil.rmtree(tmp_path / "index" / "passages.lance")
    arguments = [good] if command in ("build", "add") else []
    assert run(command, *arguments)[0] == 0
    assert PassageIndex.open(tmp_path / "index").count == 2


def test_a_swap_that_cannot_be_finished_says_how(tmp_path, tiny_model, monkeypatch):
    with building(tmp_path / "index", tiny_model, IndexSettings()) as index:
        index.add([Passage("a", "The mill.")])
    (tmp_path / "index" / "passages.lance").rename(tmp_path / "index" / "replaced.lance")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(BackendError, match=r"could not be put in its place: rename rebuild.lance or replaced.lance in it to passages.lance"):
        PassageIndex.open(tmp_path / "index")


@pytest.mark.parametrize("content", [b"{broken\n", b"", b'{"text": "Gr\xf6sse"}\n', b'{"id": "x", "text": "One."}\n{broken\n'])
def test_a_refused_build_leaves_no_folder(run, tmp_path, content):
    (tmp_path / "bad.jsonl").write_bytes(content)
    status, out, sentence = run("build", tmp_path / "bad.jsonl")
    assert (status, out) == (2, "") and sentence.startswith("refrag: ")
    assert not (tmp_path / "index").exists()


def test_a_failed_build_removes_only_what_it_made(tmp_path, tiny_model):
    (tmp_path / "there").mkdir()
    for folder in ("new/deep", "there"):
        with pytest.raises(InputError), building(tmp_path / folder, tiny_model, IndexSettings()):
            raise InputError("refused")
    assert [path.name for path in tmp_path.iterdir()] in (["there"], []) and not (tmp_path / "there" / "passages.lance").exists()


def test_passages_that_a_file_no_longer_holds_are_removed(run, tmp_path):
    sentences = [f"The mill number {number} is old." for number in range(8)]
    (tmp_path / "docs").mkdir()
    for name in ("doc.txt", "other.txt"):
        (tmp_path / "docs" / name).write_text(" ".join(sentences))
    assert run("build", tmp_path / "docs", "--passage-tokens", 20)[0] == 0
    index = PassageIndex.open(tmp_path / "index")
    before = index.count
    (tmp_path / "docs" / "doc.txt").write_text(sentences[0])
    status, out, _ = run("build", tmp_path / "docs" / "doc.txt", "--passage-tokens", 20)
    removed = json.loads(out)["removed"]
    assert status == 0 and removed > 0
    index = PassageIndex.open(tmp_path / "index")
    sources = [passage.metadata["source"] for passage in index.passages(index.retrieval_vectors()[0]).values()]
    assert sources.count(str(tmp_path / "docs" / "doc.txt")) == 1 and len(sources) == before - removed
    (tmp_path / "docs" / "doc.txt").write_text("")
    assert json.loads(run("add", tmp_path / "docs")[1])["removed"] == 1


def test_passages_added_by_hand_remove_nothing(tmp_path, tiny_model):
    index = PassageIndex.create(tmp_path / "index", tiny_model)
    index.add([Passage("a", "The mill.", "", {"source": "it's.txt"})])
    index.add([Passage("b", "The lamp.", "", {"source": "it's.txt"})])
    assert index.count == 2
    assert index.add([Passage("b", "The lamp.", "", {"source": "it's.txt"})], sources={"it's.txt"})["removed"] == 1
    assert index.passages(["a", "b"]).keys() == {"b"}


def test_a_file_with_bad_rows_removes_nothing(run, tmp_path):
    assert run("build", write(tmp_path / "a.jsonl", *GOOD))[0] == 0
    status, out, _ = run("build", write(tmp_path / "a.jsonl", GOOD[0], "{broken"), "--skip-bad")
    assert status == 0 and "removed" not in json.loads(out) and PassageIndex.open(tmp_path / "index").count == 2


def test_another_passage_length_is_refused(run, tmp_path):
    good = write(tmp_path / "good.jsonl", *GOOD)
    assert run("build", good)[0] == 0
    status, _, sentence = run("build", good, "--passage-tokens", 64, "--overlap-tokens", 8)
    assert status == 2
    assert "was made with --passage-tokens 256, now it is 64, --overlap-tokens 0, now it is 8: give the same again, or make it anew with --rebuild." in sentence


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"id": "\ud800", "text": "One."}, "line 3: the id holds half a character"),
        ({"text": "One.", "metadata": {"x": "\ud800"}}, "line 3: the metadata holds half a character"),
        ('{"text": "One.", "n": ' + "9" * 5000 + "}", "line 3: this line is not JSON (Exceeds the limit"),
        ('{"text": "One.", "n": Infinity}', "line 3: The metadata of a passage must be JSON values"),
    ],
)
def test_rows_that_cannot_be_stored(run, tmp_path, row, sentence):
    path = write(tmp_path / "a.jsonl", *GOOD, row)
    status, _, said = run("build", path)
    assert status == 2 and sentence in said
    status, out, _ = run("build", path, "--skip-bad")
    assert status == 0 and json.loads(out)["added"] == 2


def test_half_characters_given_by_hand(tmp_path, tiny_model):
    index = PassageIndex.create(tmp_path / "index", tiny_model)
    with pytest.raises(InputError, match=r"The passage 'a' holds half a character \(a lone surrogate\): mend its id"):
        index.add([Passage("a", "x \ud800")])
    for mode in ("dense", "text", "hybrid"):
        with pytest.raises(InputError, match="The question holds half a character or an invalid byte at position 5: write it as UTF-8 text"):
            index.search("Who \udcff?", mode=mode, where="id = 'a'")


def test_no_folder_can_be_made_below_a_file(tmp_path, tiny_model):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"No folder can be made at .*file/index \(.*\): pass another --index"):
        PassageIndex.create(tmp_path / "file" / "index", tiny_model)


@pytest.mark.parametrize("pattern", ["data/*.lance", "_versions/*.manifest", "_indices/*/*"])
def test_damage_is_one_sentence(run, tmp_path, capsys, model, pattern):
    good = write(tmp_path / "good.jsonl", *GOOD)
    assert run("build", good)[0] == 0
    files = [path for path in (tmp_path / "index" / "passages.lance").glob(pattern) if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    status, out, _ = run("verify")
    assert status == 1 and "cannot be read since a file of it is damaged or missing" in out and "--rebuild" in out
    if pattern.startswith("data"):
        assert main(["ask", "What is old?", "--index", str(tmp_path / "index"), "--model", model, "--quiet"]) == 2
        assert "is damaged or missing" in capsys.readouterr().err
    assert run("build", good, "--rebuild")[0] == 0 and run("verify")[0] == 0


def test_a_reader_that_panics_has_met_damage():
    panic = type("RustPanic", (Exception,), {})  # pyo3_async_runtimes.RustPanic has no name to import
    with pytest.raises(table.DamagedIndexError, match=r"since a file of it is damaged or missing \(rust future panicked: unknown error\): make it anew"), table.readable("i"):
        raise panic("rust future panicked: unknown error")


@pytest.mark.parametrize("said", ["LanceError(IO): Generic S3 error: Failed to resolve region for bucket 'b'\nx", "lance error: Generic GCS error: 403, /rust/x.rs:1"])
def test_an_object_store_that_does_not_answer_is_not_called_damaged(said):
    reason = said.split("Generic ")[1].splitlines()[0].split(", /")[0]
    with pytest.raises(BackendError, match=rf"The index at s3://b/i cannot be reached \({re.escape(reason)}\): check the address, the network and the credentials"), table.readable("s3://b/i"):
        raise RuntimeError(said)


def test_verifying_shows_how_far_it_is(run, tmp_path, model, capsys):
    assert run("build", write(tmp_path / "good.jsonl", *GOOD))[0] == 0
    done: list[int] = []
    assert PassageIndex.open(tmp_path / "index").verify(progress=done.append) == [] and sum(done) == 2
    assert main(["index", "verify", "--index", str(tmp_path / "index"), "--model", model]) == 0
    said = capsys.readouterr().err
    assert "verifying" in said and "2 passages" in said


def test_missing_search_indexes_are_made(tmp_path, tiny_model):
    retriever = SentenceEncoder()
    schema = table.table_schema(Manifest(IndexSettings(), tiny_model.fingerprint(), retriever.identity()), retriever.width)
    lancedb.connect(tmp_path / "index").create_table("passages", schema=schema)  # what a kill right after it leaves
    index = PassageIndex.open(tmp_path / "index", model=tiny_model, retriever=retriever)
    index.add([Passage("a", "The mill."), Passage("b", "東京に行く")])
    assert {index.name for index in index.table._table.list_indices()} == {"id_idx", "search_text_idx"}
    assert index.search("行く", mode="text")[0].passage.id == "b"


def test_the_right_model_is_named(run, tmp_path, model, make_model):
    assert run("build", write(tmp_path / "good.jsonl", *GOOD))[0] == 0
    with pytest.raises(MismatchError, match=rf"belongs to another model \(.*\): pass --model {model}, or make it anew with .* --rebuild"):
        PassageIndex.open(tmp_path / "index", model=make_model(chunk_size=8))


def test_adding_holds_a_bounded_number_of_passages(tmp_path, tiny_model, frozen_garbage):
    """Four times the corpus: as many passages alive at a time, and no more bytes of Python but the few that `Seen` keeps of each."""
    index = PassageIndex.create(tmp_path / "index", tiny_model, IndexSettings(batch_size=8))
    alive: weakref.WeakSet[Passage] = weakref.WeakSet()

    def stream(first: int, count: int, most: list[int]):
        for number in range(first, first + count):
            if number % 8 == 0:
                gc.collect()
                most[0] = max(most[0], len(alive))
            passage = Passage(f"p{number}", f"Lamp {number}.", metadata={"ballast": f"{number:06d}" * 200})
            alive.add(passage)
            yield passage

    def peak(first: int, count: int) -> tuple[int, int]:
        most = [0]
        tracemalloc.start()
        index.add(stream(first, count, most))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most[0], size

    peak(1000, 40)  # what is loaded and cached once
    few, many = peak(2000, 80), peak(3000, 320)
    assert few[0] <= 4 * 8 and many[0] <= 4 * 8
    assert many[1] - few[1] < 240 * 200, "a passage has 1,200 bytes of metadata alone"
    assert index.count == 440


def test_ids_given_twice_are_reported(tmp_path, tiny_model, caplog):
    index = PassageIndex.create(tmp_path / "index", tiny_model, replace(IndexSettings(), batch_size=2))
    with caplog.at_level(logging.WARNING, logger="refrag"):
        counts = index.add([Passage("a", "One."), Passage("b", "Two."), Passage("b", "Two."), Passage("a", "Three."), Passage("a", "Four.")])
    assert counts["duplicates"] == 2 and index.count == 2
    assert "Passages with the id of another: 2, for example 'a'; only the last of each was kept" in caplog.text
    assert "duplicates" not in index.add([Passage("b", "Two."), Passage("b", "Two.")])


def test_what_was_seen():
    seen = Seen()
    for identity, content in (("a", "1"), ("b", "1"), ("a", "1"), ("b", "2"), ("b", "1")):
        seen.add(identity, content)
    assert (seen.num_replaced, seen.replaced(["a", "b", "c"]), seen.missing(["a", "b", "c"])) == (1, ["b"], ["c"])
    assert (Seen().num_replaced, Seen().missing(["a"])) == (0, ["a"])


def test_deleting_nothing_is_an_error(run, tmp_path):
    assert run("build", write(tmp_path / "good.jsonl", *GOOD))[0] == 0
    status, out, sentence = run("delete", "nope", "no")
    assert (status, out) == (2, "") and sentence.endswith("has no passage with the id nope, no: check the ids.")
    assert json.loads(run("delete", "nope", "a")[1]) == {"deleted": 1, "unknown": ["nope"]}


def test_an_unknown_retriever_is_said_at_once(caplog, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError, match="The retriever 'no/such-retriever' could not be loaded: check the name"):
        SentenceEncoder("no/such-retriever")
    assert time.perf_counter() - start < 10
    assert "Retrying" not in caplog.text + "".join(capfd.readouterr())


def test_a_question_beyond_the_retrievers_window():
    encoder = SentenceEncoder()
    with pytest.raises(InputError, match=rf"The question has 602 tokens, {602 - encoder.max_tokens} more than the retriever's window of {encoder.max_tokens}: shorten it"):
        encoder.encode_question("why " * 600)
