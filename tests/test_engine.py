"""The engine on tiny random networks, a real index and real threads: answers, counts, traces, streams and errors."""

import json
from concurrent.futures import ThreadPoolExecutor

import jaxtyping
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from refrag.config import POLICIES, Budget, GenerationSettings
from refrag.engine import Refrag, Request
from refrag.engine.answer import TIMING_KEYS, USAGE_KEYS, Answer, find_citations, render_summary, render_trace, segments
from refrag.engine.vectors import VectorCache
from refrag.errors import InputError, MismatchError, NotFoundError
from refrag.index import PassageIndex
from refrag.text import Passage, Turn

QUESTION = "Who founded the harbour of Velmoor?"
PASSAGES = [
    {"id": "velmoor", "title": "Velmoor", "text": "The harbour of Velmoor was founded in 1742 by the shipwright Anna Torrel."},
    {"id": "lamp", "title": "", "text": "A lighthouse — 東京 😀 — was built beside the old mill; its lamp burned for ninety years."},
    {"id": "blank", "text": "  "},
    "3,412 people live on the northern coast.",
]
SHORT = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def engine(tiny_model) -> Refrag:
    return Refrag(tiny_model)


@pytest.fixture(scope="module")
def index(tiny_model, tmp_path_factory) -> PassageIndex:
    made = PassageIndex.create(tmp_path_factory.mktemp("engine") / "index", tiny_model)
    made.add([Passage.from_any(own, number) for number, own in enumerate(PASSAGES, 1)])
    return made


@pytest.fixture
def unchecked():
    """As users run it: no type checks at run time, so that values of a wrong type reach our own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Encoded:
    """Counts the texts that a model encodes while it goes on encoding them."""

    def __init__(self, model, monkeypatch) -> None:
        self.texts: list[str] = []
        encode = model.encode

        def counting(texts, **kwargs):
            self.texts += texts
            return encode(texts, **kwargs)

        monkeypatch.setattr(model, "encode", counting)


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("decoder", ["llama", "gemma", "gpt_neox"])
def test_all_expanded_answers_as_plain_rag_does(make_model, decoder: str) -> None:
    model = make_model(decoder)
    engine = Refrag(model)
    prompt = engine.builder.build(QUESTION, PASSAGES)
    ids = torch.tensor([prompt.token_ids()])
    new = model.decoder.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    answer = engine.answer(QUESTION, PASSAGES, policy="all", **SHORT)
    assert answer.text == model.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert answer.usage["prompt_slots"] == ids.shape[1] == answer.full_slots
    assert answer.usage["compression_rate"] == 1.0


def test_usage_worked_by_hand(engine: Refrag) -> None:
    """Chunks of 4 tokens; `text` has 10 tokens, so 3 chunks; the heading, and the line break after, are the context's overhead."""
    tokens = engine.builder.encode("QXZJVKWYQX")
    assert len(tokens) == 10
    overhead = len(engine.builder.encode("[1] T\n")) + len(engine.builder.encode("\n"))
    rest = 1 + len(engine.builder.encode("Question: q\nAnswer:"))
    answer = engine.answer("q", [{"title": "T", "text": "QXZJVKWYQX"}], policy="first", expand_chunks=1, max_new_tokens=3)
    assert answer.usage == {
        "context_tokens": overhead + 10,
        "context_slots": overhead + 4 + 2,
        "prompt_slots": rest + overhead + 6,
        "num_chunks": 3,
        "expanded_chunks": 1,
        "compression_rate": (overhead + 10) / (overhead + 6),
        "kv_bytes": (rest + overhead + 6) * 2 * 2 * 2 * 8 * 4,  # keys and values, layers, kv heads, head width, fp32
        "completion_tokens": 3,
    }
    assert tuple(answer.usage) == USAGE_KEYS
    assert answer.finish_reason == "length"
    assert answer.full_slots == rest + overhead + 10


def test_timings_are_in_order(engine: Refrag) -> None:
    timings = engine.answer(QUESTION, PASSAGES, **SHORT).timings
    assert tuple(timings) == TIMING_KEYS
    stages = sum(timings[name] for name in TIMING_KEYS[:7])
    assert 0 < timings["prefill_s"] < stages <= timings["ttft_s"] < timings["total_s"]
    assert timings["total_s"] >= timings["ttft_s"] + 6 * timings["per_token_s"] > timings["ttft_s"]


def test_the_trace_says_why(engine: Refrag) -> None:
    answer = engine.answer(QUESTION, PASSAGES, policy="similarity", expand_fraction=0.3, **SHORT)
    assert len(answer.trace) == answer.usage["num_chunks"]
    expanded = [entry["score"] for entry in answer.trace if entry["expanded"]]
    compressed = [entry["score"] for entry in answer.trace if not entry["expanded"]]
    assert len(expanded) == answer.usage["expanded_chunks"] == int(0.3 * len(answer.trace))
    assert min(expanded) >= max(compressed)
    assert {entry["rule"] for entry in answer.trace} == {"similarity"}
    texts = {passage["id"]: "".join(text for text, _ in parts) for passage, parts in segments(answer)}
    assert texts == {"velmoor": PASSAGES[0]["text"], "lamp": PASSAGES[1]["text"], "blank": "", "4": PASSAGES[3]}
    assert [passage["number"] for passage in answer.passages] == [1, 2, 3, 4]
    json.dumps(answer.to_dict())


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "learned"])
def test_every_rule_answers(engine: Refrag, policy: str) -> None:
    answer = engine.answer(QUESTION, PASSAGES, policy=policy, **SHORT)
    assert {entry["rule"] for entry in answer.trace} == {policy}
    expanded = {"none": 0, "all": answer.usage["num_chunks"]}
    assert answer.usage["expanded_chunks"] == expanded.get(policy, int(0.1 * answer.usage["num_chunks"]))


def test_a_callable_and_the_learned_policy(make_model) -> None:
    model = make_model(policy={"kind": "mlp", "trained": True})
    engine = Refrag(model)
    assert engine.answer(QUESTION, PASSAGES, **SHORT).trace[0]["rule"] == "learned"  # the default of a model that has one

    def longest_first(inputs):
        return inputs.chunk_lengths.float() + 1 / (1 + torch.arange(inputs.num_chunks))

    answer = engine.answer(QUESTION, PASSAGES, policy=longest_first, expand_chunks=1, **SHORT)
    assert [entry["expanded"] for entry in answer.trace] == [True] + [False] * (len(answer.trace) - 1)
    assert answer.trace[0]["rule"] == "longest_first"


def test_max_slots_is_kept(engine: Refrag) -> None:
    none = engine.answer(QUESTION, PASSAGES, policy="none", **SHORT).usage["prompt_slots"]
    answer = engine.answer(QUESTION, PASSAGES, policy="first", max_slots=none + 7, **SHORT)
    assert answer.usage["expanded_chunks"] == 2  # 3 slots more for each chunk of 4
    assert answer.usage["prompt_slots"] == none + 6


def test_no_passages_and_blank_ones(engine: Refrag) -> None:
    alone = engine.answer(QUESTION, [], **SHORT)
    assert (alone.trace, alone.passages, alone.citations) == ([], [], ())
    assert alone.usage["compression_rate"] == 1.0
    assert engine.answer(QUESTION, ["", " "], policy="all", **SHORT).usage["num_chunks"] == 0


def test_history_is_compressed_and_numbered_on(engine: Refrag) -> None:
    history = [Turn("user", "Where?", (Passage("old", "The town lies on the northern coast."),)), Turn("assistant", "North [1]")]
    answer = engine.answer(QUESTION, PASSAGES[:1], history=history, policy="none", **SHORT)
    assert [passage["id"] for passage in answer.passages] == ["old", "velmoor"]
    assert {entry["passage_id"] for entry in answer.trace} == {"old", "velmoor"}


def test_same_seed_same_answer(engine: Refrag) -> None:
    def ask(seed: int) -> Answer:
        return engine.answer(QUESTION, PASSAGES, policy="random", expand_chunks=3, temperature=2.0, seed=seed, max_new_tokens=16)

    first, again, other = ask(1), ask(1), ask(2)
    assert (first.text, first.trace) == (again.text, again.trace)
    assert first.text != other.text
    assert [entry["expanded"] for entry in first.trace] != [entry["expanded"] for entry in other.trace]


def test_a_batch_equals_its_rows(engine: Refrag) -> None:
    generation = GenerationSettings(max_new_tokens=12, temperature=1.5)
    requests = [
        Request(QUESTION, PASSAGES, policy="similarity", generation=generation),
        Request("Where?", PASSAGES[3:], policy="none", generation=GenerationSettings(max_new_tokens=12, temperature=1.5, seed=9)),
        Request("Why did the lamp burn for ninety years?", [], generation=generation),
        Request(QUESTION, PASSAGES[:1], policy="all", generation=generation),
    ]
    alone = [engine.answer(request) for request in requests]
    together = engine.answer_batch(requests)
    for one, row in zip(alone, together, strict=True):
        assert (row.text, row.usage, row.citations, row.passages) == (one.text, one.usage, one.citations, one.passages)
        assert [entry["expanded"] for entry in row.trace] == [entry["expanded"] for entry in one.trace]
    assert engine.answer_batch([]) == []
    with pytest.raises(InputError, match="must share their generation settings"):
        engine.answer_batch([requests[0], Request("Why?", [], generation=GenerationSettings(max_new_tokens=3))])


def test_the_questions_of_a_batch_are_encoded_together_and_each_once(make_model, monkeypatch) -> None:
    model = make_model()
    engine, asked = Refrag(model), ["Who built it?", "How long did the lamp burn?", "Who built it?", "What of it?"]
    singles = [engine.answer(question, PASSAGES, policy="similarity", max_new_tokens=2) for question in asked]
    calls: list[list[str]] = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda texts, **kwargs: calls.append(list(texts)) or encode(texts, **kwargs))
    requests = [Request.make(question, PASSAGES, policy="similarity", max_new_tokens=2) for question in asked[:3]]
    answers = engine.answer_batch([*requests, Request.make(asked[3], PASSAGES, policy="first", max_new_tokens=2)])
    assert calls == [asked[:2]]
    for answer, single in zip(answers[:3], singles, strict=False):
        assert [chunk["score"] for chunk in answer.trace] == pytest.approx([chunk["score"] for chunk in single.trace], abs=1e-5)


def test_threads_do_not_disturb_each_other(tiny_model) -> None:
    engine = Refrag(tiny_model)
    questions = [f"Who founded house number {number}?" for number in range(16)]

    def ask(question: str) -> str:
        return engine.answer(question, [*PASSAGES, question], temperature=1.0, **SHORT).text

    expected = [ask(question) for question in questions]
    fresh = Refrag(tiny_model)
    engine = fresh
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, questions)) == expected


# ── passages and vectors ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_index_gives_passages_and_vectors(tiny_model, index: PassageIndex, monkeypatch) -> None:
    engine = Refrag(tiny_model, index=index)
    encoded = Encoded(tiny_model, monkeypatch)
    answer = engine.answer(QUESTION, top_k=2, policy="none", **SHORT)
    assert encoded.texts == []
    assert len(answer.passages) == 2
    assert answer.passages[0]["id"] == "velmoor"
    assert answer.passages[0]["score"] > answer.passages[1]["score"]
    given = engine.answer(QUESTION, [PASSAGES[0]], policy="none", **SHORT)
    assert encoded.texts == []  # the same id and the same text
    again = Refrag(tiny_model, index=str(index.path)).answer(QUESTION, top_k=1, policy="none", **SHORT)
    assert again.usage == given.usage
    only = engine.answer(QUESTION, where="id = 'lamp'", **SHORT)
    assert [passage["id"] for passage in only.passages] == ["lamp"]
    assert engine.answer("lighthouse lamp", mode="text", top_k=1, **SHORT).passages[0]["id"] == "lamp"


def test_a_given_passage_never_borrows_stored_vectors(tiny_model, index: PassageIndex) -> None:
    engine = Refrag(tiny_model, index=index)
    other = Passage("velmoor", "An entirely different text of the same id.", "Velmoor")
    options = {"policy": "none", "temperature": 0.0, **SHORT}
    assert engine.answer(QUESTION, [other], **options).text == Refrag(tiny_model).answer(QUESTION, [other], **options).text


def test_a_retriever_finds_and_the_index_gives_the_vectors(tiny_model, index: PassageIndex, monkeypatch) -> None:
    stored = Passage.from_any(PASSAGES[0], 1)
    new = Passage("lamp", "The lamp is out.")
    engine = Refrag(tiny_model, index=index, retriever=lambda question: [stored, new])
    encoded = Encoded(tiny_model, monkeypatch)
    answer = engine.answer(QUESTION, policy="none", **SHORT)
    assert [passage["id"] for passage in answer.passages] == ["velmoor", "lamp"]
    assert "".join(encoded.texts) == new.text  # its id is in the index, its text is another


def test_passages_are_encoded_once(tiny_model, monkeypatch) -> None:
    engine = Refrag(tiny_model)
    encoded = Encoded(tiny_model, monkeypatch)
    first = engine.answer(QUESTION, PASSAGES, policy="none", **SHORT)
    count = len(encoded.texts)
    assert count == first.usage["num_chunks"]
    again = engine.answer("Another question?", [{"id": "other", "text": PASSAGES[0]["text"]}, PASSAGES[1]], policy="none", **SHORT)
    assert len(encoded.texts) == count  # cached by content
    assert again.usage["num_chunks"] > 0
    engine.answer_batch([Request(QUESTION, ["the same"]), Request("Why?", ["the same", "the same"])])
    assert encoded.texts.count(encoded.texts[count]) == 1


def test_plain_rag_needs_no_encoder(tiny_model, monkeypatch) -> None:
    encoded = Encoded(tiny_model, monkeypatch)
    Refrag(tiny_model).answer(QUESTION, PASSAGES, policy="all", **SHORT)
    assert encoded.texts == []


def test_the_cache_forgets_what_was_used_longest_ago() -> None:
    cache = VectorCache(5)
    for key in (b"a", b"b"):
        cache.put(key, torch.zeros(2, 3))
    assert cache.get(b"a") is not None
    cache.put(b"c", torch.zeros(2, 3))
    assert cache.get(b"b") is None and cache.get(b"a") is not None
    cache.put(b"c", torch.zeros(1, 3))
    assert cache.num_chunks == 3
    cache.put(b"d", torch.zeros(9, 3))
    assert cache.num_chunks == 0


def test_any_callable_retrieves_and_reranks(tiny_model) -> None:
    asked: list[str] = []

    def retriever(question: str) -> list:
        asked.append(question)
        return [f"Passage number {number}." for number in range(40)]

    plain = Refrag(tiny_model, retriever=retriever).answer(QUESTION, top_k=3, **SHORT)
    assert asked == [QUESTION]
    assert plain.trace[0]["text"].startswith("Pass")
    assert len(plain.passages) == 3

    def reranker(question: str, passages) -> list[float]:
        return [float(passage.text.split()[-1].strip(".")) for passage in passages]

    best = Refrag(tiny_model, retriever=retriever, reranker=reranker).answer(QUESTION, top_k=3, **SHORT)
    assert [passage["id"] for passage in best.passages] == ["12", "11", "10"]  # of four times as many candidates
    assert [passage["score"] for passage in best.passages] == [11, 10, 9]


def test_a_cross_encoder_by_name(tiny_model, encoder_tokenizer, tmp_path) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    encoder_tokenizer.save_pretrained(tmp_path)
    engine = Refrag(tiny_model, retriever=lambda _: PASSAGES, reranker=str(tmp_path))
    scores = [passage["score"] for passage in engine.answer(QUESTION, top_k=4, **SHORT).passages]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    with pytest.raises(NotFoundError, match=r"There is no reranker './nowhere'"):
        Refrag(tiny_model, reranker="./nowhere")


def test_citations() -> None:
    passages = [Passage(name, "") for name in ("a", "b", "c")]
    assert find_citations("It was [2], not [1, 3] or [2][9] or [0] or [x] or 1742.", passages) == ("b", "a", "c")


def test_what_people_see(engine: Refrag) -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    answer = engine.answer(QUESTION, PASSAGES, policy="first", expand_chunks=1, **SHORT)
    console.print(render_trace(answer))
    console.print(render_summary(answer))
    shown = console.export_text()
    assert f"⟦{answer.trace[0]['text']}⟧{PASSAGES[0]['text'][answer.trace[0]['end'] :]}" in shown
    assert f"1 of {answer.usage['num_chunks']}" in shown
    assert f"{answer.usage['prompt_slots']} of {answer.full_slots}" in shown


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": ""}, "The question must hold some text, was empty: write it between quotes."),
        ({"top_k": -1}, "top_k must be 1 or more, was -1."),
        ({"top_k": 0}, "top_k must be 1 or more, was 0: to answer without passages give an empty list of them."),
        ({"policy": "similar"}, "There is no policy 'similar' (did you mean 'similarity'?): choose one of"),
        ({"polcy": "none"}, "There is no option 'polcy' (did you mean 'policy'?): the options are top_k, policy,"),
        ({"budget": Budget(expand_chunks=1), "max_slots": 3}, "Give either budget or max_slots, not both."),
        ({"expand_fraction": 1.5}, "expand_fraction must lie between 0 and 1, was 1.5: try 0.1."),
        ({"max_slots": 5}, "more than max_slots 5: raise --max-slots to"),
        ({"policy": "all", "expand_chunks": 1}, "The policy 'all' expands all"),
        ({"policy": "learned"}, "This model has no trained policy: choose --policy similarity, or train one."),
        ({"question": "why " * 60}, "more than the encoder's window of 60: shorten it"),
        ({"max_new_tokens": 500}, "more than the decoder's 512 positions: pass fewer passages or lower --max-new-tokens."),
        ({"passages": [], "max_new_tokens": 510}, "512 positions: shorten the question and the system text or lower --max-new-tokens."),
        ({"policy": "all", "max_new_tokens": 400}, "512 positions: choose --policy similarity and set --max-slots 112, pass fewer"),
        ({"expand_fraction": 1.0, "max_new_tokens": 400}, "512 positions: set --max-slots 112, pass fewer passages, or lower"),
        ({"question": "a\udc80b"}, "The question must be valid Unicode, but it has half a character or a broken byte after 'a': check"),
        ({"passages": "one text"}, "passages must be a list of passages, was a str: put it between brackets, [] for none."),
        ({"passages": {"text": "one"}}, "passages must be a list of passages, was a dict"),
        ({"passages": Passage("a", "one")}, "passages must be a list of passages, was a Passage"),
        ({"history": [{"role": "user", "said": "a"}]}, 'a mapping with "role" and "text" (or "content"), was the keys role, said'),
        ({"expand_chunks": 2.5}, "expand_chunks must be a whole number, was 2.5."),
        ({"stop": ""}, "A stop string must hold at least one character"),
        ({"passages": None}, "There is nothing to retrieve from: pass passages=[…], or build the engine with index=… or retriever=…."),
        ({"passages": [{"text": "a", "metadata": [1]}]}, "The metadata of passage 1 must be a mapping, was a list"),
        ({"passages": ["word " * 3000], "max_new_tokens": 2}, "512 positions: pass a shorter passage or lower --max-new-tokens."),
        ({"passages": [{"txt": "a"}]}, "Passage 1 must be a text or a mapping"),
    ],
)
def test_one_sentence_says_what_to_do(unchecked, engine: Refrag, options: dict, message: str) -> None:
    options = {"question": QUESTION, "passages": PASSAGES} | options
    with pytest.raises(InputError) as caught:
        engine.answer(options.pop("question"), options.pop("passages"), **options)
    assert message in str(caught.value)


def test_engines_that_cannot_be(make_model, tiny_model, index: PassageIndex) -> None:
    for returned, kind in ((None, "None"), ("text", "a str")):
        with pytest.raises(InputError, match=f"What a retriever returns must be a list of passages, was {kind}"):
            Refrag(tiny_model, retriever=lambda _, returned=returned: returned).answer(QUESTION)
    with pytest.raises(MismatchError, match="chunk size: index 4, given 8"):
        Refrag(make_model(chunk_size=8), index=index)
    with pytest.raises(MismatchError, match="chunk size: index 4, given 8"):
        Refrag(make_model(chunk_size=8), index=index.path)
    without = make_model()
    without.tokenizer = None
    with pytest.raises(InputError, match="The model has no decoder tokenizer"):
        Refrag(without)
    with pytest.raises(InputError, match="one number per passage"):
        Refrag(tiny_model, retriever=lambda _: PASSAGES, reranker=lambda *_: [1.0]).answer(QUESTION)
    with pytest.raises(InputError, match="The filter `where` belongs to an index"):
        Refrag(tiny_model, retriever=lambda _: PASSAGES).answer(QUESTION, where="id = 'a'")


def test_a_long_prompt_is_refused_before_anything_is_encoded(tiny_model, index: PassageIndex, monkeypatch) -> None:
    encoded = Encoded(tiny_model, monkeypatch)
    with pytest.raises(InputError, match=r"more than the decoder's 512 positions: pass fewer passages or lower"):
        Refrag(tiny_model).answer(QUESTION, ["A long way to the old mill. " * 40] * 40)
    with pytest.raises(InputError, match=r"more than max_slots 5: raise --max-slots to \d+, or lower --top-k\."):
        Refrag(tiny_model, index=index).answer(QUESTION, max_slots=5)
    assert encoded.texts == []


def test_nothing_found_is_said(tiny_model, index: PassageIndex, caplog) -> None:
    with caplog.at_level("WARNING", logger="refrag"):
        answer = Refrag(tiny_model, index=index).answer("Zzyzx?", mode="text", **SHORT)
    assert answer.passages == [] and "No passage was found: the answer rests on none." in caplog.text


def test_history_may_be_mappings(unchecked, engine: Refrag) -> None:
    turns = [{"role": "user", "text": "Where?", "passages": ["The town lies north."]}, {"role": "assistant", "text": "North"}]
    request = Request(QUESTION, [], history=turns)
    assert request.history == (Turn("user", "Where?", ("The town lies north.",)), Turn("assistant", "North"))
    assert engine.answer(request).usage["num_chunks"] > 0
    with pytest.raises(InputError, match="The question must be a text, was None"):
        Request(None)


def test_infinite_scores_are_null_in_json(engine: Refrag) -> None:
    def second_first(inputs):
        return torch.tensor([-torch.inf, torch.inf] + [0.5] * (inputs.num_chunks - 2))

    trace = engine.answer(QUESTION, PASSAGES, policy=second_first, expand_chunks=1, **SHORT).to_dict()["trace"]
    assert [entry["score"] for entry in trace[:3]] == [None, None, 0.5]
    assert trace[1]["expanded"]
    json.dumps(trace, allow_nan=False)


def test_the_decoders_own_generation_settings_do_not_leak(make_model) -> None:
    model = make_model()
    expected = Refrag(model).answer(QUESTION, PASSAGES, **SHORT).text
    own = model.decoder.generation_config
    own.update(min_new_tokens=12, suppress_tokens=list(range(3, 200)), no_repeat_ngram_size=1, num_beams=2)
    answer = Refrag(model).answer(QUESTION, PASSAGES, **SHORT)
    assert answer.text == expected
    assert model.decoder.generation_config is own and own.min_new_tokens == 12


def test_a_request_is_complete(engine: Refrag) -> None:
    request = Request.make(QUESTION, PASSAGES, **SHORT)
    assert request.generation == GenerationSettings(max_new_tokens=8)
    assert engine.answer(request).text == engine.answer(QUESTION, PASSAGES, **SHORT).text
    with pytest.raises(InputError, match=r"dataclasses\.replace"):
        engine.answer(request, seed=3)
