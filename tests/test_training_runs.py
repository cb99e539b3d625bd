"""Runs in their folders: streams, folders that were refused, data that changed, damaged files, patience, LoRA, what is counted."""
# ruff: noqa: F811  (the fixtures are those of the neighbouring file)

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_training_stages import documents, folder, settings_of  # noqa: F401

from refrag.cli import main
from refrag.data.rows import Question
from refrag.errors import InputError, MismatchError, MissingExtraError
from refrag.model import RefragModel
from refrag.text import Passage
from refrag.training import cpt, pipeline, reconstruction, sft
from refrag.training.checkpoints import claimed, latest_whole
from refrag.training.settings import CptSettings, PolicySettings, ReconstructionSettings, SftSettings
from refrag.training.sft import answer_ids, choose_passages


def questions(folder, rows, name="q.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(number, **fields):
    return {"question": f"Who built mill {number}?", "answers": ["Ann"], "passages": [f"Ann built mill {number}.", "The coast is old."]} | fields


# ── streams ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stage, kind", [(reconstruction, ReconstructionSettings), (cpt, CptSettings)])
def test_a_stream_trains_counts_and_goes_on(folder, stage, kind):
    settings = settings_of(kind, folder, streaming=True, short_documents="drop", batch_size=4, max_chunks=9, curriculum="none")
    whole = stage.run(settings)
    assert whole["finished"] and whole["steps"] == 4
    counts = whole["counts"]
    assert counts["train"] > 1 and counts["rows"] == counts["train"] + counts["held_out"] and counts["dropped_documents"] > 0
    shutil.copytree(folder / "out", folder / "half", symlinks=True)
    for name in ("checkpoint-4", "model", "result.json"):
        path = folder / "half" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert stage.run(replace(settings, output_dir=folder / "half"))["steps"] == 4
    assert (folder / "half/model/model.safetensors").read_bytes() == (folder / "out/model/model.safetensors").read_bytes()


def test_a_stream_that_ends_early_says_how_to_go_on(folder):
    with pytest.raises(InputError, match=r"The stream ended after \d+ of 500 micro-batches: add data, or start anew, in another --output-dir, with a lower --num-steps"):
        cpt.run(settings_of(CptSettings, folder, streaming=True, num_steps=500, save_every=500))


# ── whose folder ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_was_refused_leaves_the_folder_free(folder):
    refused = settings_of(CptSettings, folder, max_chunks=5000)
    with pytest.raises(InputError, match="lower --max-chunks"):
        cpt.run(refused)
    assert not (folder / "out").exists()
    cpt.run(settings_of(CptSettings, folder))
    with pytest.raises(InputError, match=r"holds another run \(max_chunks was 4, now 5000\)"):
        cpt.run(refused)


def test_the_best_step_is_kept_though_no_checkpoint_was_due(folder):
    result = cpt.run(settings_of(CptSettings, folder, num_steps=8, save_every=8, eval_every=2, learning_rate=1.0, warmup=0.0, schedule="constant", eval_fraction=0.3))
    log = [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    best = min(losses, key=losses.__getitem__)
    assert best < 8 and result["best_step"] == best and result["eval_loss"] == pytest.approx(losses[best], abs=1e-4)
    assert (folder / "out/best").resolve().name == f"checkpoint-{best}"
    ends, saved = (load_file(folder / "out" / name / "model.safetensors") for name in ("model", f"checkpoint-{best}"))
    assert all(torch.equal(ends[name], saved[name]) for name in ends)


def test_rows_longer_than_the_decoders_positions_are_refused_before_the_first_step(folder):
    rows = [row(0), row(1, passages=["Ann built mill 1. " * 200])]
    with pytest.raises(InputError, match=r"The decoder has 512 positions, a row would take [\d,]+ slots: lower --num-passages \(row .*line 2\)"):
        sft.run(settings_of(SftSettings, folder, data=(questions(folder, rows),), full_share=0.1))
    assert not (folder / "out").exists()


def test_the_rows_of_the_last_step_are_seen_too(folder):
    data = questions(folder, [row(number) for number in range(11)])
    result = sft.run(settings_of(SftSettings, folder, data=(data,), num_steps=None, batch_size=2, gradient_accumulation_steps=2, eval_fraction=0.0))
    assert result["steps"] == 3  # of 4 rows each


def test_a_constant_schedule_has_no_warm_up(folder):
    with pytest.raises(InputError, match=r"The schedule constant has no warm-up, --warmup was 2: choose --schedule constant_with_warmup"):
        settings_of(CptSettings, folder, schedule="constant", warmup=2.0)


def test_a_share_that_is_no_chunk_is_said(folder, caplog):
    with caplog.at_level("WARNING", "refrag"):
        cpt.run(settings_of(CptSettings, folder, mixed_share=0.5, expand_fractions=(0.1, 0.5)))
    assert "a share of 0.1 of 4 chunks is no chunk: nothing is left as tokens there, take 0.25 or more, or raise --max-chunks" in caplog.text
    assert "a share of 0.5" not in caplog.text


def test_two_processes_do_not_train_in_one_folder(folder):
    settings = settings_of(CptSettings, folder)
    with claimed(settings, "cpt", None):
        before = (folder / "out/settings.json").read_bytes()
        with pytest.raises(InputError, match=r"Another process trains in .*out: wait for its end, or choose another --output-dir"):
            cpt.run(settings)
        assert (folder / "out/settings.json").read_bytes() == before and not (folder / "out/log.jsonl").exists()
    assert cpt.run(settings)["finished"]


def test_data_that_changed_are_noticed(folder):
    cpt.run(settings_of(CptSettings, folder))
    for name in ("model", "result.json"):
        path = folder / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines = (folder / "docs.jsonl").read_text().splitlines(keepends=True)
    (folder / "docs.jsonl").write_text("".join(lines).replace("number", "Number"))
    with pytest.raises(InputError, match=r"began with other data than --data and --eval-data hold now: put them back, or choose another --output-dir"):
        cpt.run(settings_of(CptSettings, folder))
    (folder / "docs.jsonl").write_text("".join(lines))
    assert cpt.run(settings_of(CptSettings, folder))["finished"]


def test_a_finished_run_without_its_model_makes_it_again(folder):
    cpt.run(settings_of(CptSettings, folder))
    before = (folder / "out/model/model.safetensors").read_bytes()
    shutil.rmtree(folder / "out/model")
    cpt.run(settings_of(CptSettings, folder))
    assert (folder / "out/model/model.safetensors").read_bytes() == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(folder, caplog):
    cpt.run(settings_of(CptSettings, folder))
    file = folder / "out/checkpoint-4/optimizer.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with caplog.at_level("WARNING", "refrag"):
        assert latest_whole(folder / "out") == folder / "out/checkpoint-2"
    assert "checkpoint-4 is damaged (optimizer.pt)" in caplog.text
    for name, content in (("trainer_state.json", "[]"), ("trainer_state.json", '{"global'), ("scheduler.pt", None), ("model.safetensors", None)):
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / "out", copy, symlinks=True)
        shutil.rmtree(copy / "checkpoint-4")
        shutil.copytree(copy / "checkpoint-2", copy / "checkpoint-3")
        (copy / "checkpoint-3" / name).unlink()
        if content is not None:
            (copy / "checkpoint-3" / name).write_text(content)
        assert latest_whole(copy) == copy / "checkpoint-2"
    weights = folder / "out/checkpoint-2/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"All checkpoints in .* are damaged"):
        latest_whole(folder / "out")


@pytest.mark.parametrize("place, said", [("docs.jsonl/x", "docs.jsonl is a file"), ("docs.jsonl", "docs.jsonl is a file")])
def test_a_folder_that_cannot_be(folder, place, said):
    with pytest.raises(InputError, match=rf"--output-dir must be a folder, .*{said}"):
        cpt.run(settings_of(CptSettings, folder, output_dir=folder / place))


@pytest.mark.parametrize("content", ['{"stage": "cp', "[]", "3"])
def test_damaged_settings_are_one_sentence(folder, content):
    (folder / "out").mkdir()
    (folder / "out/settings.json").write_text(content)
    with pytest.raises(InputError, match=r"settings\.json is damaged: remove the folder of the run"):
        cpt.run(settings_of(CptSettings, folder))


def test_patience_counts_on_over_an_interruption(folder):
    settings = settings_of(CptSettings, folder, num_steps=40, save_every=2, patience=3, learning_rate=1e-30, schedule="constant", warmup=0.0, keep=50)
    steps = cpt.run(settings)["steps"]
    assert steps == 8  # three evaluations after the first, none of them better
    shutil.copytree(folder / "out", folder / "half", symlinks=True)
    for name in (f"checkpoint-{steps}", f"checkpoint-{steps - 2}", "model", "result.json"):
        path = folder / "half" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert cpt.run(replace(settings, output_dir=folder / "half"))["steps"] == steps
    before = (folder / "out/model/model.safetensors").read_bytes()
    shutil.rmtree(folder / "out/model")
    (folder / "out/log.jsonl").write_bytes(b'5\n{}\n\xff\n')
    assert cpt.run(settings)["steps"] == steps  # it had stopped: no further step is taken
    assert (folder / "out/model/model.safetensors").read_bytes() == before


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "kind, changes, said",
    [
        (CptSettings, {"num_epochs": float("nan")}, "A run must take one optimizer step or more"),
        (CptSettings, {"num_epochs": float("inf")}, "A run must take one optimizer step or more"),
        (CptSettings, {"max_grad_norm": -1.0}, "max_grad_norm must be 0 or more"),
        (CptSettings, {"weight_decay": float("nan")}, "weight_decay must be 0 or more, and finite, was nan"),
        (CptSettings, {"lora_encoder": True}, "lora_encoder needs a rank, lora_rank was 0: pass --lora-rank 16"),
        (ReconstructionSettings, {"lora_rank": 4}, "Reconstruction freezes the decoder, so LoRA layers on it would learn nothing: add --lora-encoder"),
        (PolicySettings, {"entropy_weight": float("nan")}, "entropy_weight must be finite, was nan"),
        (SftSettings, {"expand_range": (0.5, 0.1)}, "expand_range must go from the lower share to the higher, was 0.5 to 0.1"),
        (CptSettings, {"expand_range": (0.5, 0.1)}, "expand_range must go from the lower share to the higher"),
        (PolicySettings, {"lora_rank": 4}, "The policy stage freezes encoder and decoder, so LoRA layers would learn nothing"),
        (CptSettings, {"save_every": 4, "eval_every": 3}, "--save-every must be a multiple of --eval-every, were 4 and 3"),
        (CptSettings, {"patience": 2, "eval_fraction": 0.0}, "patience counts evaluations, and nothing would be evaluated: leave --patience 2 out"),
        (CptSettings, {"report_to": ("foo",)}, "report_to must be among tensorboard, wandb, mlflow, trackio, was 'foo'"),
    ],
)
def test_settings_that_are_refused(kind, changes, said):
    with pytest.raises(InputError, match=said):
        kind(**changes)


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(folder):
    with pytest.raises(MissingExtraError, match="Reporting to wandb needs the package wandb: pip install wandb"):
        cpt.run(settings_of(CptSettings, folder, report_to=("wandb",)))
    assert not (folder / "out").exists()


def test_parts_of_a_model_that_is_there_are_not_changed(folder):
    with pytest.raises(MismatchError, match="made with pooling cls, mean was asked for"):
        cpt.run(settings_of(CptSettings, folder, pooling="mean"))
    with pytest.raises(MismatchError, match="made with projector_width None, 7 was asked for"):
        cpt.run(settings_of(CptSettings, folder, projector_width=7))


def test_lora_goes_on_with_its_own_rank(folder):
    pytest.importorskip("peft")
    cpt.run(settings_of(CptSettings, folder, lora_rank=2))
    with pytest.raises(MismatchError, match="This model has LoRA layers of rank 2, --lora-rank 4 was asked for: pass --lora-rank 2"):
        cpt.run(settings_of(CptSettings, folder, model=str(folder / "out/model"), output_dir=folder / "next", lora_rank=4))


def test_reconstruction_adds_layers_to_the_encoder_alone(folder):
    pytest.importorskip("peft")
    reconstruction.run(settings_of(ReconstructionSettings, folder, lora_rank=2, lora_encoder=True))
    before, after = (RefragModel.from_pretrained(folder / name) for name in ("model", "out/model"))
    assert after.config.lora is None
    changed = {name.split(".")[0] for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True) if not old.equal(new)}
    assert "encoder" in changed and "decoder" not in changed


# ── questions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_passages_that_hold_an_answer_are_kept(rng=__import__("random")):
    texts = [f"Stone number {number}." for number in range(9)] + ["It was Ann."]
    passages = tuple(Passage(str(number), text) for number, text in enumerate(texts))
    unmarked = Question("1", "Who?", ("Ann",), passages, None)
    marked = replace(unmarked, gold=(True, True, *(False,) * 7, True))
    for seed in range(20):
        for question in (unmarked, marked):
            chosen, _ = choose_passages(question, num_passages=2, rng=rng.Random(seed))
            assert passages[9] in chosen
        chosen, gold = choose_passages(marked, num_passages=3, rng=rng.Random(seed))
        assert gold == [True] * 3
        for gold in ((False,) * 10, (True, *(False,) * 9)):  # the marks say nothing of the answer
            chosen, _ = choose_passages(replace(unmarked, gold=gold), num_passages=2, rng=rng.Random(seed))
            assert passages[9] in chosen and (not gold[0] or passages[0] in chosen)
    others = {passage.id for seed in range(20) for passage in choose_passages(marked, num_passages=4, rng=rng.Random(seed))[0]} - {"0", "1", "9"}
    assert len(others) > 3  # distractors are drawn


def test_questions_without_passages_train_and_are_counted(folder):
    data = questions(folder, [row(number, passages=[]) for number in range(8)])
    found = sft.run(settings_of(SftSettings, folder, data=(data,), eval_fraction=0.0))
    assert found["finished"] and found["counts"]["without_passages"] == 8


def test_what_a_question_loses_is_counted(folder, tiny_model, tokenizer):
    gold = [{"text": f"Ann built mill {number}.", "is_gold": True} for number in range(3)]
    rows = [row(number, answers=["Ann of the old mill by the river in the north"] if number % 2 else ["Ann"], passages=gold) for number in range(8)]
    settings = settings_of(SftSettings, folder, data=(questions(folder, rows),), eval_fraction=0.0, num_passages=2, max_answer_tokens=6)
    counts = sft.prepare(RefragModel.from_pretrained(folder / "model"), settings).counts
    assert (counts["fewer_gold_passages"], counts["cut_answers"]) == (8, 4)
    builder = sft.PromptBuilder(tokenizer, chunk_size=4)
    assert tokenizer.eos_token_id not in answer_ids(tokenizer, builder, rows[1]["answers"][0], max_tokens=6)
    assert answer_ids(tokenizer, builder, "Ann", max_tokens=60)[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("batch_size", [2, 8, 16])
def test_every_held_out_row_is_evaluated_whatever_the_batch_size(folder, batch_size):
    held_out = questions(folder, [row(100 + number) for number in range(13)], "held-out.jsonl")
    settings = settings_of(SftSettings, folder, data=(questions(folder, [row(number) for number in range(32)]),), eval_data=(held_out,), batch_size=batch_size)
    evaluation = sft.prepare(RefragModel.from_pretrained(folder / "model"), settings).evaluation
    ids = [name for item in range(len(evaluation)) for name in evaluation[item]["rows"]]
    assert len(ids) == len(set(ids)) == 13


# ── all stages, and before them ──────────────────────────────────────────────────────────────────────────────────────


def test_what_can_be_known_before_the_first_stage_is(folder):
    made = {"cpt": settings_of(CptSettings, folder), "sft": settings_of(SftSettings, folder, data=("missing.jsonl",), output_dir=folder / "b")}

    def never(*_):
        raise AssertionError("a stage was started")

    with pytest.raises(InputError, match=r"cpt and sft would both write to .*out: give each stage an output_dir of its own"):
        pipeline.run_pipeline(made | {"sft": replace(made["sft"], output_dir=folder / "out")}, run=never)
    with pytest.raises(FileNotFoundError, match=r"No data 'missing\.jsonl' was found"):
        pipeline.run_pipeline(made, run=never)
    (folder / "link").symlink_to(folder, target_is_directory=True)
    with pytest.raises(InputError, match=r"cpt and sft would both write to .*link/out"):
        pipeline.run_pipeline(made | {"sft": replace(made["sft"], output_dir=folder / "link/out")}, run=never)
    for name, said in (("missing.jsonl:train", r"No data 'missing\.jsonl:train' was found"), ("", "A name of data must not be empty")):
        with pytest.raises(FileNotFoundError, match=said):
            pipeline.run_pipeline(made | {"sft": replace(made["sft"], data=(name,))}, run=never)
    with pytest.raises(InputError, match=r"sft has nothing to train on: name its data in its section"):
        pipeline.run_pipeline(made | {"sft": replace(made["sft"], data=())}, run=never)


def test_a_shared_rank_is_not_for_the_stages_that_freeze_the_decoder(folder):
    data = str(folder / "docs.jsonl")
    config = {"model": str(folder / "model"), "lora_rank": 4} | {stage: {"data": data} for stage in ("reconstruction", "cpt", "sft", "policy")}
    (folder / "all.json").write_text(json.dumps(config))
    made = pipeline.read_pipeline(folder / "all.json", output_dir=folder / "runs")
    assert {stage: own.lora_rank for stage, own in made.items()} == {"reconstruction": 0, "cpt": 4, "sft": 4, "policy": 0}


def test_doctor_knows_questions_from_texts(folder, capsys):
    data = questions(folder, [row(number) for number in range(8)])
    arguments = ["doctor", "--model", str(folder / "model"), "--steps", "1", "--precisions", "fp32", "--json", "--set", "device=cpu"]
    assert main([*arguments, "--data", data]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["texts"]["without_passages"] == 0
    assert main([*arguments, "--data", str(folder / "docs.jsonl"), "--set", "max_chunks=4"]) in (0, 1)
    assert "windows" in json.loads(capsys.readouterr().out)["texts"]
    assert main([*arguments, "--data", str(folder / "docs.jsonl"), "--set", "streaming=true", "--set", "num_steps=3"]) == 2
    assert "a stream has none" in capsys.readouterr().err
