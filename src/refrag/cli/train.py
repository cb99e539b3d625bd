"""`refrag train`, `tune` and `doctor`."""

import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import FlagCreatePairsOff, UseAppendAction, arg, subcommand

from ..data.sources import holds_questions
from ..errors import InputError, NotFoundError, RefragError
from ..training.pipeline import (
    STAGES,
    check_values,
    make_settings,
    read_pipeline,
    read_settings,
    read_word,
    run_pipeline,
    run_stage,
    settings_values,
)
from ..training.settings import CptSettings, PolicySettings, ReconstructionSettings, SftSettings, TrainSettings
from ..training.tune import TuneSettings
from .options import AsJson, Messages

logger = logging.getLogger(__name__)

STOPPED = 143
"""Exit status of a run that saved and ended because of SIGTERM."""
Plain = Annotated[Messages, FlagCreatePairsOff]
Config = Annotated[Path | None, arg(metavar="FILE")]
Changes = Annotated[UseAppendAction[tuple[str, ...]], arg(name="set", metavar="NAME=VALUE")]


# ── one stage ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """A stage's command. `with_config` has put the settings of the file before those of the command line."""

    messages: Plain
    config: Config = None
    """JSON or YAML file of settings, all of which have a flag here; flags win over the file."""

    def _run(self, stage: str, settings: TrainSettings) -> int:
        console = _console(self.messages)
        result = run_stage(stage, settings)
        if settings.dry_run:
            console.print(_listed(settings_values(settings)), markup=False)
        elif result.get("finished"):
            _report(stage, settings, console)
        return _end(result)


@dataclass(frozen=True, kw_only=True)
class TrainReconstruction(_Stage):
    """Stage 1, reconstruction: chunk vectors in, the text they stand for out; the decoder is frozen."""

    settings: ReconstructionSettings

    def run(self) -> int:
        """Train, write the report, print the result."""
        return self._run("reconstruction", self.settings)


@dataclass(frozen=True, kw_only=True)
class TrainCpt(_Stage):
    """Stage 2, continual pre-training: the text after a compressed context; then with some chunks left as tokens."""

    settings: CptSettings

    def run(self) -> int:
        """Train, write the report, print the result."""
        return self._run("cpt", self.settings)


@dataclass(frozen=True, kw_only=True)
class TrainSft(_Stage):
    """Stage 3, fine-tuning on questions with passages."""

    settings: SftSettings

    def run(self) -> int:
        """Train, write the report, print the result."""
        return self._run("sft", self.settings)


@dataclass(frozen=True, kw_only=True)
class TrainPolicy(_Stage):
    """Stage 4, the policy: which chunks to expand; all else is frozen."""

    settings: PolicySettings

    def run(self) -> int:
        """Train, write the report, print the result."""
        return self._run("policy", self.settings)


# ── all stages ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class TrainAll:
    """Run all stages of a file in order, each from the model of the one before; what is done is skipped, what changed is refused.

    The file (JSON or YAML) has a section for each stage to run, and beside them the settings that stages share.
    """

    config: Annotated[Path, arg(metavar="FILE")]
    """File of the stages' settings."""
    changes: Changes = ()
    """A setting that wins over the file, of all stages that have it, or of one as STAGE.NAME=VALUE; may be given several times."""
    output_dir: Path | None = None
    """Folder of the stages' folders, instead of the file's."""
    dry_run: bool = False
    """Resolve and print every setting of every stage, then stop."""
    messages: Plain

    def run(self) -> int:
        """Everything happens in refrag.training.pipeline."""
        stages = read_pipeline(self.config, changes=self.changes, output_dir=self.output_dir, dry_run=self.dry_run)
        console = _console(self.messages)
        result = run_pipeline(stages, run=run_stage, after=lambda stage, settings, _: _report(stage, settings, console))
        for stage, settings in stages.items() if self.dry_run else ():
            console.print(f"\n{stage}\n{_listed(settings_values(settings))}", markup=False)
        roots = {settings.output_dir.parent for settings in stages.values()}
        if result["finished"] and len(roots) == 1 and len(stages) > 1:
            _write_report(roots.pop(), console)
        return _end(result, dry_run=self.dry_run)


@dataclass(frozen=True)
class Train:
    """Train a model: one stage, or all of a file."""

    command: (
        Annotated[TrainReconstruction, subcommand("reconstruction")]
        | Annotated[TrainCpt, subcommand("cpt")]
        | Annotated[TrainSft, subcommand("sft")]
        | Annotated[TrainPolicy, subcommand("policy")]
        | Annotated[TrainAll, subcommand("all"), FlagCreatePairsOff]
    )

    def run(self) -> int:
        """Run the command."""
        return self.command.run()


# ── settings for a search or an examination ──────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """Settings of the stage; all others come from --config and --set."""

    config: Config = None
    """JSON or YAML file of the stage's settings, such as its settings.json."""
    changes: Changes = ()
    """A setting that wins over the file, such as  --set num_steps=200 ; may be given several times."""
    model: str | None = None
    """REFRAG model to start from: a folder, a hub name, or `bundled`."""
    encoder: str | None = None
    """Instead of --model: pretrained encoder, a folder or hub name."""
    decoder: str | None = None
    """Instead of --model: pretrained decoder, a folder or hub name."""
    data: tuple[str, ...] = ()
    """Files and folders, saved data sets, or names on the Hugging Face hub."""

    def likely_stage(self) -> str:
        """The stage that the file names; else sft for questions, cpt for texts."""
        values = {} if self.config is None else read_settings(self.config)
        if values.get("stage") in ("reconstruction", "cpt", "sft"):
            return str(values["stage"])
        data = self.data or values.get("data") or ()
        try:
            return "sft" if data and holds_questions([data] if isinstance(data, str) else [*map(str, data)]) else "cpt"
        except (InputError, NotFoundError):  # which the stage will say
            return "cpt"

    def read(self, stage: str, output_dir: Path | None = None) -> TrainSettings:
        """The stage's settings. Raises InputError as the file and the settings do."""
        values = {} if self.config is None else check_values(stage, read_settings(self.config), str(self.config))
        given = {name: getattr(self, name) for name in ("model", "encoder", "decoder", "data") if getattr(self, name)}
        given |= {} if output_dir is None else {"output_dir": output_dir}
        if given.keys() & {"model", "encoder", "decoder"}:
            values = {name: value for name, value in values.items() if name not in ("model", "encoder", "decoder")}
        for change in self.changes:
            name, equals, word = change.partition("=")
            if not equals:
                raise InputError(f"--set takes NAME=VALUE, was {change!r}: write for example  --set num_steps=200")
            given[name.replace("-", "_")] = read_word(stage, name.replace("-", "_"), word, f"--set {change}")
        return make_settings(stage, values | given, str(self.config or "the command"))


@dataclass(frozen=True, kw_only=True)
class Tune:
    """Search for settings of a stage with Optuna, each trial in a folder of its own. The same command goes on after an interruption.

    Ends with the best settings, which are also in best.json in the output folder, for  refrag train STAGE --config .
    """

    stage: Literal["reconstruction", "cpt", "sft", "policy"]
    """Stage to run."""
    settings: StageSettings
    search: TuneSettings
    output_dir: Path | None = None
    """Folder of the trials, and of best.json."""
    messages: Plain

    def run(self) -> int:
        """Everything happens in refrag.training.tune."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("A search runs in one process, torchrun started several: run refrag tune without it.")
        settings = self.settings.read(self.stage, self.output_dir)
        console = _console(self.messages)
        from ..training.tune import tune

        result = tune(run_stage, settings, stage=self.stage, search=self.search)
        for row in result["trials"]:
            value = row["state"] if row["value"] is None else f"{row['value']:.6g}"
            words = ", ".join(f"{name} {word}" for name, word in row["settings"].items())
            console.print(f"trial {row['trial']:<4} {value:<12} {words}  {row.get('reason', '')}".rstrip(), markup=False)
        return _end(result)


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Train a few steps in fp32, bf16 and fp16 on a copy of the model: what is not finite, out of scale or not learning, and what to do.

    Exit status 1 when something is wrong.
    """

    stage: Literal["reconstruction", "cpt", "sft"] | None = None
    """Stage whose batches and trained parts are looked at; by default sft for questions, cpt for texts."""
    settings: StageSettings
    steps: int = 3
    """Optimizer steps in each precision."""
    precisions: tuple[Literal["fp32", "bf16", "fp16", "fp16-weights", "bf16-weights"], ...] = ("fp32", "bf16", "fp16")
    """Precisions to try; those with -weights train without float32 weights."""
    messages: Plain
    as_json: AsJson = False
    """Print one JSON object instead of tables."""

    def run(self) -> int:
        """Everything happens in refrag.training.doctor."""
        stage = self.stage or self.settings.likely_stage()
        settings = self.settings.read(stage)
        if not settings.data:
            raise InputError("There is nothing to look at: name files, folders or data sets with --data.")
        if settings.streaming:
            raise InputError("doctor takes batches from the beginning, middle and end of the data, a stream has none: leave --set streaming=true out.")
        _console(self.messages)
        from ..encoder import resolve_device
        from ..training.doctor import doctor, render
        from ..training.fit import build_model

        model = build_model(settings).to(resolve_device(settings.device))
        batches, texts = _doctor_batches(model, settings, stage)
        report = doctor(model, batches, steps=self.steps, learning_rate=settings.learning_rate, precisions=self.precisions, texts=texts)
        print(_json(report) if self.as_json else render(report))
        return 1 if report["problems"] else 0


def _doctor_batches(model: Any, settings: TrainSettings, stage: str) -> tuple[list[Any], dict[str, Any]]:
    """Three micro-batches of the stage, from its beginning, middle and end, and what became of its rows.

    What the stage does not train is frozen in `model`.
    """
    from importlib import import_module

    data = import_module(f"refrag.training.{stage}").prepare(model, replace(settings, num_steps=settings.num_steps or 3, warmup=0.0))
    last, texts = len(data.train) - 1, dict(data.counts)
    if texts.get("dropped_documents"):
        texts["too_short"] = texts.pop("dropped_documents")
    return [data.train[place] for place in dict.fromkeys((0, last // 2, last))], texts


# ── a file before the flags ──────────────────────────────────────────────────────────────────────────────────────────


def with_config(args: Sequence[str]) -> list[str]:
    """`train STAGE --config FILE …` with the file's settings as flags before the others, so that those win.

    Raises NotFoundError and InputError for a file that cannot be used.
    """
    args = list(args)
    if args[:1] != ["train"] or args[1:2] == [] or args[1] not in STAGES or {"-h", "--help"} & set(args):
        return args
    path = _value_of("--config", args)
    if path is None:
        return args
    values = read_settings(Path(path))
    if values.keys() & set(STAGES):
        raise InputError(f"{path} has sections for stages: run  refrag train all --config {path}")
    flags = [flag for name, value in check_values(args[1], values, path).items() for flag in _flags(name, value)]
    starts = {"--model": {"--encoder", "--decoder"}, "--encoder": {"--model"}, "--decoder": {"--model"}}
    replaced = {name for start, others in starts.items() if _value_of(start, args) is not None for name in others}
    return [*args[:2], *(flag for flag in flags if flag.split("=", 1)[0] not in replaced), *args[2:]]


def _value_of(flag: str, args: Sequence[str]) -> str | None:
    """The last value given for a flag."""
    found = None
    for word, following in zip(args, [*args[1:], None], strict=True):
        if word == flag:
            found = following
        elif word.startswith(f"{flag}="):
            found = word.split("=", 1)[1]
    return found


def _flags(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, tuple):
        return [f"--{flag}", *map(str, value)]
    return [f"--{flag}={value}"]


# ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_first() -> bool:
    """Whether this is the process that speaks and writes, of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _console(messages: Messages) -> Console:
    return (messages if _is_first() else replace(messages, quiet=True)).console()


def _listed(values: dict[str, Any]) -> str:
    width = max(map(len, values))
    return "\n".join(f"{name:<{width}}  {value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items())


def _report(stage: str, settings: TrainSettings, console: Console) -> None:
    """The stage's table, and report.html and curves.png beside its log."""
    if not _is_first():
        return
    from ..training.report import read_log, render_table, stage_table

    try:
        table = render_table(stage_table(read_log(settings.output_dir)))
    except RefragError as error:
        logger.warning("no table: %s", error)
        return
    console.print(f"{stage}\n{table}", markup=False)
    _write_report(settings.output_dir, console)


def _write_report(folder: Path, console: Console) -> None:
    """A report that cannot be written is a warning: the training is done, and must not fail for it."""
    from ..training.report import write_report

    try:
        if _is_first():
            console.print(f"report: {write_report(folder)}", markup=False)
    except (RefragError, OSError) as error:
        logger.warning("no report: %s", error)


def _end(result: dict[str, Any], *, dry_run: bool = False) -> int:
    """The result as the last line on stdout; the exit status."""
    if _is_first():
        sys.stderr.flush()
        print(_json(result))
    return STOPPED if result.get("finished") is False and not dry_run else 0


def _json(values: dict[str, Any]) -> str:
    """One line; numbers that are not finite, which JSON has not, are null."""
    return json.dumps(_finite(values), ensure_ascii=False, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
