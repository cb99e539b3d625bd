"""`refrag train`, `tune` and `doctor`: parsing, files of settings, what goes to stdout and what to stderr. Stages are stood for by a function."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import refrag.cli.train as commands
from refrag.cli import main
from refrag.cli.train import with_config
from refrag.training.pipeline import settings_values
from refrag.training.settings import CptSettings, PolicySettings


class Stages:
    """Stands for every stage: writes the files that a stage writes."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []
        self.finished = True

    def __call__(self, stage: str, settings: Any) -> dict[str, Any]:
        self.seen.append((stage, settings))
        if settings.dry_run:
            return {"dry_run": True, "settings": settings_values(settings)}
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        (settings.output_dir / "settings.json").write_text(json.dumps({"stage": stage} | settings_values(settings)))
        log = [{"step": step, "loss": 5.0 - step, "L=1/loss": 4.0 - step} for step in (1, 2)]
        (settings.output_dir / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
        result = {"stage": stage, "finished": self.finished, "steps": 2, "eval_loss": settings.learning_rate}
        if self.finished:
            (settings.output_dir / "model").mkdir(exist_ok=True)
            (settings.output_dir / "result.json").write_text(json.dumps(result))
        return result


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stages:
    """The working folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    found = Stages()
    monkeypatch.setattr(commands, "run_stage", found)
    return found


def last_line(text: str) -> Any:
    return json.loads(text.rstrip("\n").splitlines()[-1])


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that exits with 2 and prints nothing."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err.strip().removeprefix("refrag: ")


# ── one stage ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stage_trains_reports_and_prints_its_result(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "cpt", "--model", "bundled", "--data", "a.jsonl", "b.jsonl", "--output-dir", "out", "--expand-range", "0", "0.5", "--no-resume"]) == 0
    said = capsys.readouterr()
    assert stages.seen == [("cpt", CptSettings(model="bundled", data=("a.jsonl", "b.jsonl"), output_dir=Path("out"), expand_range=(0.0, 0.5), resume=False))]
    assert said.out == json.dumps({"stage": "cpt", "finished": True, "steps": 2, "eval_loss": 5e-5}) + "\n"
    assert "1 chunk                    3.0000 →  2.0000  1–2" in said.err and "report: out/report.html" in said.err
    assert Path("out/report.html").is_file() and Path("out/curves.png").is_file()


def test_quiet_says_nothing(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "policy", "--data", "a", "--group-size", "4", "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and last_line(said.out)["finished"]
    assert stages.seen == [("policy", PolicySettings(data=("a",), group_size=4))]


def test_a_stage_that_was_told_to_stop_has_its_own_exit_status(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    stages.finished = False
    assert main(["train", "sft", "--data", "a"]) == 143
    assert last_line(capsys.readouterr().out)["finished"] is False
    assert not Path("runs/train/report.html").exists()


def test_a_report_that_cannot_be_written_is_a_warning(stages: Stages, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["train", "sft", "--data", "a"]) == 0
    assert "WARNING: no report: A report needs the package 'matplotlib'" in capsys.readouterr().err


def test_only_the_first_process_speaks_and_writes(stages: Stages, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "sft", "--data", "a"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")
    assert not Path("runs/train/report.html").exists()


def test_a_dry_run_lists_every_setting(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "sft", "--dry-run", "--seed", "7"]) == 0
    said = capsys.readouterr()
    listed = {line.split()[0] for line in said.err.splitlines()}
    assert listed >= set(settings_values(stages.seen[0][1])) and "seed                         7\n" in said.err
    assert last_line(said.out)["settings"]["seed"] == 7


# ── a file of settings ───────────────────────────────────────────────────────────────────────────────────────────────


def test_flags_win_over_the_file(stages: Stages, tmp_path: Path) -> None:
    file = tmp_path / "cpt.yaml"
    file.write_text(
        "data: [a.jsonl, b.jsonl]\nlearning-rate: 2e-4\nstreaming: true\nnum_steps: 100\ngradient_checkpointing: true\n"
        "encoder: an-encoder\ndecoder: a-decoder\nexpand_range: [0, 0.25]\ncurriculum: none\nmodel: null\nresume: false\n"
    )
    base = {"num_steps": 100, "expand_range": (0.0, 0.25), "curriculum": "none"}
    assert main(["train", "cpt", "--config", str(file), "--quiet"]) == 0
    assert main(["train", "cpt", "--data", "c.jsonl", "--no-streaming", "--resume", f"--config={file}", "--learning-rate", "1e-3", "--model", "mine", "--quiet"]) == 0
    first = {"data": ("a.jsonl", "b.jsonl"), "learning_rate": 2e-4, "streaming": True, "resume": False, "encoder": "an-encoder", "decoder": "a-decoder"}
    second = {"data": ("c.jsonl",), "learning_rate": 1e-3, "model": "mine"}
    assert [settings for _, settings in stages.seen] == [CptSettings(**base, gradient_checkpointing=True, **own) for own in (first, second)]


def test_what_a_file_lacks_may_come_from_a_flag(stages: Stages, tmp_path: Path) -> None:
    """The file alone would be refused: a stream needs a number of steps, an encoder a decoder."""
    (tmp_path / "a.json").write_text(json.dumps({"streaming": True, "encoder": "an-encoder"}))
    assert main(["train", "cpt", "--config", "a.json", "--num-steps", "5", "--decoder", "a-decoder", "--quiet"]) == 0
    assert stages.seen[0][1] == CptSettings(streaming=True, encoder="an-encoder", num_steps=5, decoder="a-decoder")


def test_the_settings_beside_a_result_are_a_file(stages: Stages) -> None:
    assert main(["train", "sft", "--data", "a", "b", "--output-dir", "out", "--num-steps", "9", "--report-to", "tensorboard", "--quiet"]) == 0
    assert main(["train", "sft", "--config", "out/settings.json", "--quiet"]) == 0
    assert stages.seen[0] == stages.seen[1]


def test_only_stages_read_a_file_before_the_flags(tmp_path: Path) -> None:
    for args in (["ask", "q", "--config", "x"], ["train"], ["train", "all", "--config", "x"], ["train", "cpt", "--config", "x", "--help"], ["train", "cpt", "--seed", "1"]):
        assert with_config(args) == args


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("learning_rat: 1", "The stage cpt has no setting 'learning_rat', which stands in a.yaml: did you mean learning_rate?"),
        ("batch_size: many", 'batch_size must be a whole number, was "many" in a.yaml: mend it there.'),
        ("batch_size: 0", "batch_size must be 1 or more, was 0."),
        ("cpt: {seed: 1}", "a.yaml has sections for stages: run  refrag train all --config a.yaml"),
        ("stage: sft", "a.yaml holds the settings of the stage sft, not of cpt: name another file."),
    ],
)
def test_a_file_that_is_wrong(content: str, sentence: str, stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yaml").write_text(content)
    assert refused(["train", "cpt", "--config", "a.yaml"], capsys) == sentence
    assert stages.seen == []


def test_a_file_that_is_not_there(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(["train", "cpt", "--config", "a.yaml"], capsys) == "There is no settings file a.yaml: check --config."


# ── all stages ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_stages_run_once(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    Path("all.json").write_text(json.dumps({"output_dir": "out", "model": "bundled", "cpt": {"data": "d"}, "policy": {"data": "q"}}))
    command = ["train", "all", "--config", "all.json", "--set", "num_steps=3", "--set", "policy.group_size=2"]
    assert main(command) == 0
    said = capsys.readouterr()
    cpt = CptSettings(data=("d",), output_dir=Path("out/cpt"), model="bundled", num_steps=3)
    policy = PolicySettings(data=("q",), output_dir=Path("out/policy"), model="out/cpt/model", num_steps=3, group_size=2)
    assert stages.seen == [("cpt", cpt), ("policy", policy)]
    assert (last_line(said.out)["finished"], last_line(said.out)["model"]) == (True, "out/policy/model")
    for path in ("out/cpt/report.html", "out/policy/curves.png", "out/report.html"):
        assert Path(path).is_file()
    assert main(command) == 0
    said = capsys.readouterr()
    assert len(stages.seen) == 2 and "INFO: cpt is done, in out/cpt" in said.err and last_line(said.out)["skipped"] == ["cpt", "policy"]
    assert "cpt was trained with other settings (num_steps was 3, is 4)" in refused([*command, "--set", "num_steps=4"], capsys)


def test_all_stages_of_a_dry_run(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    Path("all.yaml").write_text("cpt: {data: d}\nsft: {data: q}\n")
    assert main(["train", "all", "--config", "all.yaml", "--output-dir", "out", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "\ncpt\n" in said.err and "out/sft\n" in said.err
    assert [one["settings"]["output_dir"] for one in last_line(said.out)["stages"].values()] == ["out/cpt", "out/sft"]
    assert not Path("out").exists()


# ── tune and doctor ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_tune_prints_the_best_settings_which_train_takes(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    Path("cpt.yaml").write_text("data: d\nnum_steps: 50\nmodel: theirs\n")
    command = ["tune", "--stage", "cpt", "--sampler", "grid", "--config", "cpt.yaml", "--model", "mine", "--set", "num_steps=5", "--output-dir", "tune"]
    assert main([*command, "--search", "learning_rate=1e-3,1e-4", "curriculum=paper,none", "--study", "study.jsonl"]) == 0
    said = capsys.readouterr()
    best = last_line(said.out)
    assert (best["finished"], best["value"], best["settings"]) == (True, 1e-4, {"learning_rate": 1e-4, "curriculum": "paper"})
    assert "trial 0    0.001        learning_rate 1e-3, curriculum paper\n" in said.err
    assert Path("study.jsonl").is_file() and Path("tune/trial-3/result.json").is_file()
    assert main(["train", "cpt", "--config", "tune/best.json", "--output-dir", "out", "--quiet"]) == 0
    assert stages.seen[-1][1] == CptSettings(data=("d",), num_steps=5, model="mine", learning_rate=1e-4, curriculum="paper", output_dir=Path("out"))


def test_tune_in_several_processes_is_refused(stages: Stages, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused(["tune", "--stage", "cpt"], capsys).startswith("A search runs in one process, torchrun started several")


@pytest.mark.parametrize(("problems", "status"), [([], 0), (["The decoder is not trained."], 1)])
def test_doctor_tells_and_its_exit_status_too(problems: list[str], status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    asked: dict[str, Any] = {}

    def doctor(model: Any, batches: Any, **options: Any) -> dict[str, Any]:
        asked.update(options, batches=batches)
        return {"losses": [1.0, float("nan")], "problems": problems}

    monkeypatch.setattr("refrag.training.fit.build_model", lambda settings: torch.nn.Linear(1, 1))
    monkeypatch.setattr(commands, "_doctor_batches", lambda model, settings, stage: ([stage, settings.data], {"rows": 3}))
    monkeypatch.setattr("refrag.training.doctor.doctor", doctor)
    monkeypatch.setattr("refrag.training.doctor.render", lambda report: "All of it.")
    command = ["doctor", "--data", "d", "--stage", "sft", "--steps", "2", "--precisions", "fp32", "bf16", "--set", "learning_rate=1e-3"]
    assert main(command) == status
    assert capsys.readouterr().out == "All of it.\n"
    assert asked == {"steps": 2, "learning_rate": 1e-3, "precisions": ("fp32", "bf16"), "texts": {"rows": 3}, "batches": ["sft", ("d",)]}
    assert main([*command, "--json"]) == status
    assert json.loads(capsys.readouterr().out) == {"losses": [1.0, None], "problems": problems}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tune", "--stage", "cpt", "--search", "learning_rat=1,2"], "did you mean learning_rate?"),
        (["tune", "--stage", "cpt", "--sampler", "grid", "--search", "learning_rate=1e-5..1e-3"], "A grid needs values, learning_rate has a range"),
        (["tune", "--stage", "cpt", "--set", "seed"], "--set takes NAME=VALUE, was 'seed'"),
        (["tune", "--stage", "cpt", "--trials", "0"], "trials must be 1 or more, was 0"),
        (["doctor"], "There is nothing to look at: name files, folders or data sets with --data."),
        (["doctor", "--data", "d", "--set", "learning_rat=1"], "did you mean learning_rate?"),
        (["train", "cpt", "--num-steps", "0"], "A run must take one optimizer step or more, --num-steps was 0"),
        (["train", "cpt", "--warmup", "20", "--num-steps", "10"], "Warm-up must not be longer than training"),
        (["train", "all", "--config", "missing.yaml"], "There is no settings file missing.yaml: check --config."),
    ],
)
def test_one_sentence_and_exit_2(arguments: list[str], sentence: str, stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in refused(arguments, capsys)
    assert stages.seen == [] and list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["train", "cpt", "--learning-rat", "3"], "--learning-rate"),
        (["train", "cpd"], "cpt"),
        (["train", "cpt", "--schedule", "cosin"], "cosine"),
        (["train", "cpt", "--batch-size", "many"], "--batch-size"),
        (["tune", "--stage", "cpt", "--sampler", "gird"], "grid"),
        (["doctor", "--dta", "x"], "--data"),
    ],
)
def test_unknown_words_exit_with_2_and_the_nearest_name(arguments: list[str], nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert nearest in refused(arguments, capsys)


@pytest.mark.parametrize("command", [["train"], ["train", "cpt"], ["train", "all"], ["tune"], ["doctor"]])
def test_help_is_data(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    said = capsys.readouterr()
    assert (end.value.code, said.err) == (0, "")
    assert said.out.startswith(" ".join(["usage: refrag", *command]))


def test_every_setting_has_a_flag_and_words(capsys: pytest.CaptureFixture[str]) -> None:
    for stage, settings in (("cpt", CptSettings()), ("policy", PolicySettings())):
        with pytest.raises(SystemExit):
            main(["train", stage, "--help"])
        shown = capsys.readouterr().out
        assert [name for name in settings_values(settings) if f"--{name.replace('_', '-')}" not in shown] == []


def test_settings_and_help_are_there_without_torch() -> None:
    code = (
        "import sys\nfrom refrag.cli import main\nfrom refrag.training import pipeline, report, tune\n"
        "try: main(['train', 'cpt', '--help'])\nexcept SystemExit as end: assert not end.code, end.code\n"
        "heavy = 'torch', 'transformers', 'optuna', 'matplotlib', 'yaml', 'datasets'\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stderr.strip() == "[]"
