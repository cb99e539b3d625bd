"""The index on disk: what is written is read back, nothing is encoded twice, mismatches are refused, and a kill leaves it whole."""

import json
import multiprocessing
import os
import random
import re
import resource
import signal
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import lancedb
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import build_encoder, build_model, train_encoder_tokenizer, train_tokenizer

from refrag.config import IndexSettings
from refrag.errors import InputError, MismatchError, NotFoundError, RefragError
from refrag.index import PassageIndex, batches, store, table
from refrag.index.manifest import Manifest
from refrag.index.vectors import pack, row_type, unpack
from refrag.text import Passage

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["refrag.model", "refrag.index.store", "conftest"])
"""Real processes that start fast: the imports are done once."""

WORDS = ["harbour", "founded", "town", "coast", "lighthouse", "mill", "lamp", "burned", "people", "north", "ship", "wright", "old", "beside", "ninety", "years", "Velmoor", "Torrel"]


def make_passages(count: int, *, seed: int = 0) -> list[Passage]:
    """Passages of 5 to 40 words, with ids that need quoting."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(5, 40))) for _ in range(count)]
    return [Passage(f"it's {number} é", text, f"Title {number}", {"number": number}) for number, text in enumerate(texts)]


def save_retriever(folder: Path, *, seed: int = 3) -> str:
    """A tiny random sentence encoder in a folder."""
    build_encoder("bert", seed=seed).save_pretrained(folder)
    train_encoder_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> IndexSettings:
    return IndexSettings(retriever=save_retriever(tmp_path_factory.mktemp("retriever")), batch_size=8)


@pytest.fixture
def index(tmp_path, tiny_model, settings) -> PassageIndex:
    return PassageIndex.create(tmp_path / "index", tiny_model, settings)


def expected_embeds(model, passage: Passage) -> torch.Tensor:
    """Chunk vectors straight from the model."""
    from refrag.text import PromptBuilder

    builder = PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size)
    return model.encode(builder.chunk_texts(builder.chunk(passage.text), passage.text))


# ── vectors as bytes ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_float16_rows_by_hand():
    cells = pack(np.array([[1.0, -2.0], [0.5, 0.25], [3.0, 4.0]], np.float32), [2, 0, 1], "float16")
    assert [cell.as_py().hex() for cell in cells] == ["003c00c000380034", "", "00420044"]
    assert [part.tolist() for part in unpack(cells, "float16", 2)] == [[[1.0, -2.0], [0.5, 0.25]], [], [[3.0, 4.0]]]


def test_int8_rows_by_hand():
    cells = pack(np.array([[127.0, -12.7], [0.0, 0.0]], np.float32), [1, 1], "int8")
    assert row_type("int8", 2).itemsize == 6
    assert cells[0].as_py() == np.float32(1.0).tobytes() + bytes([127, 256 - 13])
    assert [part.tolist() for part in unpack(cells, "int8", 2)] == [[[127.0, -13.0]], [[0.0, 0.0]]]


@pytest.mark.parametrize(("storage", "error"), [("float16", 1e-3), ("int8", 1 / 250)])
def test_stored_vectors_stay_close(storage, error):
    embeds = np.random.default_rng(0).standard_normal((50, 24), np.float32) * 7
    [read] = unpack(pack(embeds, [50], storage), storage, 24)
    assert np.abs(read.numpy() - embeds).max() <= error * np.abs(embeds).max(axis=1).max()


def test_vectors_that_cannot_be_stored():
    with pytest.raises(InputError, match="is not finite: use float32 weights"):
        pack(np.array([[1.0, np.nan]], np.float32), [1], "float16")
    with pytest.raises(InputError, match="below 65504 to be stored as float16, one holds 70000: use --storage int8"):
        pack(np.array([[1.0, 70000.0]], np.float32), [1], "float16")
    assert unpack(pack(np.array([[1.0, 70000.0]], np.float32), [1], "int8"), "int8", 2)[0][0, 1] == 70000


def test_unpack_follows_a_slice():
    cells = pack(np.arange(8, dtype=np.float32).reshape(4, 2), [1, 2, 1], "float16")
    assert [part.tolist() for part in unpack(cells.slice(1, 2), "float16", 2)] == [[[2, 3], [4, 5]], [[6, 7]]]


# ── add, read, update, delete ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("storage", "tolerance"), [("float16", 2e-3), ("int8", 2e-2)])
def test_what_is_added_is_read_back(tmp_path, tiny_model, settings, storage, tolerance):
    passages = make_passages(20)
    index = PassageIndex.create(tmp_path / "index", tiny_model, replace(settings, storage=storage))
    counts = index.add(iter(passages))
    expected = {passage.id: expected_embeds(tiny_model, passage) for passage in passages}
    assert counts == {"added": 20, "updated": 0, "unchanged": 0, "chunks": sum(map(len, expected.values()))}
    read = PassageIndex.open(tmp_path / "index", model=tiny_model)
    assert read.passages([passage.id for passage in passages]) == {passage.id: passage for passage in passages}
    embeds = read.chunk_embeds([passages[3].id, "unknown", passages[0].id])
    assert embeds.keys() == {passages[3].id, passages[0].id}
    for identity, vectors in embeds.items():
        torch.testing.assert_close(vectors, expected[identity], atol=tolerance, rtol=tolerance)
    assert read.chunk_embeds([]) == {} and read.chunk_embeds(["unknown"]) == {}
    assert read.verify() == []


def test_unchanged_passages_are_not_encoded_again(index, tiny_model, monkeypatch):
    passages = make_passages(10)
    index.add(passages)
    encoded: list[str] = []
    encode = tiny_model.encode
    monkeypatch.setattr(tiny_model, "encode", lambda texts, **kwargs: encoded.extend(texts) or encode(texts, **kwargs))
    assert index.add(passages) == {"added": 0, "updated": 0, "unchanged": 10, "chunks": 0}
    assert encoded == []
    changed = [passages[4], replace(passages[5], text="A lamp."), replace(passages[6], metadata={"number": 1.5}), Passage("new", "A mill.")]
    counts = index.add(changed)
    assert (counts["added"], counts["updated"], counts["unchanged"]) == (1, 2, 1)
    assert "".join(encoded) == "A lamp." + passages[6].text + "A mill."
    assert index.count == 11
    assert index.passages([passages[5].id])[passages[5].id].text == "A lamp."
    assert index.verify() == []


def test_the_last_passage_of_an_id_counts(index):
    counts = index.add([Passage("a", "The mill."), Passage("b", "The ship."), Passage("a", "The lamp.")])
    assert (counts["added"], counts["unchanged"], index.count) == (2, 1, 2)
    assert index.passages(["a"])["a"].text == "The lamp."


def test_delete(index):
    passages = make_passages(5)
    index.add(passages)
    assert index.delete([passages[1].id, "unknown", passages[3].id]) == 2
    assert index.delete([]) == 0
    assert index.count == 3
    assert passages[1].id not in index.passages([passage.id for passage in passages])
    assert index.chunk_embeds([passages[3].id]) == {}
    assert index.add(passages)["added"] == 2


def test_blank_and_strange_texts(index):
    passages = [
        Passage("", ""),
        Passage("blank", " \n"),
        Passage("letter", "a"),
        Passage("rtl", "مرحبا بالعالم"),
        Passage("emoji", "👩‍👩‍👧 😀" * 5),
        Passage("control", "</s><s>[SEP]\0x"),
    ]
    index.add(passages)
    embeds = index.chunk_embeds([passage.id for passage in passages])
    assert embeds[""].shape == embeds["blank"].shape == (0, 24)
    assert len(embeds["letter"]) == 1
    assert index.passages(["control"])["control"].text == "</s><s>[SEP]\0x"
    assert index.verify() == []


def test_metadata_survives_and_must_be_json(index):
    metadata = {"source": "a.txt", "year": 1742, "deep": {"list": [1, None, "é😀"], "big": 2**62, "small": 1e-300}}
    index.add([Passage("a", "The mill.", metadata=metadata)])
    assert index.passages(["a"])["a"].metadata == metadata
    with pytest.raises(InputError, match=r"must be JSON values under string keys .*: leave the value out"):
        index.add([Passage("b", "The ship.", metadata={"x": float("nan")})])


def test_adding_streams(index):
    """No more than the batches in flight (one read ahead, one encoded, one written) are ever taken from the iterator."""
    taken, done, furthest = 0, 0, 0

    def stream():
        nonlocal taken
        for passage in make_passages(80):
            taken += 1
            yield passage

    def progress(count: int) -> None:
        nonlocal done, furthest
        furthest = max(furthest, taken - done)
        done += count

    index.add(stream(), progress=progress)
    assert done == 80 and furthest <= 3 * index.settings.batch_size


def test_long_passages_make_small_batches(index, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_CHARACTERS", 50)
    sizes: list[int] = []
    index.add([Passage(str(number), "The old mill beside the town.") for number in range(6)], progress=sizes.append)
    assert sizes == [2, 2, 2]


def test_a_failing_source_keeps_whole_batches(index):
    def broken():
        yield from make_passages(20)
        raise InputError("line 21 is broken")

    with pytest.raises(InputError, match="line 21 is broken"):
        index.add(broken())
    written = index.count
    assert written in (8, 16) and index.verify() == []
    counts = index.add(make_passages(20))
    assert (counts["added"], counts["unchanged"]) == (20 - written, written)


# ── opening ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_missing_index(tmp_path):
    with pytest.raises(NotFoundError, match=r"There is no index at .*nothing: make one with  refrag index build PATH… --index"):
        PassageIndex.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "table" / "passages.lance").mkdir(parents=True)  # what a kill before the first commit leaves
    with pytest.raises(NotFoundError):
        PassageIndex.open(tmp_path / "table")


def test_an_index_is_not_overwritten(tmp_path, index, tiny_model, settings):
    index.add(make_passages(3))
    with pytest.raises(InputError, match=r"There is an index at .* already: open it, or replace it with --rebuild"):
        PassageIndex.create(index.path, tiny_model, settings)
    assert PassageIndex.open(index.path).count == 3
    rebuilt = PassageIndex.create(index.path, tiny_model, replace(settings, storage="int8"), rebuild=True)
    assert rebuilt.count == 0 and PassageIndex.open(index.path).settings.storage == "int8"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.md").write_text("x")
    with pytest.raises(InputError, match=r"An index needs a folder of its own, .*notes holds other files: pass another --index"):
        PassageIndex.create(tmp_path / "notes", tiny_model, settings)
    assert [own.name for own in (tmp_path / "notes").iterdir()] == ["mine.md"]
    (tmp_path / "volume" / "lost+found").mkdir(parents=True)
    PassageIndex.create(tmp_path / "volume", tiny_model, settings)
    (tmp_path / "volume" / "notes.txt").touch()  # beside an index that is there
    assert PassageIndex.create(tmp_path / "volume", tiny_model, settings, rebuild=True).count == 0
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file, an index needs a folder"):
        PassageIndex.create(tmp_path / "file", tiny_model, settings)


def test_open_or_create(tmp_path, tiny_model, settings):
    first = PassageIndex.open_or_create(tmp_path / "index", tiny_model, settings)
    first.add(make_passages(2))
    assert PassageIndex.open_or_create(tmp_path / "index", tiny_model, settings).count == 2
    with pytest.raises(MismatchError, match="was made with --storage float16, now it is int8: give the same again, or make it anew with --rebuild"):
        PassageIndex.open_or_create(tmp_path / "index", tiny_model, replace(settings, storage="int8"))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"chunk_size": 8}, "chunk_size: index 4, given 8"),
        ({"pooling": "mean"}, "pooling: index cls, given mean"),
        ({"decoder_tokenizer": train_tokenizer(vocab_size=380)}, "decoder_tokenizer: index [0-9a-f]{16}, given [0-9a-f]{16}"),
    ],
)
def test_another_model_is_refused(index, changed, named):
    with pytest.raises(MismatchError, match=rf"belongs to another model \({named.replace('_', '.')}\): pass the --model .* --rebuild"):
        PassageIndex.open(index.path, model=build_model(**changed))


def test_a_model_that_may_be_loaded_with_the_index_s_chunk_size_is_told_so(index):
    model = build_model(chunk_size=8)
    model.config.chunk_sizes = [4, 8]
    with pytest.raises(MismatchError, match=r"\(chunk size: index 4, given 8\): pass --chunk-size 4, or make it anew with"):
        PassageIndex.open(index.path, model=model)


def test_other_encoder_weights_are_refused_but_not_another_projector(index, make_model):
    model = make_model()
    with torch.no_grad():
        model.projector.up.weight.add_(1)
    PassageIndex.open(index.path, model=model)
    with torch.no_grad():
        next(model.encoder.parameters()).mul_(1.1)
    with pytest.raises(MismatchError, match="encoder weights: index"):
        PassageIndex.open(index.path, model=model)


def test_another_retriever_is_refused(tmp_path, index):
    from refrag.index import SentenceEncoder

    other = SentenceEncoder(save_retriever(tmp_path / "other", seed=9))
    with pytest.raises(MismatchError, match=r"was embedded by another retriever \(name: index .*; weights: index .*\): use .*retriever"):
        PassageIndex.open(index.path, retriever=other)


def test_retriever_weights_that_changed_on_disk_are_refused(tmp_path, tiny_model):
    folder = save_retriever(tmp_path / "own")
    index = PassageIndex.create(tmp_path / "index", tiny_model, IndexSettings(retriever=folder))
    index.add(make_passages(2))
    save_retriever(tmp_path / "own", seed=9)
    with pytest.raises(MismatchError, match="another retriever"):
        PassageIndex.open(index.path).search("Who?")


def test_other_formats_are_refused(tmp_path, tiny_model, settings):
    manifest = replace(Manifest(settings, tiny_model.fingerprint(), {"name": "x"}), format_version=99)
    table.PassageTable.create(str(tmp_path / "index"), table.table_schema(manifest, 4), replace=False)
    with pytest.raises(MismatchError, match="has format 99, this version of refrag reads format 2"):
        PassageIndex.open(tmp_path / "index")
    lancedb.connect(tmp_path / "foreign").create_table("passages", pa.table({"id": ["a"]}))
    with pytest.raises(MismatchError, match="was not made by refrag"):
        PassageIndex.open(tmp_path / "foreign")


def test_a_model_is_needed_to_add(index):
    with pytest.raises(InputError, match=r"Passages can only be added with the model .*PassageIndex.open\("):
        PassageIndex.open(index.path).add(make_passages(1))


# ── looking after it ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_info(index):
    index.add(make_passages(9))
    info = index.info()
    assert (info["passages"], info["format_version"], info["storage"]) == (9, 2, "float16")
    assert info["chunks"] == sum(len(vectors) for vectors in index.chunk_embeds([passage.id for passage in make_passages(9)]).values())
    assert info["model"]["chunk_size"] == 4 and "projector" not in info["model"] and info["bytes"] > 0
    json.dumps(info)


def test_verify_names_what_is_wrong(index):
    index.add(make_passages(4))
    lance = lancedb.connect(index.path).open_table("passages")
    lance.update(where="id = 'it''s 0 é'", values={"text": "forged"})
    lance.update(where="id = 'it''s 1 é'", values={"num_chunks": 1000})
    cell = lance.search().where("id = 'it''s 3 é'").to_arrow()["chunk_embeds"][0].as_py()
    lance.update(where="id = 'it''s 3 é'", values={"chunk_embeds": bytes([cell[0] ^ 1]) + cell[1:]})
    time.sleep(1.1)
    problems = "\n".join(index.verify())
    assert "it's 0 é\" is not the one that was stored" in problems
    assert "it's 1 é\" should hold 1000 chunk vectors" in problems
    assert "it's 3 é\" does not hold the vectors that were stored: their checksum differs" in problems
    assert "it's 2 é" not in problems


def test_optimize_joins_files_and_readers_survive_it(index, tiny_model, monkeypatch):
    reader = PassageIndex.open(index.path)
    passages = make_passages(64)
    index.add(passages[:32])
    time.sleep(1.1)  # a reader looks for new versions once a second
    assert len(reader.chunk_embeds([passages[0].id])) == 1
    monkeypatch.setattr(table, "KEPT_VERSIONS", timedelta(0))
    index.add(passages[32:])
    assert index.info()["fragments"] <= 2  # of 8 batches: Lance joins files that its indexes cover with others one call later
    assert len(reader.chunk_embeds([passages[0].id, passages[63].id])) >= 1  # the version it had read is gone from disk
    time.sleep(1.1)
    assert len(reader.chunk_embeds([passages[0].id, passages[63].id])) == 2


def test_building_optimizes_on_the_way(index, monkeypatch):
    monkeypatch.setattr(store, "OPTIMIZE_ROWS", 16)
    sizes: list[int] = []
    optimize = index.table.optimize
    monkeypatch.setattr(index.table, "optimize", lambda: (sizes.append(index.count), optimize()))
    index.add(make_passages(80))
    assert sizes == [16, 32, 64, 80]


# ── crashes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def build_slowly(path: str, settings: IndexSettings, started) -> None:
    """Child process: adds 160 passages in batches of 8, optimising often."""
    store.OPTIMIZE_ROWS = 24
    index = PassageIndex.open_or_create(path, build_model(), settings)
    started.set()
    index.add(make_passages(160))


def test_sigkill_at_any_moment(tmp_path, tiny_model, settings):
    """Killed again and again while building: it opens, holds whole passages only, and the same call finishes the rest."""
    rng, path, counts = random.Random(7), str(tmp_path / "index"), [0]
    for attempt in range(6):
        started = FORKSERVER.Event()
        child = FORKSERVER.Process(target=build_slowly, args=(path, settings, started))
        child.start()
        if attempt:  # the first one is killed while the table is made
            assert started.wait(60)
        time.sleep(rng.uniform(0.0, 0.35))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        try:
            index = PassageIndex.open(path, model=tiny_model)
        except NotFoundError:
            assert counts[-1] == 0  # killed before the first commit
            continue
        assert index.verify() == []
        counts.append(index.count)
    assert counts == sorted(counts), "a kill lost passages that had been written"
    index = PassageIndex.open_or_create(path, tiny_model, settings)
    before = index.count
    done = index.add(make_passages(160))
    assert (done["added"], done["unchanged"], index.count) == (160 - before, before, 160)
    assert index.verify() == []
    whole = PassageIndex.create(tmp_path / "whole", tiny_model, settings)
    whole.add(make_passages(160))
    ids = [passage.id for passage in make_passages(160)]
    expected, found = whole.chunk_embeds(ids), index.chunk_embeds(ids)
    assert all(torch.equal(expected[identity], found[identity]) for identity in ids)


def add_with_small_files(path: str, connection) -> None:
    """Child process: adds passages while no file may grow over 8 KiB, and sends the error's words."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    index = PassageIndex.open(path, model=build_model())
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    try:
        index.add(make_passages(200))
    except RefragError as error:
        connection.send(str(error))


def test_full_disk_is_one_sentence(index, tiny_model):
    index.add(make_passages(8))
    receiver, sender = FORKSERVER.Pipe(duplex=False)
    child = FORKSERVER.Process(target=add_with_small_files, args=(index.path, sender))
    child.start()
    assert receiver.poll(60)
    assert re.fullmatch(r"The index at .* could not be written since .*: what was there before is whole; make room and run the same command again\.", receiver.recv())
    child.join()
    assert PassageIndex.open(index.path, model=tiny_model).verify() == []
    assert index.count >= 8 and index.add(make_passages(200))["unchanged"] >= 8
