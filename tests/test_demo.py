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
    Lessons,
    MixedSteps,
    PolicySteps,
    ReadingSteps,
    ReconstructionSteps,
    answer_chunks,
    cited,
    held_by,
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
    assert (weights[answers > 0] == 1).all() and ((weights == 0) | (weights == CONTEXT_WEIGHT) | (weights == 1)).all()
    assert all(text.endswith("</s>") for text in answers_in(ids, answers, tokenizer))
    assert (batch["segments"][0][answers > 0] == answers[answers > 0]).all()
    same = ReadingSteps(Lessons(tokenizer, 8), num_steps=10)[3]
    assert all(torch.equal(batch[key], same[key]) for key in ("input_ids", "labels", "answers", "segments"))


def test_a_mixed_batch_has_labels_on_the_answers_alone(model):
    data = MixedSteps(model, num_steps=10)
    case = make_case(1, num_passages=2)
    lesson = data.lessons.lesson(case)
    for share in (False, True):
        batch = data.batch([lesson], [[share] * len(lesson.prompt.chunks)])
        labels, answers = batch["labels"][0], batch["answers"][0]
        assert ((labels != IGNORED) == (answers > 0)).all()
        assert answers_in(labels, answers, model.tokenizer) == [cited(question) + "</s>" for question in case.questions]
        assert torch.equal(slot_ids(batch)[0][answers > 0], labels[answers > 0])
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
        held = "".join(text for text, marked in zip(texts, answer_chunks(prompt, [question]), strict=True) if marked)
        assert question.answer in held


def test_policy_rows_mark_the_evidence(model):
    batch = PolicySteps(model, num_steps=4)[0]
    assert batch["gold"].any(1).all() and batch["gold"].shape == batch["chunk_mask"].shape == batch["chunk_embeds"].shape[:2]


def test_guidance_points_at_the_header_of_the_passage_cited(parts, model):
    tokenizer, _ = parts
    lessons = Lessons(tokenizer, 8)
    case = make_case(3, num_passages=3, rivals=True, brief=True)
    lesson = lessons.lesson(case)
    ids = torch.tensor([lesson.prompt.token_ids() + lesson.completion])
    start = ids.shape[1] - len(lesson.completion)
    labels = torch.full_like(ids, IGNORED)
    labels[0, start:] = torch.tensor([token if n else IGNORED for token, n in zip(lesson.completion, lesson.answers, strict=True)])
    guide = Guide(tokenizer, model.decoder)
    guide.set(ids, labels, torch.tensor([lesson.segments]))
    _, slots, targets = guide.plan[CITE_LAYER]
    assert len(slots) == len(case.questions)
    for target, question in zip(targets, case.questions, strict=True):
        number = question.gold[0]
        assert tokenizer.decode(ids[0][target]) == f"[{number + 1}] {case.passages[number].title}\n"


def test_guidance_points_at_the_vectors_that_hold_the_answer(parts, model):
    tokenizer, _ = parts
    data = MixedSteps(model, num_steps=10)
    case = make_case(4, num_passages=2)
    lesson = data.lessons.lesson(case)
    batch = data.batch([lesson], [[False] * len(lesson.prompt.chunks)])
    held = held_by(batch["layout"], [lesson], [case])
    guide = Guide(tokenizer, model.decoder)
    guide.set(slot_ids(batch), batch["labels"], batch["segments"], held)
    rows, slots, targets = guide.plan[READ_LAYER]
    texts, table = lesson.prompt.chunk_texts(), len(batch["layout"].token_ids)
    answers = {question.answer for question in case.questions}
    for slot, target in zip(slots, targets, strict=True):
        chunks = batch["layout"].source[0][target] - table
        assert any(answer in "".join(texts[chunk] for chunk in chunks) for answer in answers)
        assert tokenizer.decode(slot_ids(batch)[0][slot]).startswith("[")
    assert len(rows) == len(case.questions)


@has_weights
def test_the_demo_prints_one_row_a_system(capsys):
    from refrag.demo.run import run_demo

    report = run_demo(num_questions=5, as_json=True, device="cpu")
    assert json.loads(capsys.readouterr().out) == report
    systems = report["systems"]
    assert {"no passages", "all expanded (plain RAG)", "none expanded", "similarity"} <= systems.keys()
    assert systems["none expanded"]["compression_rate"] > 4 > 1 == systems["all expanded (plain RAG)"]["compression_rate"]
    assert systems["none expanded"]["kv_bytes"] < systems["similarity"]["kv_bytes"] < systems["all expanded (plain RAG)"]["kv_bytes"]
