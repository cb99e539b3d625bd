"""A search for good settings of a stage with Optuna: each trial is a run of the stage in a folder of its own. Without torch.

The study is a file of JSON lines (Optuna's journal) that knows every trial; the same call after an interruption goes on, the interrupted trial first and from
its own checkpoint. One process at a time may work on a study.
"""

import gc
import itertools
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..config import check_whole
from ..errors import InputError, MismatchError, MissingExtraError, NotFoundError, RefragError, missing_extra
from .pipeline import RunStage, read_word, settings_values
from .settings import BEST_LINK, MODEL_FOLDER, WITHOUT_EFFECT, TrainSettings

logger = logging.getLogger(__name__)

TPE_TRIALS = 20
"""Trials of the sampler tpe where no number is given."""
EVALUATED = ("data", "eval_data", "eval_fraction", "eval_rows", "text_field", "short_documents", "chunk_size", "max_chunks", "output_tokens", "context_tokens", "num_passages", "max_answer_tokens")
"""Settings that change what is evaluated: losses with other values cannot be compared."""
FORM = "NAME=VALUE,VALUE or NAME=LOW..HIGH or NAME=LOW..HIGH/POINTS"


@dataclass(frozen=True)
class TuneSettings:
    """What is searched, and how."""

    search: tuple[str, ...] = ("learning_rate=1e-5..1e-3/5",)
    """NAME=VALUE,VALUE or NAME=LOW..HIGH or NAME=LOW..HIGH/POINTS for each setting; a range of ten times or more is searched by its logarithm."""
    sampler: Literal["grid", "tpe"] = "tpe"
    """grid: every combination, in order; tpe: where results were good so far."""
    trials: int | None = None
    """Trials in the study, those of earlier calls included; None: 20, or the whole grid."""
    study: Path | None = None
    """File of the study, with which the same command goes on; None: study.jsonl in --output-dir."""
    metric: str = "eval_loss"
    """Entry of the stage's result to be judged by."""
    goal: Literal["min", "max"] = "min"
    """Whether less or more of it is better."""
    keep: Literal["best", "all"] = "best"
    """Whose weights stay on the disk: best: the best trial's so far; all: every trial's. Logs and results stay in any case."""

    def __post_init__(self) -> None:
        if self.trials is not None:
            check_whole("trials", self.trials, minimum=1)
        if not self.search:
            raise InputError(f"Nothing is searched: give  --search {FORM}")


@dataclass(frozen=True)
class Dimension:
    """The values that a setting is tried with: words, or all numbers of a range."""

    name: str
    words: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False

    @property
    def log(self) -> bool:
        """Whether the range is searched by its logarithm."""
        return self.low > 0 and self.high >= 10 * self.low


def parse_search(stage: str, search: Sequence[str]) -> list[Dimension]:
    """The dimensions of a search space. Raises InputError for a setting that the stage does not have, and values that it does not take."""
    found = {}
    for text in search:
        name, equals, spec = text.partition("=")
        name = name.replace("-", "_")
        if not equals or not spec:
            raise InputError(f"--search takes {FORM}, was {text!r}: write for example  --search batch_size=4,8")
        if name in WITHOUT_EFFECT:
            raise InputError(f"{name} changes nothing that could be judged: search another setting.")
        if name in EVALUATED or (stage == "policy" and name == "expand_fractions"):
            raise InputError(f"{name} changes what is evaluated, so that results could not be compared: search another setting.")
        if name in found:
            raise InputError(f"{name} stands twice in --search: give all its values at once.")
        found[name] = _range(stage, name, spec) if ".." in spec else _values(stage, name, spec.split(","))
    return list(found.values())


def _values(stage: str, name: str, words: Sequence[str]) -> Dimension:
    for word in words:
        read_word(stage, name, word, f"--search {name}={','.join(words)}")
    return Dimension(name, tuple(dict.fromkeys(words)))


def _range(stage: str, name: str, spec: str) -> Dimension:
    """LOW..HIGH, or LOW..HIGH/POINTS as its points, evenly spaced, ends included."""
    span, _, points = spec.partition("/")
    low, high = (read_word(stage, name, end, f"--search {name}={spec}") for end in span.split("..", 1))
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    if not numbers or not low < high or (points and not (points.isdigit() and int(points) > 1)):
        raise InputError(f"A range is two numbers, the lower one first, and perhaps 2 points or more; {name} was {spec}: write {FORM}.")
    whole = Dimension(name, low=float(low), high=float(high), whole=isinstance(low, int))
    if not points:
        return whole
    shares = [place / (int(points) - 1) for place in range(int(points))]
    values = [low * (high / low) ** share if whole.log else low + (high - low) * share for share in shares]
    return Dimension(name, tuple(dict.fromkeys(f"{round(value)}" if whole.whole else f"{value:.6g}" for value in values)))


def tune(run: RunStage, settings: TrainSettings, *, stage: str, search: TuneSettings) -> dict[str, Any]:
    """Run trials of a stage into output_dir/trial-N until the study has enough; write the best settings to output_dir/best.json.

    A trial whose settings are refused, whose loss is not finite or whose memory does not suffice is `pruned`, one that fails otherwise is
    `failed`, both with the reason. Returns {"finished", "metric", "best_trial", "value", "settings": those searched, "config": best.json,
    "trials": [{"trial", "state", "value", "settings", "reason"?}]}; `finished` is False when a trial was told to stop.

    Raises InputError for a search that cannot be made, a study of another search, a metric that the result does not have, and when no
    trial gave a value; NotFoundError, MismatchError and MissingExtraError as the stage does; MissingExtraError without optuna.
    """
    space = parse_search(stage, search.search)
    endless = [one.name for one in space if not one.words]
    if search.sampler == "grid" and endless:
        raise InputError(f"A grid needs values, {endless[0]} has a range: write  {endless[0]}=LOW..HIGH/POINTS  or its values, or pass --sampler tpe.")
    study = _open(settings, stage=stage, search=search)
    limit = search.trials or TPE_TRIALS
    if search.sampler == "grid":
        size = math.prod(len(one.words) for one in space)
        limit = min(search.trials or size, size)
    tuning = _Tuning(run, settings, stage, search.metric, search.keep, study)
    while (trial := _next_trial(study, space, search.sampler, limit)) is not None:
        if not tuning.run_trial(trial, _suggest(trial, space)):
            return {"finished": False, "metric": search.metric, "trials": _rows(study)}
    return tuning.best()


# ── the study ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise missing_extra("optuna", "tune", "refrag tune") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _open(settings: TrainSettings, *, stage: str, search: TuneSettings) -> Any:
    """The study in its file, new or as it was left. Raises InputError when the file holds another search, or something else."""
    optuna = _import_optuna()
    path = search.study or settings.output_dir / "study.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    _mend(path)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    study = optuna.create_study(study_name="refrag", storage=storage, direction=f"{search.goal}imize", load_if_exists=True)
    about = {"stage": stage, "search": sorted(search.search), "metric": search.metric, "goal": search.goal, "settings": _base(settings)}
    known = study.user_attrs.get("refrag")
    if known is None or not any(trial.value is not None for trial in study.trials):  # nothing was judged yet
        study.set_user_attr("refrag", about)
    elif known != about:
        other = next(name for name in about if known.get(name) != about[name])
        raise InputError(f"{path} holds a study with another {other} ({_difference(known.get(other), about[other])}): choose another --study.")
    count = len(study.trials)  # the seed moves on, so that a study that goes on draws new values
    study.sampler = optuna.samplers.TPESampler(seed=settings.seed + count, n_startup_trials=5)
    return study


def _mend(path: Path) -> None:
    """Take away a last line that was cut short when a process was killed. Raises InputError for a file that is no study."""
    if not path.exists() or not path.stat().st_size:
        return
    content = path.read_bytes()
    whole, _, cut = content.rpartition(b"\n")
    try:
        for line in whole.splitlines():
            json.loads(line)["op_code"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not a study, or a damaged one: choose another --study.") from error
    if cut and whole:
        path.write_bytes(whole + b"\n")
    elif cut:
        raise InputError(f"{path} is not a study, or a damaged one: choose another --study.")


def _base(settings: TrainSettings) -> dict[str, Any]:
    """The settings that all trials share, as JSON."""
    return {name: value for name, value in settings_values(settings).items() if name not in ("output_dir", "dry_run")}


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, Mapping):
        name = next(name for name in now if before.get(name) != now[name])
        return f"{name} was {before.get(name)}, is {now[name]}"
    return f"was {before}, is {now}"


def _next_trial(study: Any, space: Sequence[Dimension], sampler: str, limit: int) -> Any:
    """An interrupted trial, else a new one; None when there are enough."""
    from optuna.trial import Trial, TrialState

    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    if running:
        return Trial(study, running[0]._trial_id)
    started = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]
    if len(started) >= limit:
        return None
    if sampler == "grid":
        tried = [trial.params or trial.system_attrs.get("fixed_params") for trial in study.get_trials(deepcopy=False)]
        combinations = (dict(zip((one.name for one in space), words, strict=True)) for words in itertools.product(*(one.words for one in space)))
        following = next((words for words in combinations if words not in tried), None)
        if following is not None:
            study.enqueue_trial(following)
    return study.ask()


def _suggest(trial: Any, space: Sequence[Dimension]) -> dict[str, Any]:
    """The trial's value, or word, for every dimension: what it has already, else what the sampler draws."""
    drawn = {}
    for one in space:
        if one.words:
            drawn[one.name] = trial.suggest_categorical(one.name, list(one.words))
        elif one.whole:
            drawn[one.name] = trial.suggest_int(one.name, int(one.low), int(one.high), log=one.log)
        else:
            drawn[one.name] = trial.suggest_float(one.name, one.low, one.high, log=one.log)
    return drawn


# ── a trial ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Tuning:
    """What every trial has in common."""

    run: RunStage
    settings: TrainSettings
    stage: str
    metric: str
    keep: str
    study: Any

    def drawn(self, words: Mapping[str, Any]) -> TrainSettings:
        """The settings with those of a trial. Raises InputError when they do not go together."""
        values = {name: read_word(self.stage, name, word, "--search") if isinstance(word, str) else word for name, word in words.items()}
        return replace(self.settings, **values)

    def run_trial(self, trial: Any, words: dict[str, Any]) -> bool:
        """Run one trial and tell the study; False when it was told to stop, and is still to be finished."""
        if (same := self._same(trial, words)) is not None:
            self._tell(trial, same.value, reason=f"same settings as trial {same.number}, not run again")
            return True
        logger.info("trial %d: %s", trial.number, ", ".join(f"{name} {word}" for name, word in words.items()))
        try:
            result = self.run(self.stage, replace(self.drawn(words), output_dir=self._folder(trial)))
        except (RefragError, RuntimeError, MemoryError) as error:
            if not _is_of_the_trial(error):
                raise
            by_settings = isinstance(error, FloatingPointError | InputError) or not isinstance(error, RefragError)
            self._tell(trial, None, reason=str(error) or "out of memory", failed=not by_settings)
            return True
        finally:
            gc.collect()
        if result.get("finished") is False:
            return False
        self._judge(trial, result)
        return True

    def _folder(self, trial: Any) -> Path:
        return self.settings.output_dir / f"trial-{trial.number}"

    def _same(self, trial: Any, words: Mapping[str, Any]) -> Any:
        """A trial with these settings that has an outcome, good or bad."""
        others = (one for one in self.study.get_trials(deepcopy=False) if one.number != trial.number and one.params == words)
        return next((one for one in others if one.state.name in ("COMPLETE", "PRUNED")), None)

    def _judge(self, trial: Any, result: Mapping[str, Any]) -> None:
        value = result.get(self.metric)
        numbers = [name for name, other in result.items() if isinstance(other, int | float) and not isinstance(other, bool)]
        if self.metric not in numbers:
            self._tell(trial, None, reason=f"no {self.metric}", failed=True)
            raise InputError(
                f"The stage's result has no {self.metric!r} to judge by, it has {', '.join(numbers)}: pass one of these as --metric with another "
                "--study, or hold out data with --eval-fraction or --eval-data."
            )
        assert isinstance(value, int | float)
        self._tell(trial, float(value) if math.isfinite(value) else None, reason="" if math.isfinite(value) else f"{self.metric} was {value}")

    def _tell(self, trial: Any, value: float | None, *, reason: str = "", failed: bool = False) -> None:
        from optuna.trial import TrialState

        if reason:
            trial.set_user_attr("reason", reason)
            logger.info("trial %d: %s", trial.number, reason)
        if value is None:
            self.study.tell(trial, state=TrialState.FAIL if failed else TrialState.PRUNED)
        else:
            self.study.tell(trial, value)
            logger.info("trial %d: %s %.6g, best %.6g", trial.number, self.metric, value, self.study.best_value)
        if self.keep == "best":
            self._drop_weights()

    def _drop_weights(self) -> None:
        """The models and checkpoints of trials that are over and not the best so far go; their logs and results stay."""
        over = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]
        best = self.study.best_trial.number if any(trial.value is not None for trial in over) else None
        for trial in over:
            if trial.number != best:
                (self._folder(trial) / BEST_LINK).unlink(missing_ok=True)
                for weights in (self._folder(trial) / MODEL_FOLDER, *self._folder(trial).glob("checkpoint-*")):
                    shutil.rmtree(weights, ignore_errors=True)

    def best(self) -> dict[str, Any]:
        """Write best.json; returns the outcome of the search. Raises InputError when no trial gave a value."""
        rows = _rows(self.study)
        if not any(row["state"] == "complete" for row in rows):
            raise InputError(f"No trial gave a value for {self.metric}; the last one says: {rows[-1].get('reason', 'nothing')}")
        trial = self.study.best_trial
        values = _base(self.drawn(trial.params))
        path = self.settings.output_dir / "best.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"stage": self.stage} | values, indent=1) + "\n", encoding="utf-8")
        found = {"best_trial": trial.number, "value": trial.value, "settings": {name: values[name] for name in trial.params}, "config": str(path)}
        return {"finished": True, "metric": self.metric} | found | {"trials": rows}


def _is_of_the_trial(error: Exception) -> bool:
    """Whether another trial may fare better; not so for what is missing, does not belong together, or has no room on the disk."""
    if isinstance(error, RefragError):
        return not isinstance(error, NotFoundError | MismatchError | MissingExtraError) and "disk is full" not in str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _rows(study: Any) -> list[dict[str, Any]]:
    """Every trial, for people and programs."""
    states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "interrupted", "WAITING": "waiting"}
    rows = []
    for trial in study.get_trials(deepcopy=False):
        row = {"trial": trial.number, "state": states[trial.state.name], "value": trial.value, "settings": dict(trial.params)}
        rows.append(row | {"reason": trial.user_attrs["reason"]} if "reason" in trial.user_attrs else row)
    return rows
