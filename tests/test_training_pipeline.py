"""Settings from files, and the stages in order: what runs, what is skipped, what is refused. Stages are stood for by a function."""

import json
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from refrag.errors import InputError, MissingExtraError, NotFoundError
from refrag.training import checkpoints, pipeline
from refrag.training.pipeline import (
    check_values,
    is_done,
    make_settings,
    read_pipeline,
    read_settings,
    read_word,
    run_pipeline,
    settings_values,
)
from refrag.training.settings import STAGE_SETTINGS, CptSettings, PolicySettings, ReconstructionSettings, SftSettings

PIPELINE = """
output_dir: OUT
encoder: an-encoder
decoder: a-decoder
chunk-size: 4
curriculum: none
learning_rate: 3e-4
reconstruction: {data: documents.jsonl, learning_rate: 2.0e-4}
sft:
  data: [questions.jsonl, more.jsonl]
cpt: {data: documents.jsonl, num_steps: 5}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("documents", "questions", "more"):
        (tmp_path / f"{name}.jsonl").touch()
    path = tmp_path / "pipeline.yaml"
    path.write_text(PIPELINE.replace("OUT", str(tmp_path / "out")), encoding="utf-8")
    return path


class Stages:
    """Stands for the stages: leaves the files that they leave, and remembers what it was run with."""

    def __init__(self, stop: str | None = None) -> None:
        self.stop, self.seen = stop, []

    def __call__(self, stage: str, settings: Any) -> dict[str, Any]:
        self.seen.append((stage, settings))
        finished = stage != self.stop
        (settings.output_dir / "model").mkdir(parents=True, exist_ok=True)
        (settings.output_dir / "settings.json").write_text(json.dumps({"stage": stage} | settings_values(settings)))
        (settings.output_dir / "log.jsonl").touch()
        if finished:
            (settings.output_dir / "result.json").write_text(json.dumps({"stage": stage, "finished": True}))
        return {"stage": stage, "finished": finished}

    @property
    def names(self) -> list[str]:
        return [stage for stage, _ in self.seen]


# ── files of settings ────────────────────────────────────────────────────────────────────────────────────────────────


def test_json_and_yaml_hold_the_same_settings(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("learning-rate: 2e-4\ndata: a.jsonl\nwarmup: 10\nstreaming: yes\nnum_steps: 20\nexpand_range: [0, 0.5]\nmodel: null\ncurriculum: none\n")
    values = {"learning_rate": 2e-4, "data": ["a.jsonl"], "warmup": 10, "streaming": True, "num_steps": 20, "expand_range": [0, 0.5], "model": None, "curriculum": "none"}
    (tmp_path / "a.json").write_text(json.dumps(values))
    expected = CptSettings(learning_rate=2e-4, data=("a.jsonl",), warmup=10.0, streaming=True, num_steps=20, expand_range=(0.0, 0.5), curriculum="none")
    assert [make_settings("cpt", read_settings(tmp_path / name), name) for name in ("a.yaml", "a.json")] == [expected, expected]


@pytest.mark.parametrize("stage", STAGE_SETTINGS)
def test_settings_json_is_a_settings_file(stage: str) -> None:
    settings = STAGE_SETTINGS[stage](data=("a", "b"), output_dir=Path("x/y"), num_steps=7, report_to=("tensorboard",))
    values = json.loads(json.dumps({"stage": stage} | settings_values(settings)))
    assert make_settings(stage, values, "settings.json") == settings
    assert {"stage": stage} | settings_values(settings) == checkpoints.resolve(settings, stage)


def test_the_same_settings_may_change_as_when_a_run_goes_on() -> None:
    assert {field.name for field in fields(CptSettings)} > pipeline.WITHOUT_EFFECT


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"learning_rat": 1}, "The stage cpt has no setting 'learning_rat', which stands in FILE: did you mean learning_rate?"),
        ({"zzzz": 1}, "The stage cpt has no setting 'zzzz', which stands in FILE: see  refrag train cpt --help"),
        ({"learning_rate": "fast"}, 'learning_rate must be a number, was "fast" in FILE: mend it there.'),
        ({"learning_rate": True}, "learning_rate must be a number, was true in FILE"),
        ({"learning_rate": None}, "learning_rate must be a number, was null in FILE"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, was 2.5 in FILE"),
        ({"batch_size": "8"}, 'batch_size must be a whole number, was "8" in FILE'),
        ({"resume": "yes"}, 'resume must be true or false, was "yes" in FILE'),
        ({"schedule": "cosin"}, 'schedule must be one of cosine, linear, constant, constant_with_warmup, was "cosin" in FILE'),
        ({"data": [1]}, "data must be text, was [1] in FILE"),
        ({"data": {"a": 1}}, 'data must be a list of texts, was {"a": 1} in FILE'),
        ({"expand_range": [0.1]}, "expand_range must be a list of 2 numbers, was [0.1] in FILE"),
        ({"model": 3}, "model must be text, was 3 in FILE"),
        ({"output_dir": 3}, "output_dir must be a path, was 3 in FILE"),
        ({"stage": "sft"}, "FILE holds the settings of the stage sft, not of cpt: name another file."),
    ],
)
def test_a_setting_that_is_wrong_is_named(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        check_values("cpt", values, "FILE")
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", "{", "a.json must be JSON (.json) or YAML, but could not be read (Expecting property name"),
        ("a.yaml", "a: [1", "a.yaml must be JSON (.json) or YAML, but could not be read (while parsing"),
        ("a.yaml", "- 1\n- 2\n", "a.yaml must hold settings by name, such as  learning_rate: 1e-4 : mend the file."),
        ("a.yaml", "1: 2\n", "a.yaml must hold settings by name"),
        ("a.yaml", "", "a.yaml must hold settings by name"),
    ],
)
def test_a_file_that_cannot_be_read(name: str, content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as error:
        read_settings(tmp_path / name)
    assert sentence in str(error.value)


def test_a_file_that_is_not_there_and_a_reader_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match=r"There is no settings file .*missing\.yaml: check --config\."):
        read_settings(tmp_path / "missing.yaml")
    (tmp_path / "a.yaml").write_text("seed: 1")
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(MissingExtraError, match=r"A settings file in YAML needs the package 'pyyaml': install it with  pip install 'refrag\[train\]'"):
        read_settings(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("name", "word", "value"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("batch_size", "8", 8),
        ("streaming", "true", True),
        ("resume", "False", False),
        ("curriculum", "none", "none"),
        ("num_steps", "none", None),
        ("num_steps", "12", 12),
        ("data", "a.jsonl,b.jsonl", ("a.jsonl", "b.jsonl")),
        ("data", "", ()),
        ("expand_fractions", "0.1,0.2", (0.1, 0.2)),
        ("output_dir", "a/b", Path("a/b")),
    ],
)
def test_values_from_words(name: str, word: str, value: Any) -> None:
    read = read_word("cpt", name, word, "--set")
    assert (read, type(read)) == (value, type(value))


# ── the stages of a file ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_becomes_the_settings_of_each_stage_in_order(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stages = read_pipeline(file)
    assert list(stages) == ["reconstruction", "cpt", "sft"]
    assert settings_values(stages["reconstruction"]) == settings_values(STAGE_SETTINGS["reconstruction"]()) | {
        "data": ["documents.jsonl"], "output_dir": str(out / "reconstruction"), "encoder": "an-encoder", "decoder": "a-decoder",
        "chunk_size": 4, "curriculum": "none", "learning_rate": 2e-4,
    }  # fmt: skip
    assert settings_values(stages["cpt"]) == settings_values(CptSettings()) | {
        "data": ["documents.jsonl"], "output_dir": str(out / "cpt"), "model": str(out / "reconstruction/model"),
        "chunk_size": 4, "curriculum": "none", "learning_rate": 3e-4, "num_steps": 5,
    }  # fmt: skip
    assert stages["sft"] == SftSettings(data=("questions.jsonl", "more.jsonl"), output_dir=out / "sft", model=str(out / "cpt/model"), chunk_size=4, learning_rate=3e-4)


def test_changes_win_over_the_file_and_those_of_a_stage_over_those_of_all(file: Path, tmp_path: Path) -> None:
    changes = ["num_steps=7", "cpt.num-steps=3", "encoder=other", "expand_fractions=0.2", "sft.data=q.jsonl", "learning_rate=1e-3"]
    stages = read_pipeline(file, changes=changes, output_dir=tmp_path / "elsewhere", dry_run=True)
    assert [stages[name].num_steps for name in stages] == [7, 3, 7]
    assert [stages[name].learning_rate for name in stages] == [1e-3] * 3
    assert [(stages[name].encoder, stages[name].decoder) for name in stages] == [("other", "a-decoder"), (None, None), (None, None)]
    assert [stages[name].model for name in stages] == [None, str(tmp_path / "elsewhere/reconstruction/model"), str(tmp_path / "elsewhere/cpt/model")]
    assert stages["cpt"].expand_fractions == (0.2,) and stages["sft"].data == ("q.jsonl",)  # type: ignore[attr-defined]
    assert all(settings.dry_run for settings in stages.values())
    assert [settings.output_dir.name for settings in stages.values()] == list(stages)


def test_a_stage_may_name_its_own_start(file: Path) -> None:
    stages = read_pipeline(file, changes=["cpt.model=mine", "reconstruction.model=bundled"])
    assert (stages["reconstruction"].model, stages["reconstruction"].encoder) == ("bundled", None)
    assert (stages["cpt"].model, stages["sft"].model) == ("mine", str(stages["cpt"].output_dir / "model"))


@pytest.mark.parametrize(
    ("content", "changes", "sentence"),
    [
        ("seed: 1", [], "must have a section for a stage, it has none of reconstruction, cpt, sft, policy: add one."),
        ("cpt: {}\nsead: 1", [], "No stage in FILE has a setting 'sead': did you mean seed?"),
        ("cpt: {}\nreconstrution: {}", [], "No stage in FILE has a setting 'reconstrution': did you mean reconstruction?"),
        ("cpt: {}\ngroup_size: 4", [], "No stage in FILE has a setting 'group_size'"),
        ("cpt: {sead: 1}", [], "The stage cpt has no setting 'sead', which stands in FILE: did you mean seed?"),
        ("cpt: [1]", [], "The section cpt in FILE must hold settings by name, was [1]: mend the file."),
        ("cpt: {}", ["seed"], "--set takes NAME=VALUE or STAGE.NAME=VALUE, was 'seed': write for example  --set cpt.num_steps=100"),
        ("cpt: {}", ["sead=1"], "The stage cpt has no setting 'sead', which stands in --set sead=1: did you mean seed?"),
        ("cpt: {}", ["cbt.seed=1"], "The file has no stage 'cbt' for --set cbt.seed=1: did you mean cpt?"),
        ("cpt: {}", ["seed=one"], 'seed must be a whole number, was "one" in --set seed=one'),
        ("cpt: {encoder: x}", [], "A new model needs both --encoder and --decoder"),
    ],
)
def test_a_pipeline_that_cannot_run(content: str, changes: list[str], sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(content)
    with pytest.raises(InputError) as error:
        read_pipeline(file, changes=changes)
    assert sentence.replace("FILE", str(file)) in str(error.value)


# ── running them ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stages_run_in_order_and_what_is_done_is_skipped(file: Path, tmp_path: Path) -> None:
    run, told = Stages(stop="sft"), []
    result = run_pipeline(read_pipeline(file), run=run, after=lambda stage, settings, result: told.append((stage, settings.output_dir.name, result["finished"])))
    assert run.names == ["reconstruction", "cpt", "sft"]
    assert told == [("reconstruction", "reconstruction", True), ("cpt", "cpt", True)]
    assert (result["finished"], list(result["stages"]), result["skipped"]) == (False, ["reconstruction", "cpt", "sft"], [])

    again = Stages()
    result = run_pipeline(read_pipeline(file), run=again)
    assert again.names == ["sft"]  # it was told to stop, and goes on
    assert (result["finished"], result["skipped"], result["model"]) == (True, ["reconstruction", "cpt"], str(tmp_path / "out/sft/model"))
    assert result["stages"]["cpt"] == {"stage": "cpt", "finished": True}

    idle = Stages()
    assert run_pipeline(read_pipeline(file), run=idle)["finished"]
    assert idle.names == []


def test_stages_after_the_one_that_stopped_do_not_start(file: Path) -> None:
    run = Stages(stop="reconstruction")
    assert run_pipeline(read_pipeline(file), run=run)["finished"] is False
    assert run.names == ["reconstruction"]


def test_changed_settings_are_refused_before_anything_runs(file: Path, tmp_path: Path) -> None:
    run_pipeline(read_pipeline(file), run=Stages())
    run = Stages()
    with pytest.raises(InputError) as error:
        run_pipeline(read_pipeline(file, changes=["sft.learning_rate=1e-3", "sft.seed=3"]), run=run)
    folder = tmp_path / "out" / "sft"
    assert str(error.value) == (
        f"{folder} was trained with other settings (learning_rate was 0.0003, is 0.001, seed was 0, is 3): remove that folder, or choose another output_dir."
    )
    assert run.seen == []


def test_settings_that_do_not_matter_may_change(file: Path) -> None:
    run_pipeline(read_pipeline(file), run=Stages())
    run = Stages()
    assert run_pipeline(read_pipeline(file, changes=["log_every=3", "device=cpu", "keep=5"]), run=run)["finished"]
    assert run.names == []


def test_a_stage_from_a_model_that_is_trained_again_is_refused(file: Path, tmp_path: Path) -> None:
    run_pipeline(read_pipeline(file), run=Stages())
    (tmp_path / "out" / "reconstruction" / "result.json").unlink()
    run = Stages()
    with pytest.raises(InputError, match=r"cpt in .*out/cpt was trained from an earlier reconstruction, which is to run again: remove the folder of cpt too\."):
        run_pipeline(read_pipeline(file), run=run)
    assert run.seen == []


def test_a_dry_run_resolves_every_stage_and_trains_none(file: Path) -> None:
    seen, told = [], []

    def run(stage: str, settings: Any) -> dict[str, Any]:
        seen.append((stage, settings.dry_run))
        return {"dry_run": True}

    result = run_pipeline(read_pipeline(file, dry_run=True), run=run, after=lambda *words: told.append(words))
    assert seen == [("reconstruction", True), ("cpt", True), ("sft", True)]
    assert (told, result["finished"], list(result["stages"])) == ([], False, ["reconstruction", "cpt", "sft"])


def test_a_dry_run_goes_on_where_something_is_on_another_machine(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run(stage: str, settings: Any) -> dict[str, Any]:
        if stage == "cpt":
            raise MissingExtraError("The adamw_8bit optimizer needs the package 'bitsandbytes'.")
        return {"dry_run": True}

    found = run_pipeline(read_pipeline(file, dry_run=True), run=run)["stages"]
    assert found["cpt"]["not_checked"] == "The adamw_8bit optimizer needs the package 'bitsandbytes'."
    assert (found["cpt"]["settings"]["num_steps"], found["sft"]) == (5, {"dry_run": True})
    assert "cpt was not checked further: The adamw_8bit optimizer" in caplog.text


def test_a_result_that_was_cut_short_is_no_result(tmp_path: Path) -> None:
    settings = PolicySettings(output_dir=tmp_path)
    assert not is_done(settings)
    (tmp_path / "result.json").write_text('{"finished": tr')
    assert not is_done(settings)
    (tmp_path / "result.json").write_text('{"finished": true}')
    assert not is_done(PolicySettings(output_dir=tmp_path))  # its model is gone
    (tmp_path / "model").mkdir()
    (tmp_path / "settings.json").write_text(json.dumps(settings_values(settings)))
    assert is_done(settings)
    with pytest.raises(InputError, match="group_size was 8, is 4"):
        is_done(replace(settings, group_size=4))


# ── the scripts of this repository ───────────────────────────────────────────────────────────────────────────────────

RUNS = Path(__file__).parents[1] / "runs"
needs_runs = pytest.mark.skipif(not RUNS.exists(), reason="needs the repository, not an installed package")


@needs_runs
@pytest.mark.parametrize("name", ["quickstart", "llama_3b", "paper_7b"])
def test_the_settings_of_the_scripts_are_settings(name: str) -> None:
    assert list(read_pipeline(RUNS / f"{name}.yaml")) == list(STAGE_SETTINGS)
    assert subprocess.run(["bash", "-n", RUNS / f"{name}.sh"], check=False).returncode == 0


@needs_runs
def test_the_papers_setting() -> None:
    """RoBERTa-large and LLaMA-2-7B, k = 16, 256 rows a step on 64 GPUs, AdamW, cosine, 4 % warm-up, bf16, four epochs, nine stages."""
    stages = read_pipeline(RUNS / "paper_7b.yaml")
    learned = [stages[name] for name in ("reconstruction", "cpt", "sft")]
    assert [one.learning_rate for one in learned] == [2e-4, 5e-5, 2e-5]
    assert {(one.batch_size * one.gradient_accumulation_steps * 64, one.optimizer, one.schedule, one.warmup, one.precision) for one in learned} == {(256, "adamw", "cosine", 0.04, "bf16")}
    reconstruction, cpt = stages["reconstruction"], stages["cpt"]
    assert (reconstruction.encoder, reconstruction.decoder, reconstruction.chunk_size) == ("FacebookAI/roberta-large", "meta-llama/Llama-2-7b-hf", 16)
    assert isinstance(reconstruction, ReconstructionSettings) and isinstance(cpt, CptSettings)
    assert (reconstruction.num_epochs, cpt.num_epochs * (1 - cpt.mixed_share)) == (4, 4)
    assert [(one.curriculum, one.max_chunks) for one in (reconstruction, cpt)] == [("paper", 256)] * 2
    assert cpt.expand_fractions == (0.1,)
