"""Import of the prototype's files: its passages come over, nothing in a hostile file is run."""

import io
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from refrag.errors import InputError, NotFoundError
from refrag.index import PassageIndex, import_prototype
from refrag.index.prototype import load_strings, read_checkpoint

TEXTS = ["The harbour was founded in 1742.", "Größe, 東京 😀", "A lamp burned.", "A lamp burned."]


def save_index(folder, texts=TEXTS, *, name="faiss_passages.npy", width=4, count=None):
    """What the prototype's `index` command writes."""
    folder.mkdir(exist_ok=True)
    np.save(folder / name, np.array(texts, dtype=object))
    count = len(texts) if count is None else count
    header = struct.pack("<4siqqq?iq", b"IxFI", width, count, 1 << 20, 1 << 20, True, 0, count * width)
    (folder / "faiss.index").write_bytes(header + bytes(4 * count * width))
    return folder


def write_npy(path, payload: bytes, *, descr: str = "|O"):
    """A .npy file whose pickled payload is given byte by byte."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (1,)})
        file.write(payload)
    return path


@pytest.mark.parametrize("name", ["faiss_passages.npy", "texts.npy"])
def test_passages_come_over(tmp_path, name):
    passages = list(import_prototype(save_index(tmp_path / "old", name=name)))
    assert [passage.text for passage in passages] == TEXTS
    assert passages[2].id == passages[3].id != passages[0].id
    assert passages[0].metadata["source"].endswith(name)


def test_a_real_faiss_file_is_understood(tmp_path):
    faiss = pytest.importorskip("faiss")
    folder = save_index(tmp_path / "old")
    flat = faiss.IndexFlatIP(8)
    flat.add(np.zeros((len(TEXTS), 8), np.float32))
    faiss.write_index(flat, str(folder / "faiss.index"))
    assert len(list(import_prototype(folder))) == len(TEXTS)
    flat.add(np.zeros((1, 8), np.float32))
    faiss.write_index(flat, str(folder / "faiss.index"))
    with pytest.raises(InputError, match="holds 5 vectors but 4 passages: build the index from the corpus instead"):
        import_prototype(folder)


def test_an_index_is_made_of_it(tmp_path, tiny_model):
    index = PassageIndex.create(tmp_path / "index", tiny_model)
    assert index.add(import_prototype(save_index(tmp_path / "old")))["added"] == 3
    assert index.search("What burned?", top_k=1)[0].passage.text == "A lamp burned."


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(NotFoundError, match=r"must hold faiss_passages.npy or texts.npy: pass the folder"):
        import_prototype(tmp_path)
    folder = save_index(tmp_path / "old")
    (folder / "faiss.index").write_bytes(b"PK\3\4" + bytes(40))
    with pytest.raises(InputError, match=r"faiss.index is not a FAISS index"):
        import_prototype(folder)
    (folder / "faiss.index").unlink()
    with pytest.raises(NotFoundError, match=r"There is no faiss.index in"):
        import_prototype(folder)


# ── strings ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_of_numpy(tmp_path, protocol):
    payload = pickle.dumps(np.array(TEXTS, dtype=object), protocol=protocol)
    if protocol == 2:  # bytes are spelled by a codec call there: numpy itself never writes it
        with pytest.raises(InputError, match="is refused"):
            load_strings(write_npy(tmp_path / "a.npy", payload))
    else:
        assert load_strings(write_npy(tmp_path / "a.npy", payload)) == TEXTS


def test_lists_and_unicode_arrays(tmp_path):
    assert load_strings(write_npy(tmp_path / "a.npy", pickle.dumps(TEXTS))) == TEXTS
    np.save(tmp_path / "b.npy", np.array(TEXTS))
    assert load_strings(tmp_path / "b.npy") == TEXTS
    many = [f"passage {number}" for number in range(3000)]
    np.save(tmp_path / "c.npy", np.array(many, dtype=object))
    assert load_strings(tmp_path / "c.npy") == many
    np.save(tmp_path / "d.npy", np.array([], dtype=object))
    assert load_strings(tmp_path / "d.npy") == []


class Call:
    """Unpickled by the plain unpickler, calls a function."""

    def __init__(self, function, *arguments):
        self.reduction = (function, arguments)

    def __reduce__(self):
        return self.reduction


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: [evil], lambda evil: np.array(["text", evil], dtype=object)])
@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, __import__, np.load, np.frombuffer, io.open, type])
def test_hostile_pickles_are_refused_and_not_run(tmp_path, monkeypatch, function, wrap):
    marker = tmp_path / "was-run"
    argument = f"touch {marker}" if function is os.system else f"__import__('pathlib').Path({str(marker)!r}).touch()"
    path = write_npy(tmp_path / "a.npy", pickle.dumps(wrap(Call(function, argument))))
    with pytest.raises(InputError, match=r"a.npy is refused, since it must be an array of strings and nothing else"):
        load_strings(path)
    assert not marker.exists()


def test_the_plain_loader_would_have_run_it(tmp_path):
    """The attack above is real: NumPy's own loader runs it."""
    marker = tmp_path / "was-run"
    np.load(write_npy(tmp_path / "a.npy", pickle.dumps(Call(os.mkdir, str(marker)))), allow_pickle=True)
    assert marker.is_dir()


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n"


@pytest.mark.parametrize(
    "payload",
    [
        b"\x80\x04cposix\nsystem\n\x8c\x02lsR.",
        b"\x80\x04cnumpy\nload\n.",
        b"\x80\x04cnumpy.core.multiarray\nscalar\n.",
        b"\x80\x04cnumpy\nndarray.__class__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile.\x93.",
        b"\x80\x04cbuiltins\ngetattr\n.",
        b"(S'ls'\nios\nsystem\n.",
        b"\x80\x04\x82\x01.",
        b"\x80\x04Px\n.",
        b"\x80\x04r\xff\xff\xff\x7f.",
        b"\x80\x04]r\xff\xff\xff\x7f.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.",
        b"\x80\x04}\x8c\x01ax.",
        b"\x80\x04K\x05.",
        b"\x80\x04](]K\x01ae.",
        b"\x80\x04](C\x01ae.",
        b"\x80\x04" + ARRAY + b")R.",
        b"\x80\x04" + ARRAY + b")R]b.",
        b"\x80\x04cnumpy\ndtype\n)R.",
        b"\x80\x04cnumpy\nndarray\n]b.",
        b"\x80\x04",
        b"",
        b"garbage",
    ],
)
def test_crafted_payloads_are_refused(tmp_path, payload):
    with pytest.raises(InputError, match="is refused, since it must be an array of strings and nothing else"):
        load_strings(write_npy(tmp_path / "a.npy", payload))


@pytest.mark.parametrize("content", [[1, 2], ["a", None], ["a", ["b"]], ["a", b"b"], {"a": 1}, "text", np.array(["a", 1.5], dtype=object)])
def test_only_strings(tmp_path, content):
    with pytest.raises(InputError, match="is refused"):
        load_strings(write_npy(tmp_path / "a.npy", pickle.dumps(content)))


def test_other_arrays_and_files(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(InputError, match="must hold strings, holds float64: pass the passages file"):
        load_strings(tmp_path / "a.npy")
    (tmp_path / "b.npy").write_bytes(b"no numpy file")
    with pytest.raises(InputError, match=r"b.npy is refused"):
        load_strings(tmp_path / "b.npy")
    write_npy(tmp_path / "c.npy", b"", descr="[('a', '|O')]")
    with pytest.raises(InputError, match=r"c.npy is refused"):
        load_strings(tmp_path / "c.npy")


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────


def checkpoint() -> dict:
    return {
        "config": {"encoder_name": "roberta-large", "chunk_size_k": 16},
        "encoder_state_dict": {"model.embeddings.weight": torch.ones(2, 3)},
        "projector_state_dict": {"projection.0.weight": torch.zeros(4, 3), "scale": torch.ones(1)},
        "policy_state_dict": {"output_head.weight": torch.zeros(1, 4)},
        "step": 300,
    }


def test_checkpoint_layout(tmp_path):
    torch.save(checkpoint(), tmp_path / "checkpoint.pt")
    read = read_checkpoint(tmp_path)
    assert read.encoder.keys() == {"embeddings.weight"} and torch.equal(read.encoder["embeddings.weight"], torch.ones(2, 3))
    assert (read.step, read.config["chunk_size_k"], read.decoder_folder) == (300, 16, None)
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "config.json").write_text("{}")
    assert read_checkpoint(tmp_path).decoder_folder == tmp_path / "decoder"


def test_bad_checkpoints(tmp_path):
    with pytest.raises(NotFoundError, match=r"There is no checkpoint.pt in"):
        read_checkpoint(tmp_path)
    torch.save({key: value for key, value in checkpoint().items() if key != "policy_state_dict"}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="must hold the prototype's parts, lacks policy_state_dict"):
        read_checkpoint(tmp_path)
    marker = tmp_path / "was-run"
    torch.save(checkpoint() | {"evil": Call(os.mkdir, str(marker))}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="is refused, since it must hold tensors and plain values only"):
        read_checkpoint(tmp_path)
    assert not marker.exists()
    (tmp_path / "checkpoint.pt").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is refused"):
        read_checkpoint(tmp_path)
