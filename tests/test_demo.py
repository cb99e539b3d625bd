"""The lessons of the bundled model, and the demo that it gives."""

import json
from importlib.resources import files

import pytest
import torch

from refrag.demo.almanac import make_case
from refrag.demo.guidance import CITE_LAYER, READ_LAYER, Guide
from refrag.demo.lessons import (
    CONTEXT_WEIGHT,
    IGNORED,
    STRETCH,
    Lessons,
    MixedSteps,
    PolicySteps,
    ReadingSteps,
    ReconstructionSteps,
    answer_weights,
    cited,
    evidence_chunks,
    pointer_slots,
    titles_of,
)
from refrag.demo.tokenizer import train_tokenizers
from refrag.demo.train import decoder_config, encoder_config, slot_ids

has_weights = pytest.mark.skipif(not (files("refrag") / "demo" / "weights" / "config.json").is_file(), reason="no bundled weights in this installation")


@pytest.fixture(scope="module")
def parts():
    return train_tokenizers(60)


@pytest.fixture(scope="module")
def model(parts):
    from transformers import LlamaForCausalLM, RobertaModel

    from refrag.model import RefragModel

    tokenizer, encoder_tokenizer = parts
    torch.manual_seed(0)
    decoder = LlamaForCausalLM(decoder_config(tokenizer))
    encoder = RobertaModel(encoder_config(encoder_tokenizer), add_pooling_layer=False)
    settings = {"chunk_size": 8, "pooling": "mean", "projector_width": 256, "policy": {"kind": "transformer", "hidden_width": 64, "question_aware": True}}
    return RefragModel.from_parts(encoder, decoder, encoder_tokenizer=encoder_tokenizer, decoder_tokenizer=tokenizer, **settings).eval()


def test_the_tokenizer_keeps_numbers_in_brackets_and_any_text(parts):
    tokenizer, encoder_tokenizer = parts
    assert [len(tokenizer(f"[{n}]", add_special_tokens=False)["input_ids"]) for n in range(1, 9)] == [1] * 8
    for text in ("The Bardora sailed in 1723.", "Größe 東京 😀\n\n  [x] 1,234"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert encoder_tokenizer("a")["input_ids"][0] == encoder_tokenizer.bos_token_id and encoder_tokenizer("a")["input_ids"][-1] == encoder_tokenizer.eos_token_id


def answers_in(ids, answers, tokenizer):
    numbers = range(1, int(answers.max()) + 1)
    return [tokenizer.decode(ids[answers == number]) for number in numbers]


def test_a_reading_batch_asks_every_question_and_weighs_the_answers(parts):
    tokenizer, _ = parts
    batch = ReadingSteps(Lessons(tokenizer, 8), num_steps=10)[3]
    ids, answers, weights = batch["input_ids"][0], batch["answers"][0], batch["loss_weights"][0]
    assert (weights[answers > 0] >= 1).all() and (weights[answers == 0] <= CONTEXT_WEIGHT).all()
    assert all(text.endswith("</s>") for text in answers_in(ids, answers, tokenizer))
    assert (batch["segments"][0][answers > 0] == answers[answers > 0]).all()
    same = ReadingSteps(Lessons(tokenizer, 8), num_steps=10)[3]
    assert all(torch.equal(batch[key], same[key]) for key in ("input_ids", "labels", "answers", "segments"))


def test_a_mixed_batch_has_labels_on_the_answers_alone(model):
    data = MixedSteps(model, num_steps=10)
    case = make_case(1, num_passages=2)
    lesson = data.lessons[0].lesson(case)
    for share in (False, True):
        batch = data.batch([lesson], [[share] * len(lesson.prompt.chunks)])
        labels, answers = batch["labels"][0], batch["answers"][0]
        assert ((labels != IGNORED) == (answers > 0)).all()
        assert answers_in(labels, answers, model.tokenizer) == [cited(question) + "</s>" for question in case.questions]
        assert torch.equal(slot_ids(batch)[0][answers > 0], labels[answers > 0])
        assert batch["loss_weights"][0][answers > 0].tolist() == [weight for weight in answer_weights(lesson) if weight]
        assert ("encoder_input_ids" in batch) is not share
        assert torch.isfinite(model(**{key: batch[key] for key in batch if key in ("layout", "encoder_input_ids", "encoder_attention_mask")}).logits).all()


def test_reconstruction_asks_for_every_token_of_every_chunk(model):
    data = ReconstructionSteps(model, num_steps=8, batch_chunks=16)
    for step in range(8):
        batch = data[step]
        layout, labels = batch["layout"], batch["labels"]
        per_row = (labels != IGNORED).sum(1)
        assert (per_row == torch.tensor(layout.context_tokens)).all() and per_row.min() > 0


def test_the_answers_chunk_holds_the_answer(model):
    case = make_case(2)
    prompt = Lessons(model.tokenizer, 8).lesson(case).prompt
    texts = prompt.chunk_texts()
    for question in case.questions:
        held = "".join(text for text, marked in zip(texts, evidence_chunks(prompt, [question]), strict=True) if marked)
        assert question.answer in held


def test_two_hops_are_answered_one_after_the_other():
    case = make_case(5, kind="two-hop", chains=True)
    chains = [question for question in case.questions if question.kind == "two-hop"]
    assert len(chains) == 4
    for question in chains:
        first, second = (number + 1 for number in question.gold)
        assert cited(question) == f"[{first}] {question.bridge} [{second}] {question.answer}"
        assert case.passages[question.gold[1]].title == question.bridge
        assert [case.passages[passage].text[start:end] for passage, start, end in question.hops] == [question.bridge, question.answer]


def test_what_is_absent_is_unknown():
    case = make_case(6, kind="unanswerable", absent=3)
    absent = [question for question in case.questions if question.kind == "unanswerable"]
    titles = [passage.title for passage in case.passages]
    assert len({question.text for question in absent}) >= 6 and all(cited(question) == " unknown" for question in absent)
    stated = {(titles[question.gold[0]], question.relation) for question in case.questions if question.kind == "one-hop"}
    assert not any(title in question.text and (title, question.relation) in stated for question in absent for title in titles)


def test_policy_rows_mark_the_evidence(model):
    batch = PolicySteps(model, num_steps=4)[0]
    assert batch["gold"].any(1).all() and batch["gold"].shape == batch["chunk_mask"].shape == batch["chunk_embeds"].shape[:2]


def test_a_model_of_two_chunk_sizes_is_trained_with_both(model, monkeypatch):
    monkeypatch.setattr(model.config, "chunk_sizes", [8, 16])
    assert {lessons.chunk_size for lessons in MixedSteps(model, num_steps=10).lessons} == {8, 16}
    data = MixedSteps(model, num_steps=40, batch_passages=4, phases=STRETCH)
    longest = {int(batch["encoder_attention_mask"].sum(1).max()) for step in range(12) if "encoder_attention_mask" in (batch := data[step])}
    assert min(longest) < 16 < max(longest)


def test_passages_above_eight_are_not_guided():
    case = make_case(7, num_passages=16)
    titles = titles_of(case)
    assert len(titles) == 9 and titles[0] == 0 and all(titles[1:])


def test_guidance_points_at_the_header_of_the_passage_cited(parts, model):
    tokenizer, _ = parts
    lessons = Lessons(tokenizer, 8)
    case = make_case(3, num_passages=3, rivals=True, length="brief")
    lesson = lessons.lesson(case)
    ids = torch.tensor([lesson.prompt.token_ids() + lesson.completion])
    start = ids.shape[1] - len(lesson.completion)
    labels = torch.full_like(ids, IGNORED)
    labels[0, start:] = torch.tensor([token if n else IGNORED for token, n in zip(lesson.completion, lesson.answers, strict=True)])
    guide = Guide(tokenizer, model.decoder)
    guide.set(ids, labels, torch.tensor([lesson.segments]), torch.zeros(0, 3, dtype=torch.long), torch.tensor([lesson.titles]))
    _, slots, targets = guide.plan[CITE_LAYER]
    assert len(slots) == len(case.questions)
    for target, question in zip(targets, case.questions, strict=True):
        number = question.gold[0]
        assert tokenizer.decode(ids[0][target]) == f"[{number + 1}] {case.passages[number].title}\n"


@pytest.mark.parametrize("kind", ["one-hop", "two-hop", "unanswerable"])
@pytest.mark.parametrize("expanded", [True, False])
def test_guidance_points_at_what_each_token_of_an_answer_is_copied_from(parts, model, kind, expanded):
    tokenizer, _ = parts
    data = MixedSteps(model, num_steps=10)
    case = make_case(4, num_passages=2, kind=kind)
    lesson = data.lessons[0].lesson(case)
    mask = [expanded] * len(lesson.prompt.chunks)
    batch = data.batch([lesson], [mask])
    guide = Guide(tokenizer, model.decoder)
    guide.set(slot_ids(batch), batch["labels"], batch["segments"], torch.tensor(pointer_slots(lesson, mask, row=0)), torch.tensor([lesson.titles]))
    rows, slots, targets = guide.plan[READ_LAYER]
    texts, table = lesson.prompt.chunk_texts(), len(batch["layout"].token_ids)
    assert (targets.sum(1) == 1).all() and len(rows) >= sum(question.kind != "unanswerable" for question in case.questions)
    copied = words = 0
    for slot, target in zip(slots, targets, strict=True):
        token = tokenizer.decode(batch["labels"][0][slot + 1])
        source = int(batch["layout"].source[0][target][0])
        held = tokenizer.decode(batch["layout"].token_ids[source]) if expanded else texts[source - table]
        if token.startswith("["):
            assert case.passages[int(token[1]) - 1].title in tokenizer.decode(batch["layout"].token_ids)
            continue
        copied += token.strip() == held.strip() if expanded else token.strip() in held
        words += 1
    assert copied >= 0.9 * words > 0  # a name at the start of a sentence may be cut into other tokens


@has_weights
def test_the_demo_prints_one_row_a_system(capsys):
    from refrag.demo.run import run_demo

    report = run_demo(num_questions=5, as_json=True, device="cpu")
    assert json.loads(capsys.readouterr().out) == report
    systems = report["systems"]
    assert {"no passages", "all expanded (plain RAG)", "none expanded", "similarity"} <= systems.keys()
    assert systems["none expanded"]["compression_rate"] > 4 > 1 == systems["all expanded (plain RAG)"]["compression_rate"]
    assert systems["none expanded"]["kv_bytes"] < systems["similarity"]["kv_bytes"] < systems["all expanded (plain RAG)"]["kv_bytes"]
