"""The search for settings: its space, its outcomes, and that it goes on; the stage is a function of its settings."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refrag.errors import InputError, MissingExtraError, NotFoundError
from refrag.training.pipeline import check_values, read_settings
from refrag.training.settings import CptSettings
from refrag.training.trainer import NonFiniteLossError
from refrag.training.tune import Dimension, TuneSettings, parse_search, tune

GRID = ("learning_rate=1e-4,1e-3", "curriculum=paper,none", "batch_size=2")
VALUES = {(1e-4, "paper"): 3.0, (1e-4, "none"): 2.0, (1e-3, "paper"): 1.5, (1e-3, "none"): 4.0}


class Stage:
    """Stands for a stage: its loss is a function of the settings; remembers what it was run with."""

    def __init__(self, loss: Callable[[Any], float] | None = None) -> None:
        self.loss = loss or (lambda settings: VALUES[settings.learning_rate, settings.curriculum])
        self.seen: list[CptSettings] = []

    def __call__(self, stage: str, settings: Any) -> dict[str, Any]:
        self.seen.append(settings)
        return {"stage": stage, "finished": True, "eval_loss": self.loss(settings)}


def search(**changes: Any) -> TuneSettings:
    return replace(TuneSettings(search=GRID, sampler="grid"), **changes)


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection between trials walks all of torch: longer than these trials."""
    monkeypatch.setattr("refrag.training.tune.gc.collect", lambda: 0)


@pytest.fixture
def settings(tmp_path: Path) -> CptSettings:
    return CptSettings(data=("documents.jsonl",), output_dir=tmp_path / "tune", num_steps=5)


# ── the space ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_values_ranges_and_points() -> None:
    space = parse_search("cpt", ["batch-size=4,8,4", "learning_rate=1e-5..1e-3", "seed=1..3", "warmup=0..0.1/3", "gradient_accumulation_steps=1..16/3"])
    assert space == [
        Dimension("batch_size", ("4", "8")),
        Dimension("learning_rate", low=1e-5, high=1e-3),
        Dimension("seed", low=1.0, high=3.0, whole=True),
        Dimension("warmup", ("0", "0.05", "0.1")),
        Dimension("gradient_accumulation_steps", ("1", "4", "16")),
    ]
    assert [one.log for one in space] == [False, True, False, False, False]
    assert parse_search("cpt", ["learning_rate=1e-5..1e-3/3"])[0].words == ("1e-05", "0.0001", "0.001")


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("learning_rate", "--search takes NAME=VALUE,VALUE or NAME=LOW..HIGH or NAME=LOW..HIGH/POINTS, was 'learning_rate': write for example"),
        ("learning_rat=1", "did you mean learning_rate?"),
        ("max_chunks=2,8", "max_chunks changes what is evaluated, so that results could not be compared: search another setting"),
        ("batch_size=4,many", "batch_size must be a whole number, was \"many\" in --search batch_size=4,many"),
        ("curriculum=paper,papers", "curriculum must be one of paper, prototype, none"),
        ("learning_rate=1e-3..1e-5", "A range is two numbers, the lower one first, and perhaps 2 points or more; learning_rate was 1e-3..1e-5"),
        ("learning_rate=1e-5..1e-3/1", "perhaps 2 points or more"),
        ("curriculum=none..paper", "A range is two numbers"),
    ],
)
def test_a_space_that_cannot_be_searched(word: str, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        parse_search("cpt", [word])
    assert sentence in str(error.value)


def test_a_setting_stands_once() -> None:
    with pytest.raises(InputError, match="seed stands twice in --search"):
        parse_search("cpt", ["seed=1", "seed=2"])


def test_a_grid_needs_values(settings: CptSettings) -> None:
    with pytest.raises(InputError, match=r"A grid needs values, learning_rate has a range: write  learning_rate=LOW..HIGH/POINTS"):
        tune(Stage(), settings, stage="cpt", search=search(search=("learning_rate=1e-5..1e-3",)))


@pytest.mark.parametrize(("changes", "sentence"), [({"trials": 0}, "trials must be 1 or more"), ({"search": ()}, "Nothing is searched")])
def test_settings_of_a_search(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        search(**changes)


# ── outcomes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("keep", "left"), [("best", [2]), ("all", [0, 1, 2, 3])])
def test_the_best_trial_keeps_its_weights_and_every_trial_its_log(settings: CptSettings, keep: Any, left: list[int]) -> None:
    class Weighty(Stage):
        def __call__(self, stage: str, settings: Any) -> dict[str, Any]:
            for name in ("model", "checkpoint-5"):
                (settings.output_dir / name).mkdir(parents=True)
            (settings.output_dir / "best").symlink_to("checkpoint-5")
            (settings.output_dir / "log.jsonl").write_text("{}\n")
            return super().__call__(stage, settings)

    tune(Weighty(), settings, stage="cpt", search=search(keep=keep))
    folders = [settings.output_dir / f"trial-{number}" for number in range(4)]
    assert [number for number, folder in enumerate(folders) if (folder / "model").exists() and (folder / "checkpoint-5").exists()] == left
    assert all((folder / "log.jsonl").exists() for folder in folders)
    assert not any((folder / name).exists() for number, folder in enumerate(folders) if number not in left for name in ("model", "checkpoint-5")) and not any((folder / "best").is_symlink() for number, folder in enumerate(folders) if number not in left)


def test_a_grid_runs_every_combination_in_its_own_folder(settings: CptSettings, tmp_path: Path) -> None:
    stage = Stage()
    found = tune(stage, settings, stage="cpt", search=search())
    assert [(one.learning_rate, one.curriculum, one.batch_size) for one in stage.seen] == [(1e-4, "paper", 2), (1e-4, "none", 2), (1e-3, "paper", 2), (1e-3, "none", 2)]
    assert [one.output_dir for one in stage.seen] == [tmp_path / "tune" / f"trial-{n}" for n in range(4)]
    assert {one.num_steps for one in stage.seen} == {5}
    assert (found["best_trial"], found["value"], found["finished"]) == (2, 1.5, True)
    assert found["settings"] == {"learning_rate": 1e-3, "curriculum": "paper", "batch_size": 2}
    assert [(row["state"], row["value"]) for row in found["trials"]] == [("complete", 3.0), ("complete", 2.0), ("complete", 1.5), ("complete", 4.0)]


def test_the_best_settings_are_a_config_file(settings: CptSettings) -> None:
    found = tune(Stage(), settings, stage="cpt", search=search())
    values = check_values("cpt", read_settings(Path(found["config"])), "best.json")
    best = CptSettings(**values)
    assert best == replace(settings, learning_rate=1e-3, curriculum="paper", batch_size=2, output_dir=CptSettings.output_dir)


def test_more_can_be_better(settings: CptSettings) -> None:
    assert tune(Stage(), settings, stage="cpt", search=search(goal="max"))["value"] == 4.0


def test_another_metric(settings: CptSettings) -> None:
    def stage(name: str, own: Any) -> dict[str, Any]:
        return {"eval_exact_match": 1 / VALUES[own.learning_rate, own.curriculum]}

    found = tune(stage, settings, stage="cpt", search=search(metric="eval_exact_match", goal="max"))
    assert (found["best_trial"], found["value"]) == (2, pytest.approx(1 / 1.5))


def test_tpe_searches_a_range_near_its_best(settings: CptSettings) -> None:
    stage = Stage(lambda own: abs(math.log10(own.learning_rate) + 4) + 0.1 * (own.batch_size != 8))
    wanted = TuneSettings(search=("learning_rate=1e-6..1e-2", "batch_size=4..16"), trials=30)
    found = tune(stage, settings, stage="cpt", search=wanted)
    assert len(stage.seen) == len(found["trials"]) == 30
    assert all(1e-6 <= one.learning_rate <= 1e-2 and 4 <= one.batch_size <= 16 for one in stage.seen)
    assert abs(math.log10(found["settings"]["learning_rate"]) + 4) < 0.5
    late = [abs(math.log10(one.learning_rate) + 4) for one in stage.seen[15:]]
    assert sum(late) / len(late) < 1  # uniform draws: 1.0


def test_the_same_settings_are_not_run_again(settings: CptSettings) -> None:
    stage = Stage(lambda own: own.batch_size)
    found = tune(stage, settings, stage="cpt", search=TuneSettings(search=("batch_size=2,4",), trials=8))
    assert len(stage.seen) == 2
    assert len(found["trials"]) == 8
    repeated = [row for row in found["trials"] if "reason" in row]
    assert len(repeated) == 6
    assert all(row["reason"].startswith("same settings as trial ") and row["value"] == float(row["settings"]["batch_size"]) for row in repeated)
    assert {row["value"] for row in found["trials"]} == {2.0, 4.0}


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (NonFiniteLossError("The loss was nan at step 3."), "pruned"),
        (InputError("The texts are all too short."), "pruned"),
        (OutOfMemoryError("CUDA out of memory."), "pruned"),
    ],
)
def test_a_trial_that_cannot_be_trained_is_recorded_with_the_reason(settings: CptSettings, error: Exception, state: str) -> None:
    def loss(own: Any) -> float:
        if own.learning_rate == 1e-3 and own.curriculum == "paper":
            raise error
        return VALUES[own.learning_rate, own.curriculum]

    found = tune(Stage(loss), settings, stage="cpt", search=search())
    assert found["trials"][2] == {"trial": 2, "state": state, "value": None, "settings": found["trials"][2]["settings"], "reason": str(error)}
    assert (found["best_trial"], found["value"]) == (1, 2.0)


def test_settings_that_do_not_go_together_are_pruned(settings: CptSettings) -> None:
    found = tune(Stage(lambda own: own.warmup), settings, stage="cpt", search=search(search=("warmup=2,50",)))
    assert [row["state"] for row in found["trials"]] == ["complete", "pruned"]
    assert found["trials"][1]["reason"].startswith("Warm-up must not be longer than training, was 50 steps of 5")


def test_a_value_that_is_no_number_is_pruned(settings: CptSettings) -> None:
    found = tune(Stage(lambda own: math.nan if own.curriculum == "paper" else 1.0), settings, stage="cpt", search=search())
    assert [row["state"] for row in found["trials"]] == ["pruned", "complete", "pruned", "complete"]
    assert found["trials"][0]["reason"] == "eval_loss was nan"


@pytest.mark.parametrize("error", [NotFoundError("There is no file documents.jsonl."), InputError("The disk is full: free some space."), RuntimeError("a bug")])
def test_what_no_trial_can_mend_ends_the_search(settings: CptSettings, error: Exception) -> None:
    def loss(own: Any) -> float:
        raise error

    stage = Stage(loss)
    with pytest.raises(type(error), match=str(error)):
        tune(stage, settings, stage="cpt", search=search())
    assert len(stage.seen) == 1


def test_a_metric_that_is_not_there_is_said_after_one_trial(settings: CptSettings) -> None:
    stage = Stage()
    with pytest.raises(InputError, match="The stage's result has no 'eval_los' to judge by, it has eval_loss: pass one of these as --metric"):
        tune(stage, settings, stage="cpt", search=search(metric="eval_los"))
    assert len(stage.seen) == 1


def test_no_trial_with_a_value(settings: CptSettings) -> None:
    def loss(own: Any) -> float:
        raise InputError("The texts are all too short.")

    with pytest.raises(InputError, match=r"No trial gave a value for eval_loss; the last one says: The texts are all too short."):
        tune(Stage(loss), settings, stage="cpt", search=search())


# ── going on ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_an_interrupted_search_goes_on_with_the_same_trial(settings: CptSettings, sampler: Any) -> None:
    words = GRID if sampler == "grid" else ("learning_rate=1e-5..1e-3",)
    wanted = TuneSettings(search=words, sampler=sampler, trials=4)

    def loss(own: Any) -> float:
        if len(stage.seen) == 3:
            raise KeyboardInterrupt
        return own.learning_rate

    stage = Stage(loss)
    with pytest.raises(KeyboardInterrupt):
        tune(stage, settings, stage="cpt", search=wanted)
    again = Stage(lambda own: own.learning_rate)
    found = tune(again, settings, stage="cpt", search=wanted)
    assert again.seen[0] == stage.seen[2]  # the same folder, the same settings
    assert [one.output_dir.name for one in again.seen] == ["trial-2", "trial-3"]
    assert [row["state"] for row in found["trials"]] == ["complete"] * 4
    assert len({(one.learning_rate, one.curriculum) for one in [*stage.seen[:2], *again.seen]}) == 4


def test_a_trial_told_to_stop_ends_the_search_and_is_finished_later(settings: CptSettings) -> None:
    def stopped(name: str, own: Any) -> dict[str, Any]:
        return {"finished": False, "eval_loss": 9.0}

    found = tune(stopped, settings, stage="cpt", search=search())
    assert (found["finished"], [row["state"] for row in found["trials"]]) == (False, ["interrupted"])
    assert [row["value"] for row in tune(Stage(), settings, stage="cpt", search=search())["trials"]] == [3.0, 2.0, 1.5, 4.0]


def test_a_finished_study_runs_nothing_and_grows_when_asked(settings: CptSettings) -> None:
    wanted = TuneSettings(search=("learning_rate=1e-5..1e-3",), trials=3)
    first = tune(Stage(lambda own: own.learning_rate), settings, stage="cpt", search=wanted)
    idle = Stage(lambda own: own.learning_rate)
    assert tune(idle, settings, stage="cpt", search=wanted) == first
    assert idle.seen == []
    more = tune(idle, settings, stage="cpt", search=replace(wanted, trials=5))
    assert more["trials"][:3] == first["trials"]
    assert len({row["settings"]["learning_rate"] for row in more["trials"]}) == 5  # no draw twice


def test_two_studies_with_one_seed_are_the_same(settings: CptSettings) -> None:
    wanted = TuneSettings(search=("learning_rate=1e-5..1e-3",), trials=4)
    first, second = (tune(Stage(lambda own: own.learning_rate), replace(settings, output_dir=settings.output_dir / name), stage="cpt", search=wanted) for name in "ab")
    assert first["trials"] == second["trials"]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"search": ("batch_size=2,4",)}, "another search (was"),
        ({"metric": "train_loss"}, "another metric (was eval_loss, is train_loss)"),
        ({"goal": "max"}, "another goal (was min, is max)"),
    ],
)
def test_a_study_of_another_search_is_refused(settings: CptSettings, changes: dict[str, Any], difference: str) -> None:
    tune(Stage(), settings, stage="cpt", search=search())
    with pytest.raises(InputError) as error:
        tune(Stage(), settings, stage="cpt", search=search(**changes))
    assert difference in str(error.value) and str(error.value).endswith("choose another --study.")


def test_a_study_of_other_settings_is_refused(settings: CptSettings) -> None:
    tune(Stage(), settings, stage="cpt", search=search())
    with pytest.raises(InputError, match=r"holds a study with another settings \(num_steps was 5, is 6\)"):
        tune(Stage(), replace(settings, num_steps=6), stage="cpt", search=search())


@pytest.mark.parametrize("text", ["A few words.", "A few\nwords.\n", '{"learning_rate": 1}\n', "[1]\n"])
def test_a_file_that_is_no_study(settings: CptSettings, tmp_path: Path, text: str) -> None:
    study = tmp_path / "other.jsonl"
    study.write_text(text)
    with pytest.raises(InputError, match=r"other\.jsonl is not a study, or a damaged one: choose another --study."):
        tune(Stage(), settings, stage="cpt", search=search(study=study))
    assert study.read_text() == text


def test_a_line_cut_short_by_a_kill_is_mended(settings: CptSettings) -> None:
    first = tune(Stage(), settings, stage="cpt", search=search(trials=3))
    study = settings.output_dir / "study.jsonl"
    whole = study.read_bytes()
    study.write_bytes(whole + b'{"op_code":4,"wor')
    again = Stage()
    assert tune(again, settings, stage="cpt", search=search())["trials"][:3] == first["trials"]
    assert [one.output_dir.name for one in again.seen] == ["trial-3"]


def test_without_optuna_the_extra_is_named(settings: CptSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"refrag tune needs the package 'optuna': install it with  pip install 'refrag\[tune\]'"):
        tune(Stage(), settings, stage="cpt", search=search())


def test_the_outcome_is_json(settings: CptSettings) -> None:
    found = tune(Stage(), settings, stage="cpt", search=search())
    assert json.loads(json.dumps(found)) == found
