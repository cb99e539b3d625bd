"""What is written: appended or merged, once, by one writer at a time."""
# ruff: noqa: F811  (the fixtures are those of the neighbouring file)

import errno
import os
from contextlib import nullcontext
from dataclasses import replace

import pytest
from test_engine import unchecked  # noqa: F401
from test_index import index, make_passages, settings  # noqa: F401
from test_index_build import model, own_log_level, run  # noqa: F401

from refrag import Refrag
from refrag.errors import BackendError, InputError
from refrag.index import PassageIndex, building, table
from refrag.text import Passage


def test_new_passages_are_appended_and_only_known_ones_merged(index, monkeypatch):
    calls = []
    for name in ("append", "merge"):
        method = getattr(index.table, name)
        monkeypatch.setattr(index.table, name, lambda rows, name=name, method=method: calls.append(name) or method(rows))
    passages, size = make_passages(40), index.settings.batch_size
    assert index.add(passages)["added"] == 40 and calls == ["append"] * (40 // size)
    calls.clear()
    changed = replace(passages[0], text="Another text.")
    assert index.add([changed, Passage("new", "A new one.")])["updated"] == 1 and calls == ["merge"]


@pytest.mark.parametrize("distance", [1, 8, 16, 24, 32, 40])
def test_an_id_that_comes_again_in_a_later_batch_is_stored_once(index, distance):
    passages = make_passages(60)
    passages[distance] = Passage(passages[0].id, "The text that stays.")
    index.add(passages)
    assert index.count == 59 and index.passages([passages[0].id])[passages[0].id].text == "The text that stays."
    assert index.verify() == []


@pytest.mark.parametrize("texts", ["ABA", "BBA", "AABAA", "BABA", "BCBCA"])
def test_the_last_passage_of_an_id_stays_whatever_was_stored(tmp_path, tiny_model, settings, texts):
    index = PassageIndex.create(tmp_path / "x", tiny_model, replace(settings, batch_size=1))
    index.add([Passage("x", "Text A.")])
    index.add([Passage("x", f"Text {name}.") for name in texts])
    assert index.count == 1 and index.passages(["x"])["x"].text == "Text A."


def test_a_second_writer_is_refused_and_the_index_stays_whole(index, monkeypatch):
    passages = make_passages(8)
    monkeypatch.setattr(table, "WRITER_PATIENCE_S", 0.1)
    other = PassageIndex.open(index.path, model=index.model)
    with other.table.writing():
        for write in (lambda: index.add(passages), lambda: index.delete(["a"]), index.optimize):
            with pytest.raises(BackendError, match=r"Another process is writing to the index at .*: wait until it is done, then run the same command again"):
                write()
    assert index.add(passages)["added"] == 8
    assert other.add(passages)["unchanged"] == 8 and index.verify() == []


def test_verify_finds_every_passage_that_is_stored_twice(index):
    passages = make_passages(8)
    index.add(passages)
    rows = index.table._table.to_arrow()
    index.table.append(rows.select(index.table.schema.names))
    assert sorted(index.verify()) == sorted(f"Passage {passage.id!r} is stored twice." for passage in passages)


class Libc:
    """A C library that notes how its allocator was set."""

    def __init__(self):
        self.calls = []

    def mallopt(self, parameter, value):
        self.calls.append((parameter, value))

    def malloc_trim(self, pad):
        self.calls.append("trim")


@pytest.mark.parametrize("fails", [False, True])
def test_while_lance_writes_freed_memory_goes_back_to_the_system(index, monkeypatch, fails):
    libc, seen = Libc(), []
    monkeypatch.setattr(table.ctypes, "CDLL", lambda name: libc)

    def write(*args, **kwargs):
        seen.append(list(libc.calls))
        if fails:
            raise OSError("No space left on device")

    monkeypatch.setattr(index.table._table, "optimize", write)
    with nullcontext() if not fails else pytest.raises(BackendError, match="the disk is full"):
        index.optimize()
    assert seen == [[(table.M_MMAP_THRESHOLD, 64 << 10)]]
    assert libc.calls[1:] == [(table.M_MMAP_THRESHOLD, 32 << 20), (table.M_TRIM_THRESHOLD, 64 << 20), "trim"]


def test_another_c_library_is_left_alone(index, monkeypatch):
    monkeypatch.setattr(table.ctypes, "CDLL", lambda name: object())
    assert index.add(make_passages(3))["added"] == 3


def test_what_is_no_text_is_refused(unchecked, index):
    with pytest.raises(InputError, match="The id of a passage must be a text, was 5"):
        index.add([Passage(5, "x")])
    with pytest.raises(InputError, match="The model of an index must be a RefragModel, was 'bundled'"):
        PassageIndex.open(index.path, model="bundled")
    with pytest.raises(InputError, match="index must be a PassageIndex or its folder, was 3"):
        Refrag(index.model, index=3)


def test_an_index_inside_the_folder_that_is_read_is_no_document(run, tmp_path):
    (tmp_path / "a.txt").write_text("The lamp is lit at dusk.")
    for _ in range(2):
        assert run("build", tmp_path)[0] == 0
    assert PassageIndex.open(tmp_path / "index").count == 1


def test_a_rebuild_of_nothing_is_quiet(tmp_path, tiny_model, settings, capfd):
    with building(tmp_path / "x", tiny_model, settings, rebuild=True) as made:
        made.add(make_passages(2))
    assert PassageIndex.open(tmp_path / "x").count == 2 and "WARN" not in capfd.readouterr().err


@pytest.mark.parametrize(("number", "words"), [(errno.EPERM, "it may not be written"), (errno.EROFS, "its file system is read-only")])
def test_a_folder_that_cannot_be_written_is_one_sentence(index, monkeypatch, number, words):
    def refused(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(index.table._table, "add", refused)
    with pytest.raises(BackendError, match=words):
        index.add(make_passages(2))
