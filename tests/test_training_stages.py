"""The stages over documents and questions: what a micro-batch holds, whole runs in a folder, exact resume, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from refrag.errors import InputError, MismatchError
from refrag.layout import IGNORED
from refrag.model import RefragModel
from refrag.text import Passage, PromptBuilder
from refrag.training import cpt, reconstruction, sft
from refrag.training.batches import ChunkedDocuments, DocumentBatches, DocumentStream, Windows
from refrag.training.cpt import ContinualPretraining
from refrag.training.data import Document, Question
from refrag.training.reconstruction import Reconstruction
from refrag.training.settings import CptSettings, ReconstructionSettings, SftSettings
from refrag.training.sft import QuestionBatches, answer_chunks, choose_passages, renumbered

WORDS = ("harbour", "lamp", "mill", "town", "coast", "ship", "stone", "river", "field", "north", "old", "burned", "lies", "founded", "people")


def text(seed: int, words: int = 60) -> str:
    """Invented prose."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[int(torch.randint(len(WORDS), (1,), generator=generator))] for _ in range(words)) + f" number {seed}."


def documents(count: int = 12, words: int = 60) -> list[Document]:
    return [Document(f"d{seed}", text(seed, words)) for seed in range(count)]


@pytest.fixture(scope="module")
def builder(tokenizer):
    return PromptBuilder(tokenizer, chunk_size=4)


@pytest.fixture
def folder(tmp_path, make_model):
    """A saved tiny model and a file of documents."""
    make_model().save_pretrained(tmp_path / "model")
    lines = [json.dumps({"id": one.id, "text": one.text}) for one in documents(24)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def settings_of(kind, folder, **changes):
    shared = {"data": (str(folder / "docs.jsonl"),), "model": str(folder / "model"), "output_dir": folder / "out", "num_steps": 4, "batch_size": 2, "precision": "fp32",
              "device": "cpu", "save_every": 2, "log_every": 1, "learning_rate": 1e-3, "eval_fraction": 0.2}  # fmt: skip
    longest = {} if kind is SftSettings else {"max_chunks": 4}
    return kind(**(shared | longest | changes))


# ── windows ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_chunks_of_documents_stand_in_one_row(builder):
    chunked = ChunkedDocuments([Document("a", "one two three four five six"), Document("b", ""), Document("c", "seven eight")], builder)
    counts = chunked.num_chunks.tolist()
    assert counts[1] == 0 and chunked.total == sum(counts)
    assert [ref.document for ref in chunked.refs(0, chunked.total)] == [0] * counts[0] + [2] * counts[2]
    prompt = chunked.prompt(chunked.refs(0, chunked.total))
    assert "".join(prompt.chunk_texts()) == "one two three four five sixseven eight"
    assert prompt.token_ids() == [1, *builder.encode("one two three four five six"), *builder.encode("seven eight")]
    assert [passage.id for passage in prompt.passages] == ["a", "c"]


def test_short_documents_are_packed_or_dropped_and_counted(builder):
    chunked = ChunkedDocuments([Document("a", text(1, 40)), Document("b", "short"), Document("c", text(2, 40))], builder)
    size = int(chunked.num_chunks[0]) - 1
    starts, counts = chunked.windows(size, pack=False)
    assert [chunked.refs(int(start), 1)[0].document for start in starts] == [0, 2]
    assert counts["dropped_documents"] == 1 and counts["dropped_chunks"] == chunked.total - 2 * size and counts["windows"] == 2
    starts, counts = chunked.windows(size, pack=True)
    assert counts["packed_documents"] == 1 and counts["dropped_documents"] == 0 and len(starts) == chunked.total // size


def test_texts_that_are_all_too_short_are_refused_with_both_lengths(builder):
    chunked = ChunkedDocuments([Document("a", "one two three")], builder)
    longest = int(chunked.num_chunks[0])
    with pytest.raises(InputError, match=rf"takes 99 chunks of 4 tokens \(396 tokens\); the longest text have {longest} chunks: lower --max-chunks"):
        chunked.windows(99, pack=False)


def test_every_pass_takes_every_window_once_in_another_order(builder):
    windows = Windows(ChunkedDocuments(documents(), builder), 4, pack=True, seed=3)
    passes = [[tuple(windows.refs(row, 4)) for row in range(start, start + len(windows))] for start in (0, len(windows))]
    assert len(set(passes[0])) == len(windows) and set(passes[0]) == set(passes[1]) and passes[0] != passes[1]
    assert Windows(ChunkedDocuments(documents(), builder), 4, pack=True, seed=3).refs(5, 2) == windows.refs(5, 2)


# ── what a micro-batch holds ─────────────────────────────────────────────────────────────────────────────────────────


def document_items(stage, settings, model, *, num_items=8, **changes):
    builder = PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size)
    made = stage(model, replace(settings, **changes), num_items=num_items)
    windows = Windows(ChunkedDocuments(documents(), builder), made.num_chunks, pack=True, seed=settings.seed)
    return DocumentBatches(made, windows, num_items=num_items, batch_size=2)


def test_reconstruction_feeds_vectors_and_asks_for_all_their_tokens(tiny_model):
    batch = document_items(Reconstruction, ReconstructionSettings(max_chunks=4, curriculum="none"), tiny_model)[0]
    layout, labels = batch["layout"], batch["labels"]
    for row, tokens in enumerate(layout.context_tokens):
        assert layout.context_slots[row] == 4 and int((labels[row] != IGNORED).sum()) == tokens
        assert (layout.source[row, 1:5] >= len(layout.token_ids)).all()  # after BOS the four vectors, then the tokens
        asked = labels[row][labels[row] != IGNORED]
        assert tiny_model.tokenizer.decode(asked).strip()
    assert batch["name"] == ["stage-1", "L=4"] and len(batch["rows"]) >= 2


def test_cpt_asks_for_what_follows_the_context(tiny_model):
    settings = CptSettings(max_chunks=3, curriculum="none", mixed_share=0.0, output_tokens=5)
    batch = document_items(ContinualPretraining, settings, tiny_model)[0]
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [5, 5] and batch["layout"].context_slots == (3, 3)
    builder = PromptBuilder(tiny_model.tokenizer, chunk_size=4)
    ids = {one.id: builder.encode(one.text) for one in documents()}
    asked = batch["labels"][0][batch["labels"][0] != IGNORED].tolist()
    joined = [token for one in documents() for token in [*ids[one.id], tiny_model.tokenizer.eos_token_id]]
    assert any(joined[at : at + 5] == asked for at in range(len(joined)))


@pytest.mark.parametrize(("changes", "expected"), [({"expand_fractions": (0.25, 0.5)}, ["p=0.25", "p=0.5"]), ({"expand_range": (0.0, 1.0)}, ["p=0..1"])])
def test_the_mixed_part_leaves_a_share_of_the_chunks_as_tokens(tiny_model, changes, expected):
    settings = CptSettings(max_chunks=4, curriculum="prototype", mixed_share=0.5, **changes)
    items = document_items(ContinualPretraining, settings, tiny_model, num_items=8)
    names = [items[item]["name"] for item in range(8)]
    assert all(name[0].startswith("stage-") for name in names[:4]) and [name for (name,) in dict.fromkeys(map(tuple, names[4:]))] == expected
    if "expand_fractions" in changes:
        for item, expanded in ((4, 1), (7, 2)):
            layout = items[item]["layout"]
            for tokens, slots in zip(layout.context_tokens, layout.context_slots, strict=True):
                assert tokens - slots <= 3 * (4 - expanded) and slots >= 4 - expanded + expanded  # exactly `expanded` of four chunks are tokens
                assert (layout.source >= len(layout.token_ids)).sum(1).tolist() == [4 - expanded] * 2


def test_items_are_a_pure_function_of_seed_and_number(tiny_model):
    settings = CptSettings(max_chunks=4)
    first, second = (document_items(ContinualPretraining, settings, tiny_model) for _ in range(2))
    other = document_items(ContinualPretraining, settings, tiny_model, seed=1)
    assert all(torch.equal(first[item]["layout"].token_ids, second[item]["layout"].token_ids) for item in (5, 0, 7))
    assert any(not torch.equal(first[item]["layout"].token_ids, other[item]["layout"].token_ids) for item in range(8))


@pytest.mark.parametrize("pack", [True, False])
def test_a_stream_gives_the_same_again_and_uses_documents_in_order(tiny_model, pack):
    settings = ReconstructionSettings(max_chunks=4, curriculum="none")
    builder = PromptBuilder(tiny_model.tokenizer, chunk_size=4)

    def stream():
        return DocumentStream(Reconstruction(tiny_model, settings, num_items=5), iter(documents()), builder, num_items=5, batch_size=2, pack=pack)

    first, second = list(stream()), list(stream())
    assert len(first) == 5 and all(torch.equal(a["labels"], b["labels"]) for a, b in zip(first, second, strict=True))
    seen = [row for batch in first for row in batch["rows"]]
    assert seen == sorted(seen, key=lambda row: int(row[1:]))
    with pytest.raises(InputError, match="The stream ended after"):
        list(DocumentStream(Reconstruction(tiny_model, settings, num_items=999), documents(2), builder, num_items=999, batch_size=2, pack=pack))


# ── questions ────────────────────────────────────────────────────────────────────────────────────────────────────────

PASSAGES = tuple(Passage(f"p{n}", f"Town {n} lies on the coast. Its lamp burned in {1700 + n}.", f"Town {n}") for n in range(6))


def question(number: int = 2) -> Question:
    gold = tuple(n == number for n in range(6))
    return Question(f"q{number}", f"When burned the lamp of town {number}?", (str(1700 + number),), PASSAGES, gold, (), None)


def test_gold_passages_stay_and_all_are_shuffled():
    import random

    places = set()
    for seed in range(30):
        passages, gold = choose_passages(question(), num_passages=3, rng=random.Random(seed))
        assert len(passages) == 3 and sum(gold) == 1 and passages[gold.index(True)].id == "p2"
        places.add(gold.index(True))
    assert places == {0, 1, 2}


def test_passages_may_keep_the_order_of_the_row(make_model):
    import random

    for seed in range(10):
        passages, gold = choose_passages(question(), num_passages=4, rng=random.Random(seed), keep_order=True)
        ids = [passage.id for passage in passages]
        assert ids == sorted(ids) and len(ids) == 4 and gold == [identity == "p2" for identity in ids]
    rows = QuestionBatches(make_model(), [question()], SftSettings(data=("a",), model="bundled", num_passages=6, keep_order=True), num_items=3)
    assert all([passage.id for passage in rows._row(number)[0].passages] == [f"p{place}" for place in range(6)] for number in range(3))


def test_citations_follow_the_passages_when_they_are_shuffled():
    from refrag.text import Turn

    row = question()
    shuffled = [row.passages[2], row.passages[0], row.passages[5]]
    assert renumbered("[3] 1702 [6] x [99] y", row, shuffled) == "[1] 1702 [3] x [99] y"
    later = replace(row, history=(Turn("user", "Hello?", (PASSAGES[1],)), Turn("assistant", "Yes.")))
    assert renumbered("[3] 1702", later, shuffled) == "[2] 1702"


def test_a_short_answer_is_found_as_a_word_of_its_own(builder):
    prompt = builder.build("?", [Passage("a", "The north is cold, no doubt.")])
    marked = answer_chunks(prompt, ["no"])
    assert [text for text, held in zip(prompt.chunk_texts(), marked, strict=True) if held] and not marked[0]


def test_the_answers_chunks_overlap_it_in_gold_passages_only(builder):
    prompt = builder.build("?", [Passage("a", "It was 1702 then."), Passage("b", "In 1702 it burned.")])
    marked = answer_chunks(prompt, ["1702"], [False, True])
    texts = [text for text, held in zip(prompt.chunk_texts(), marked, strict=True) if held]
    assert "1702" in "".join(texts) and all(prompt.chunks[at].passage == 1 for at, held in enumerate(marked) if held)
    assert sum(answer_chunks(prompt, ["1702"])) > sum(marked) and not any(answer_chunks(prompt, ["1999"]))


def test_sft_has_labels_on_the_answer_and_the_end_alone(tiny_model):
    settings = SftSettings(batch_size=2, num_passages=3, full_share=0.25, none_share=0.25, gold_share=0.25)
    items = QuestionBatches(tiny_model, [question(n) for n in range(6)], settings, num_items=12)
    kinds = set()
    for item in range(12):
        batch = items[item]
        kinds |= set(batch["name"])
        for row, identity in enumerate(batch["rows"]):
            asked = batch["labels"][row][batch["labels"][row] != IGNORED]
            assert tiny_model.tokenizer.decode(asked) == f" {1700 + int(identity[1:])}</s>"
    assert kinds == {"full", "none", "gold", "some"}


def test_sft_with_a_chat_template_and_history(make_model, chat_tokenizer, make_decoder, make_encoder, encoder_tokenizer):
    from refrag.text import Turn

    decoder = make_decoder("llama", vocab_size=len(chat_tokenizer))
    model = RefragModel.from_parts(make_encoder("roberta"), decoder, encoder_tokenizer=encoder_tokenizer, decoder_tokenizer=chat_tokenizer, chunk_size=4)
    turns = (Turn("user", "Hello?", (PASSAGES[0],)), Turn("assistant", "Yes."))
    row = Question("m", "When?", ("1702",), PASSAGES[1:4], (False, True, False), turns, "Be brief.")
    batch = QuestionBatches(model, [row], SftSettings(batch_size=1), num_items=1)[0]
    asked = batch["labels"][0][batch["labels"][0] != IGNORED]
    assert chat_tokenizer.decode(asked) == "1702</s>"
    shown = chat_tokenizer.decode(batch["layout"].token_ids)
    assert "[1] Town 0" in shown and "Be brief." in shown and shown.index("[1] Town 0") < shown.index("Hello?") < shown.index("[2]")


# ── whole runs ───────────────────────────────────────────────────────────────────────────────────────────────────────

RUNS = {"reconstruction": (reconstruction, ReconstructionSettings), "cpt": (cpt, CptSettings)}


@pytest.mark.parametrize("stage", RUNS)
def test_a_run_leaves_a_model_a_log_and_a_result(folder, stage):
    module, kind = RUNS[stage]
    settings = settings_of(kind, folder)
    result = module.run(settings)
    assert result["finished"] and result["steps"] == 4 and result["eval_loss"] > 0 and result["counts"]["windows"] > 0
    assert json.loads((folder / "out" / "result.json").read_text()) == json.loads(json.dumps(result))
    log = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4] and any(key.startswith("L=") for entry in log for key in entry)
    before, after = (RefragModel.from_pretrained(folder / name).state_dict() for name in ("model", "out/model"))
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == ({"encoder", "projector"} if stage == "reconstruction" else {"encoder", "projector", "decoder"})
    assert module.run(settings) == json.loads(json.dumps(result))  # finished: not repeated
    with pytest.raises(InputError, match=r"holds another run \(learning_rate was 0.001, now 0.5\): choose another --output-dir"):
        module.run(replace(settings, learning_rate=0.5))


def test_fine_tuning_learns_the_questions_it_sees(folder):
    rows = [{"id": one.id, "question": one.question, "answers": list(one.answers), "passages": [{"id": p.id, "title": p.title, "text": p.text, "is_gold": g} for p, g in zip(one.passages, one.gold, strict=True)]} for one in map(question, range(6))]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings = settings_of(SftSettings, folder, data=(str(folder / "questions.jsonl"),), num_steps=30, save_every=30, eval_fraction=0.0, learning_rate=1e-2, batch_size=4)
    result = sft.run(settings)
    log = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert result["finished"] and "eval_loss" not in result and sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_stopped_by_sigterm_at_any_step_and_started_again_equals_uninterrupted(folder, stop, monkeypatch):
    from refrag.training.trainer import RefragTrainer

    settings = settings_of(CptSettings, folder, output_dir=folder / "whole", eval_fraction=0.0, save_every=100)
    whole = cpt.run(settings)
    parts = replace(settings, output_dir=folder / "parts")
    step = RefragTrainer.training_step

    def stopped(self, *args, **kwargs):
        if self.state.global_step == stop - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RefragTrainer, "training_step", stopped)
    result = cpt.run(parts)
    assert not result["finished"] and result["steps"] == stop and not (folder / "parts" / "model").exists()
    monkeypatch.undo()
    assert cpt.run(parts)["steps"] == whole["steps"] == 4
    states = [RefragModel.from_pretrained(folder / name / "model").state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    logs = [[json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()] for name in ("whole", "parts")]
    assert [[(entry["step"], entry["loss"]) for entry in log] for log in logs[:1]] == [[(entry["step"], entry["loss"]) for entry in log] for log in logs[1:]]


def test_killed_while_it_trains_it_goes_on_from_the_last_checkpoint(folder):
    script = textwrap.dedent(f"""
        import os, signal
        from refrag.training import reconstruction
        from refrag.training.settings import ReconstructionSettings
        from refrag.training.trainer import RefragTrainer
        step = RefragTrainer.training_step
        def killed(self, *args, **kwargs):
            if self.state.global_step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, *args, **kwargs)
        RefragTrainer.training_step = killed
        reconstruction.run(ReconstructionSettings(data=({str(folder / "docs.jsonl")!r},), model={str(folder / "model")!r}, output_dir=__import__("pathlib").Path({str(folder / "out")!r}),
            num_steps=4, batch_size=2, precision="fp32", device="cpu", save_every=2, log_every=1, learning_rate=1e-3, eval_fraction=0.2, max_chunks=4))
    """)
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == -signal.SIGKILL
    settings = settings_of(ReconstructionSettings, folder)
    assert reconstruction.run(settings)["finished"]
    whole = reconstruction.run(replace(settings, output_dir=folder / "whole"))
    states = [RefragModel.from_pretrained(folder / name / "model").state_dict() for name in ("whole", "out")]
    assert whole["finished"] and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_early_stopping_ends_a_run_that_gets_no_better(folder):
    settings = settings_of(ReconstructionSettings, folder, num_steps=40, save_every=1, patience=2, learning_rate=1e-9)
    result = reconstruction.run(settings)
    assert result["finished"] and result["steps"] < 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": None, "batch_size": 5000}, "would take no optimizer step: .* rows make less than one batch of 5000"),
        ({"num_steps": None, "num_epochs": 0.5, "warmup": 500.0}, "Warm-up must not be longer than training"),
        ({"precision": "fp16"}, "fp16 needs a GPU .*: pass --precision bf16 or fp32"),
        ({"fsdp": True}, "--fsdp shards over several GPUs, this run has 1 process on cpu: start it by torchrun"),
        ({"max_chunks": 5000}, r"The decoder has 512 positions, a row would take 25,001 slots: lower --max-chunks or --output-tokens\."),
        ({"data": ()}, "nothing to train on: name files"),
        ({"save_every": 3, "eval_every": 2}, "--save-every must be a multiple of --eval-every, were 3 and 2"),
    ],
)
def test_runs_that_cannot_be_are_refused(folder, changes, message):
    with pytest.raises(InputError, match=message):
        reconstruction.run(settings_of(ReconstructionSettings, folder, **changes))


def test_a_model_of_another_chunk_size_is_refused(folder):
    with pytest.raises(MismatchError, match="made with chunk_size 4, 8 was asked for"):
        reconstruction.run(settings_of(ReconstructionSettings, folder, chunk_size=8))


def test_a_folder_with_other_files_is_refused(folder):
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files: choose another"):
        reconstruction.run(settings_of(ReconstructionSettings, folder))
    assert [path.name for path in (folder / "out").iterdir()] == ["thesis.txt"]


def test_lora_trains_little_and_loads_again(folder):
    pytest.importorskip("peft")
    settings = settings_of(CptSettings, folder, lora_rank=2, lora_encoder=True, eval_fraction=0.0)
    cpt.run(settings)
    model = RefragModel.from_pretrained(folder / "out" / "model")
    start = RefragModel.from_pretrained(folder / "model")
    assert model.config.lora["r"] == 2
    plain = {key.replace(".base_layer", ""): value for key, value in model.decoder.state_dict().items() if "lora_" not in key}
    assert all(torch.equal(value, plain[key]) for key, value in start.decoder.state_dict().items())
    assert any(not torch.equal(value, model.encoder.state_dict()[key]) for key, value in start.encoder.state_dict().items())


def test_gradient_checkpointing_changes_no_number(folder):
    losses = []
    for name, on in (("off", False), ("on", True)):
        cpt.run(settings_of(CptSettings, folder, output_dir=folder / name, gradient_checkpointing=on, eval_fraction=0.0))
        losses.append([json.loads(line)["loss"] for line in (folder / name / "log.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_context_longer_than_the_decoders_window_trains(folder, make_decoder, make_model):
    model = make_model()
    model.decoder.config.max_position_embeddings = 64
    model.save_pretrained(folder / "narrow")
    settings = settings_of(CptSettings, folder, model=str(folder / "narrow"), max_chunks=20, output_tokens=8, curriculum="none", mixed_share=0.0, eval_fraction=0.0)
    result = cpt.run(settings)
    assert result["finished"] and result["steps"] == 4  # 80 tokens of context in 20 slots


def test_a_dry_run_resolves_every_setting_and_writes_nothing(folder):
    settings = settings_of(CptSettings, folder, dry_run=True, model=None, encoder="FacebookAI/roberta-large", decoder="meta-llama/Llama-3.2-3B", warmup=0.5)
    result = cpt.run(settings)
    assert result["dry_run"] and result["settings"]["decoder"] == "meta-llama/Llama-3.2-3B" and result["resolved"]["precision"] == "fp32"
    assert result["resolved"]["warmup_steps"] == 2 and not (folder / "out").exists()
