"""Import of the prototype's files: its passages come over, nothing in a hostile file is run."""

import io
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from refrag.cli import main
from refrag.encoder import Projector
from refrag.errors import InputError, MismatchError, NotFoundError
from refrag.index import PassageIndex, import_prototype
from refrag.index.checkpoint import convert_checkpoint, folded, read_checkpoint
from refrag.index.prototype import load_strings
from refrag.model import RefragModel

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


@pytest.mark.parametrize(("texts", "message"), [([], "No passage with text was found in"), (["", " "], "No passage with text"), (["a", "x \ud800"], "the text holds half a character")])
def test_passages_that_cannot_be_stored(tmp_path, texts, message):
    with pytest.raises(InputError, match=message):
        list(import_prototype(save_index(tmp_path / "old", texts)))


def test_a_hostile_index_is_one_sentence_on_the_command_line(tmp_path, capsys):
    marker = tmp_path / "was-run"
    folder = save_index(tmp_path / "old", ["a", Call(os.mkdir, str(marker))])
    assert main(["index", "import-prototype", str(folder), "--index", str(tmp_path / "index")]) == 2
    assert "is refused, since it must be an array of strings and nothing else" in capsys.readouterr().err
    assert not marker.exists() and not (tmp_path / "index").exists()


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


class OldProjector(torch.nn.Module):
    """The prototype's, by its file layout: unit vectors, Linear, GELU, Linear, times a scale, plus a shift."""

    def __init__(self, enc: int, hidden: int):
        super().__init__()
        self.projection = torch.nn.Sequential(torch.nn.Linear(enc, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, hidden))
        self.scale, self.shift = torch.nn.Parameter(torch.tensor([0.37])), torch.nn.Parameter(torch.tensor([-0.02]))

    def forward(self, cls):
        return self.projection(torch.nn.functional.normalize(cls, dim=-1)) * self.scale + self.shift


@pytest.fixture
def parts(tmp_path, make_encoder, make_decoder, tokenizer, encoder_tokenizer):
    """The prototype's parts: the base encoder (config and tokenizer) on disk, trained encoder, decoder and projector in memory."""
    make_encoder("roberta", seed=5).save_pretrained(tmp_path / "roberta")
    encoder_tokenizer.save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "llama")
    torch.manual_seed(8)
    return make_encoder("roberta", seed=6), make_decoder("llama", seed=7), OldProjector(24, 32)


@pytest.fixture
def folder(tmp_path, parts):
    """A checkpoint folder as the prototype's `save_checkpoint` writes it: no tokenizer anywhere."""
    parts[1].save_pretrained(tmp_path / "run" / "decoder")
    torch.save(checkpoint(parts, tmp_path), tmp_path / "run" / "checkpoint.pt")
    return tmp_path / "run"


def checkpoint(parts, tmp_path, **changes) -> dict:
    encoder, _, projector = parts
    optimizer = torch.optim.AdamW(projector.parameters())
    projector(torch.ones(1, 24)).sum().backward()
    optimizer.step()
    saved = {
        "config": {"encoder_name": str(tmp_path / "roberta"), "decoder_name": str(tmp_path / "llama"), "chunk_size_k": 4, "expansion_fraction_p": 0.25},
        "encoder_state_dict": {f"model.{name}": weight for name, weight in encoder.state_dict().items()} | {"model.embeddings.position_ids": torch.arange(64)},
        "projector_state_dict": projector.state_dict(),
        "policy_state_dict": {"output_head.weight": torch.zeros(1, 4)},
        "step": 300,
        "optimizer_state_dict": optimizer.state_dict(),
    }
    return saved | changes


def test_checkpoint_layout(folder, parts):
    read = read_checkpoint(folder)
    assert torch.equal(read.encoder["embeddings.word_embeddings.weight"], parts[0].embeddings.word_embeddings.weight)
    assert (read.version, read.step, read.config["chunk_size_k"], read.decoder_folder) == (2, 300, 4, folder / "decoder")
    (folder / "decoder" / "config.json").unlink()
    assert read_checkpoint(folder).decoder_folder is None


def test_a_converted_checkpoint_computes_what_the_prototype_did(folder, parts, tokenizer, tmp_path):
    encoder, decoder, projector = parts
    convert_checkpoint(folder).save_pretrained(tmp_path / "model")
    model = RefragModel.from_pretrained(tmp_path / "model")
    assert (model.config.chunk_size, model.config.pooling, model.config.expand_fraction, model.has_trained_policy) == (4, "cls", 0.25, False)
    texts = ["The harbour of Velmoor", "Größe, 東京 😀", "a"]
    rows = [model.encoder_tokenizer(text, return_tensors="pt") for text in texts]
    with torch.no_grad():
        old = torch.cat([projector(encoder(**row).last_hidden_state[:, 0]) for row in rows])
        new = model.project(model.encode(texts))
        ids = tokenizer("The harbour of Velmoor", return_tensors="pt")["input_ids"]
        assert torch.equal(model.decoder(ids).logits, decoder(ids).logits)
    torch.testing.assert_close(new, old, atol=1e-6, rtol=1e-5)
    assert old.std() > 0.01


def test_older_projectors_have_no_scale_and_no_shift(parts):
    projector = parts[2]
    with torch.no_grad():
        projector.scale.fill_(1), projector.shift.fill_(0)
    state = {name: weight for name, weight in projector.state_dict().items() if name not in ("scale", "shift")}
    ours = Projector(24, 32, 32)
    ours.load_state_dict(folded(state))
    vectors = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(vectors), projector(vectors), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"projector_state_dict": {"proj.0.weight": torch.zeros(2, 2)}}, InputError, r"must have the layers Linear, GELU, Linear of the prototype, has proj.0.weight"),
        ({"encoder_state_dict": {"model.x": torch.zeros(1)}}, MismatchError, r"The encoder of .*run does not fit .*roberta: embeddings.LayerNorm.bias is absent in the checkpoint and \(24,\) in the model"),
        ({"config": {"encoder_name": "/no/such/encoder", "decoder_name": "/no/such/decoder"}}, NotFoundError, r"The decoder's tokenizer '/no/such/decoder', which the checkpoint names, could not be loaded"),
    ],
)
def test_checkpoints_that_cannot_be_converted(folder, parts, tmp_path, changes, error, message):
    torch.save(checkpoint(parts, tmp_path, **changes), folder / "checkpoint.pt")
    with pytest.raises(error, match=message):
        convert_checkpoint(folder)


def test_a_projector_of_another_width_is_refused(folder, parts, tmp_path):
    torch.save(checkpoint(parts, tmp_path, projector_state_dict=OldProjector(24, 40).state_dict()), folder / "checkpoint.pt")
    with pytest.raises(MismatchError, match=r"The projector of .*run does not fit its encoder and decoder: down.bias is \(40,\) in the checkpoint and \(32,\) in the model"):
        convert_checkpoint(folder)


def test_version_1_is_read_but_not_converted(tmp_path):
    for part in ("encoder", "projector"):
        torch.save({f"model.{part}": torch.ones(2)}, tmp_path / f"{part}.pt")
    read = read_checkpoint(tmp_path)
    assert (read.version, read.encoder.keys(), read.policy) == (1, {"encoder"}, {})
    with pytest.raises(InputError, match=r"is a version 1 checkpoint: its projector applies tanh .*: import its index alone, and train with refrag"):
        convert_checkpoint(tmp_path)


def test_bad_checkpoints(folder, parts, tmp_path):
    with pytest.raises(NotFoundError, match=r"There is no checkpoint.pt \(or encoder.pt\) in"):
        read_checkpoint(tmp_path)
    torch.save(checkpoint(parts, tmp_path, policy_state_dict=None), folder / "checkpoint.pt")
    with pytest.raises(InputError, match="must hold the prototype's parts, lacks the weights of policy"):
        read_checkpoint(folder)
    marker = tmp_path / "was-run"
    for name in ("checkpoint.pt", "encoder.pt"):
        torch.save(checkpoint(parts, tmp_path, evil=Call(os.mkdir, str(marker))), folder / name)
        with pytest.raises(InputError, match=f"{name} is refused, since it must hold tensors and plain values only"):
            read_checkpoint(folder)
        assert not marker.exists()
        (folder / name).write_bytes(b"nonsense")
        with pytest.raises(InputError, match="is refused"):
            read_checkpoint(folder)
        (folder / name).unlink()


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_index_and_checkpoint_from_the_command_line(folder, tmp_path, capsys):
    command = ["index", "import-prototype", str(save_index(tmp_path / "old")), "--index", str(tmp_path / "index")]
    assert main([*command, "--checkpoint", str(folder)]) == 2
    assert "give both --checkpoint FOLDER and --save-model FOLDER" in capsys.readouterr().err
    assert main([*command, "--checkpoint", str(folder), "--save-model", str(tmp_path / "model"), "--model", str(tmp_path / "x")]) == 2
    assert "give either --model or --checkpoint" in capsys.readouterr().err
    assert main([*command, "--checkpoint", str(folder), "--save-model", str(tmp_path / "model")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "The encoder, the projector and the decoder came over exactly. The policy did not" in said
    index = PassageIndex.open(tmp_path / "index", model=RefragModel.from_pretrained(tmp_path / "model"))
    assert index.count == 3 and index.verify() == []
    asked = ["ask", "What burned?", "--index", str(tmp_path / "index"), "--model", str(tmp_path / "model"), "--max-new-tokens", "4", "--json", "--quiet"]
    assert main(asked) == 0 and '"rule": "similarity"' in capsys.readouterr().out
