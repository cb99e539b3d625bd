"""`refrag bench`: throughput, indexing and training as they really run, with tiny shapes; bad input is one sentence."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from refrag.cli import main
from refrag.errors import InputError
from refrag.evaluation import indexing, throughput, training
from refrag.evaluation.settings import IndexingSettings, ThroughputSettings, TrainingSpeedSettings
from refrag.evaluation.shapes import random_refrag

TRAINING: dict[str, Any] = {"shape": "tiny", "encoder_shape": "tiny", "context_tokens": (64,), "output_tokens": 24, "chunk_size": 4, "min_repeats": 6, "max_repeats": 6, "device": "cpu"}


# ── throughput ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_throughput_counts_the_tokens_of_all_answers() -> None:
    settings = ThroughputSettings(
        shape="tiny", encoder_shape="tiny", context_tokens=64, question_tokens=48, chunk_size=4, num_passages=2, index_passages=4, min_repeats=6, max_repeats=6, new_tokens=3,
    )  # fmt: skip
    point = throughput.measure(settings, 2)
    cached, full = point["systems"]["cached"], point["systems"]["full"]
    assert point["rounds"] == len(cached["samples_s"]) == 6
    assert (cached["new_tokens"], full["new_tokens"]) == (6, 6)  # no end token cuts an answer short
    assert (cached["slots"], full["slots"]) == (2 * (48 + 16), 2 * (48 + 64))
    assert cached["tokens_per_s"] == pytest.approx(6 / cached["p50_s"])
    assert cached["requests_per_s"] == pytest.approx(2 / cached["p50_s"])
    assert full["kv_bytes"] / cached["kv_bytes"] == full["slots"] / cached["slots"]


def test_throughput_in_words() -> None:
    ratio = {"median": 1.5, "low": 1.4, "high": 1.6, "steady": False}
    point = {"batch_size": 4, "rounds": 9, "ratios": {"full_over_cached": ratio}, "systems": {"cached": {"tokens_per_s": 30.0}, "full": {"tokens_per_s": 20.0}}}
    assert throughput.summary({"points": [point, {"batch_size": 8, "failed": "out of memory"}]}).splitlines()[1:] == [
        "     4          30.0        20.0    1.50  NOT STEADY after 9 rounds",
        "     8  not measured (out of memory)",
    ]


# ── indexing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_indexing_is_measured_against_the_encoder_s_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "BATCH_SIZES", (128, 512))  # others take longer, and tell nothing here
    settings = IndexingSettings(encoder_shape="tiny", passages=2, passage_tokens=32, chunk_size=8, batch_size=2, rounds=6, memory_passages=(0, 0))
    speed = indexing.run(settings)["speed"]
    assert speed["chunks_a_round"] == 8
    seconds = speed["seconds"]
    assert {name: len(own) for name, own in seconds.items()} == {"add": 6, "forward": 6, "retrieval": 6}
    within = sorted(forward / add for forward, add in zip(seconds["forward"], seconds["add"], strict=True))
    assert speed["over_encoder_forward"]["median"] == pytest.approx((within[2] + within[3]) / 2)
    assert "of the encoder's own best forward" in indexing.summary({"speed": speed})


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("stage", "slots"), [("cpt", 1 + 16 + 24), ("reconstruction", 1 + 16 + 64)])
def test_a_training_step_is_the_trainer_s_own(stage: Any, slots: int) -> None:
    point = training.measure(TrainingSpeedSettings(**TRAINING, stage=stage), 64, stage == "cpt")
    assert (point["slots"], point["chunks"], point["rounds"]) == (slots, 16, 6)
    systems = point["systems"]
    assert {name: len(own["samples_s"]) for name, own in systems.items()} == dict.fromkeys(training.PARTS, 6)
    for step, batch, parts, decoder, encoder in zip(*(systems[name]["samples_s"] for name in ("step", "batch", "parts", "decoder", "encoder")), strict=True):
        assert step > batch
        assert parts == pytest.approx(decoder + encoder, abs=2e-6)
    assert point["peak_memory_bytes"] is None or point["peak_memory_bytes"] >= point["model_memory_bytes"]


@pytest.mark.parametrize(("stage", "frozen"), [("cpt", {"policy"}), ("reconstruction", {"policy", "decoder"})])
def test_the_stage_trains_what_it_should_on_full_windows(stage: Any, frozen: set[str]) -> None:
    settings = TrainingSpeedSettings(**TRAINING, stage=stage, batch_size=2)
    model = random_refrag("tiny", "tiny", chunk_size=4, dtype=torch.float32, device=torch.device("cpu"), seed=0)
    own = training.stage_settings(settings, 64, True, Path(tempfile.gettempdir()))
    assert own.gradient_checkpointing and own.curriculum == "none"
    batch = training.stage_data(model, own).train[0]
    assert list(batch["layout"].context_slots) == [16, 16]
    assert list(batch["layout"].context_tokens) == [64, 64]
    assert [name for name, part in model.named_children() if not any(weight.requires_grad for weight in part.parameters())] == sorted(frozen)


def test_training_in_words() -> None:
    ratio = {"median": 1.125, "low": 1.1, "high": 1.2, "steady": True}
    point = {
        "context_tokens": 1024, "gradient_checkpointing": True, "rounds": 7, "ratios": {"step_over_parts": ratio}, "peak_memory_bytes": 3 * 2**30,
        "systems": {"step": {"p50_s": 0.5}, "optimizer": {"p50_s": 0.25}},
    }  # fmt: skip
    failed = {"context_tokens": 8192, "gradient_checkpointing": False, "failed": "out of memory"}
    assert training.summary({"points": [point, failed]}).splitlines()[1:] == [
        "    1024  yes            0.500    1.125        0.250     3,072",
        "    8192  no            not measured (out of memory)",
    ]


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["latency", "--num-passages", "3"], "context_tokens must divide evenly over --num-passages, were 4096 and 3: try context_tokens 4095."),
        (["latency", "--index-passages", "4"], "--index-passages must be num_passages (8) or more, was 4."),
        (["latency", "--model", "./missing"], "There is no model folder at ./missing: check --model."),
        (["latency", "--sweep-context", "512", "100"], "--sweep-context must divide evenly over num_passages, were 100 and 8: try --sweep-context 96."),
        (["throughput", "--batch-sizes", "1", "0"], "--batch-sizes must be numbers of 1 or more, were [1, 0]: try 1 2 4 8."),
        (["index", "--rounds", "0"], "rounds must be 1 or more, was 0."),
        (["index", "--memory-passages", "-1", "5"], "--memory-passages must be 0 or more, were [-1, 5]: try 1000 5000, or 0 0 for none."),
        (["train", "--context-tokens", "1000"], "--context-tokens must be whole chunks of 16, was 1000: try 992."),
        (["latency", "--out", "."], "out must name a file, . is a folder: try --out result.json."),
        (["index", "--out", f"{__file__}/x.json"], f"out must lie in a folder that can be written to, {__file__} is a file: choose another --out."),
        (["train", "--max-repeats", "3"], "--max-repeats must be 7 or more, the least number of rounds, was 3."),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"refrag: {sentence}\n")


def test_the_result_goes_to_stdout_and_its_words_to_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(indexing, "BATCH_SIZES", (512,))
    arguments = "bench index --encoder-shape tiny --passages 1 --passage-tokens 16 --batch-size 1 --rounds 1 --memory-passages 0 0 --log-level error"
    assert main(arguments.split()) == 0
    said = capsys.readouterr()
    content = json.loads(said.out)  # one round leaves intervals open, which JSON has no number for
    assert content["kind"] == "indexing"
    assert content["speed"]["over_encoder_forward"]["high"] is None
    assert "[open, open] of the encoder's own best forward" in said.err


def test_settings_without_anything_to_measure_are_refused() -> None:
    with pytest.raises(InputError, match=r"batch_sizes must be numbers of 1 or more, were \[\]"):
        ThroughputSettings(batch_sizes=())
    with pytest.raises(InputError, match="context_tokens must name one length or more"):
        TrainingSpeedSettings(context_tokens=())
