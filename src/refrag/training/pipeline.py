"""Settings from files, and the stages one after the other: what is done is skipped, what changed is refused. Without torch.

A file for one stage is its settings: `{learning_rate: 1e-4, …}`. A file for all stages has a section for each stage to run, in any order,
and beside them the settings that they share; a stage takes those that it has:

    output_dir: runs/mine       # each stage writes to output_dir/STAGE
    encoder: FacebookAI/roberta-large
    decoder: meta-llama/Llama-3.2-3B
    batch_size: 8
    reconstruction: {data: documents.jsonl}
    cpt: {data: documents.jsonl, learning_rate: 5e-5}
    sft: {data: questions.jsonl}

The first stage starts from the shared model, or encoder and decoder; each later one from the model of the stage before, unless its
own section names one. Paths are relative to where the command runs.
"""

import difflib
import json
import logging
import os
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..data.sources import check_files
from ..errors import InputError, MissingExtraError, NotFoundError, missing_extra
from .settings import MODEL_FOLDER, RESULT_FILE, SETTINGS_FILE, STAGE_SETTINGS, WITHOUT_EFFECT, TrainSettings, has_begun

logger = logging.getLogger(__name__)

STAGES = tuple(STAGE_SETTINGS)
START = ("model", "encoder", "decoder")
"""The settings that say where a stage starts."""

LORA, FROZEN = ("lora_rank", "lora_encoder"), ("reconstruction", "policy")
"""Settings that are not shared with the stages that freeze the decoder."""

RunStage = Callable[[str, Any], dict[str, Any]]
"""Runs the stage of this name with these settings; returns its result."""
AfterStage = Callable[[str, TrainSettings, dict[str, Any]], None]


# ── settings from files and words ────────────────────────────────────────────────────────────────────────────────────


def read_settings(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file; hyphens in names are underscores.

    Raises NotFoundError when there is no such file, InputError when it holds something else, MissingExtraError for YAML without pyyaml.
    """
    if not path.is_file():
        raise NotFoundError(f"There is no settings file {path}: check --config.")
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix.lower() == ".json" else _read_yaml(text)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} must be JSON (.json) or YAML, but could not be read ({reason[:200]}): mend the file.") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"{path} must hold settings by name, such as  learning_rate: 1e-4 : mend the file.")
    return {name.replace("-", "_"): value for name, value in values.items()}


def _read_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise missing_extra("pyyaml", "train", "A settings file in YAML") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def check_values(stage: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The same settings in the types of the stage's fields: lists as tuples, paths as Path. `where` says in errors where they come from.

    A `stage` among them, as settings.json has it, must be this one.
    Raises InputError for a setting that the stage does not have, with the nearest name, and for one of the wrong type.
    """
    hints = get_type_hints(STAGE_SETTINGS[stage])
    checked = {}
    if values.get("stage", stage) != stage:
        raise InputError(f"{where} holds the settings of the stage {values['stage']}, not of {stage}: name another file.")
    for name, value in values.items():
        if name == "stage":
            continue
        if name not in hints:
            raise InputError(f"The stage {stage} has no setting {name!r}, which stands in {where}: {_nearest(name, hints, f'refrag train {stage} --help')}")
        try:
            checked[name] = _convert(value, hints[name])
        except TypeError as error:
            raise InputError(f"{name} must be {error}, was {json.dumps(value, default=str)} in {where}: mend it there.") from None
    return checked


def make_settings(stage: str, values: Mapping[str, Any], where: str) -> TrainSettings:
    """The settings of a stage. Raises InputError as `check_values` and the settings themselves do."""
    return STAGE_SETTINGS[stage](**check_values(stage, values, where))


def read_word(stage: str, name: str, word: str, where: str) -> Any:
    """The value of a setting from one word: `1e-4`, `true`, `none`, `a.jsonl,b.jsonl`. Raises InputError as `check_values` does."""
    hint = get_type_hints(STAGE_SETTINGS[stage]).get(name)
    return check_values(stage, {name: _parse(word, hint)}, where)[name]


def settings_values(settings: TrainSettings) -> dict[str, Any]:
    """The settings as JSON holds them: what `make_settings` takes."""
    return {field.name: _plain(getattr(settings, field.name)) for field in fields(settings)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _nearest(name: str, names: Collection[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"see  {otherwise}"


def _options(hint: Any) -> tuple[Any, ...]:
    """The types that a union allows; NoneType last."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(sorted(options, key=lambda option: option is types.NoneType))


def _convert(value: Any, hint: Any) -> Any:
    """The value in the type that the annotation asks for. Raises TypeError with the words for that type."""
    hint, *nothing = _options(hint)
    if value is None and nothing:
        return None
    if get_origin(hint) is tuple:
        return _convert_list([value] if isinstance(value, str) else value, hint)
    if hint is float and isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value):
        value = float(value)  # YAML 1.1 takes 2e-4 for text
    right = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, int | float) and not isinstance(value, bool),
        str: isinstance(value, str),
        Path: isinstance(value, str | Path),
    }
    if not right.get(hint, isinstance(value, str) and value in get_args(hint)):
        raise TypeError(_words(hint))
    return hint(value) if hint in (float, Path) else value


def _convert_list(value: Any, hint: Any) -> tuple[Any, ...]:
    items = get_args(hint)
    size = None if items[-1] is Ellipsis else len(items)
    if not isinstance(value, list | tuple) or size not in (None, len(value)):
        raise TypeError(_words(hint))
    return tuple(_convert(item, items[0]) for item in value)


def _words(hint: Any) -> str:
    """What a type is called in a sentence."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if get_origin(hint) is tuple:
        items = get_args(hint)
        return f"a list of {'' if items[-1] is Ellipsis else f'{len(items)} '}{'numbers' if items[0] in (int, float) else 'texts'}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}[hint]


def _parse(word: str, hint: Any) -> Any:
    """A word as a JSON file would hold it; what is no such value stays a word, and is refused by `_convert`."""
    hint, *nothing = _options(hint)
    if nothing and word.lower() in ("none", "null"):
        return None
    if get_origin(hint) is tuple:
        return [_parse(part, get_args(hint)[0]) for part in word.split(",") if part]
    if hint is bool:
        return {"true": True, "false": False}.get(word.lower(), word)
    if hint in (int, float):
        try:
            return hint(word)
        except ValueError:
            return word
    return word


# ── all stages ───────────────────────────────────────────────────────────────────────────────────────────────────────


def read_pipeline(path: Path, *, changes: Sequence[str] = (), output_dir: Path | None = None, dry_run: bool = False) -> dict[str, TrainSettings]:
    """The settings of every stage that a file has a section for, in the order in which they run.

    `changes` win over the file: `NAME=VALUE` for every stage with that setting, `STAGE.NAME=VALUE` for one.
    Raises InputError for a file without a stage, unknown settings, and values that cannot be used.
    """
    shared = read_settings(path)
    sections = {stage: _section(shared.pop(stage), stage, path) for stage in STAGES if stage in shared}
    if not sections:
        raise InputError(f"{path} must have a section for a stage, it has none of {', '.join(STAGES)}: add one.")
    known = {field.name for stage in sections for field in fields(STAGE_SETTINGS[stage])}
    for name in shared.keys() - known:
        raise InputError(f"No stage in {path} has a setting {name!r}: {_nearest(name, {*known, *STAGES}, 'refrag train STAGE --help')}")
    for_all, for_one = _read_changes(changes, sections)
    root = output_dir or for_all.pop("output_dir", None) or shared.get("output_dir") or TrainSettings.output_dir
    shared.pop("output_dir", None)
    stages: dict[str, TrainSettings] = {}
    for stage, section in sections.items():
        common, changed = (_common(layer, stage, with_start=not stages) for layer in (shared, for_all))
        values = {"output_dir": f"{root}/{stage}"} | _layered(common, section, changed, for_one[stage])
        if stages and not values.keys() & set(START):
            values["model"] = str(list(stages.values())[-1].output_dir / "model")
        stages[stage] = make_settings(stage, values | ({"dry_run": True} if dry_run else {}), str(path))
    return stages


def _common(values: Mapping[str, Any], stage: str, *, with_start: bool) -> dict[str, Any]:
    """The shared settings that a stage has."""
    names = {field.name for field in fields(STAGE_SETTINGS[stage])}.difference(() if with_start else START, LORA if stage in FROZEN else ())
    return {name: value for name, value in values.items() if name in names}


def _layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win; a model replaces encoder and decoder, and the other way round."""
    values: dict[str, Any] = {}
    for layer in layers:
        replaced = (("encoder", "decoder") if "model" in layer else ()) + (("model",) if layer.keys() & {"encoder", "decoder"} else ())
        values = {name: value for name, value in values.items() if name not in replaced} | dict(layer)
    return values


def _section(values: Any, stage: str, path: Path) -> dict[str, Any]:
    if values is not None and not isinstance(values, dict):
        raise InputError(f"The section {stage} in {path} must hold settings by name, was {json.dumps(values, default=str)}: mend the file.")
    return {str(name).replace("-", "_"): value for name, value in (values or {}).items()}


def _read_changes(changes: Sequence[str], stages: Collection[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Values for all stages, and those for one."""
    for_all: dict[str, Any] = {}
    for_one: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    for change in changes:
        target, equals, word = change.partition("=")
        stage, dot, name = target.replace("-", "_").rpartition(".")
        where = f"--set {change}"
        if not equals:
            raise InputError(f"--set takes NAME=VALUE or STAGE.NAME=VALUE, was {change!r}: write for example  --set cpt.num_steps=100")
        if dot and stage not in stages:
            raise InputError(f"The file has no stage {stage!r} for {where}: {_nearest(stage, stages, 'the sections of --config')}")
        having = [stage] if dot else [one for one in stages if any(field.name == name for field in fields(STAGE_SETTINGS[one]))]
        value = read_word(having[0] if having else next(iter(stages)), name, word, where)
        (for_one[stage] if dot else for_all)[name] = _plain(value)
    return for_all, for_one


def is_done(settings: TrainSettings) -> bool:
    """Whether the stage's folder holds the finished result of these settings. Raises InputError when a run with others has begun there."""
    folder, now = settings.output_dir, settings_values(settings)
    before = _read_json(folder / SETTINGS_FILE) if has_begun(folder) else {}
    changed = [name for name in now if name in before and before[name] != now[name] and name not in WITHOUT_EFFECT]
    if changed:
        shown = ", ".join(f"{name} was {json.dumps(before[name])}, is {json.dumps(now[name])}" for name in changed[:3])
        raise InputError(f"{folder} was trained with other settings ({shown}{', …' * (len(changed) > 3)}): remove that folder, or choose another output_dir.")
    return bool(_read_json(folder / RESULT_FILE).get("finished")) and (folder / MODEL_FOLDER).is_dir()


def _read_json(path: Path) -> dict[str, Any]:
    """An object, empty where there is none or it was cut short."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def run_stage(stage: str, settings: Any) -> dict[str, Any]:
    """`refrag.training.STAGE.run`, imported now: this is where torch comes in."""
    return import_module(f"{__package__}.{stage}").run(settings)


def run_pipeline(stages: Mapping[str, TrainSettings], *, run: RunStage = run_stage, after: AfterStage | None = None) -> dict[str, Any]:
    """Run the stages in order, those that are done aside; `after` is called with each stage that was trained, its settings and result.

    Returns {"finished", "model": the last stage's folder, "skipped": names, "stages": {name: result}}. `finished` is False for a dry run,
    and when a stage was told to stop: the next ones did not start. Raises InputError or NotFoundError, before anything runs, when a folder
    holds a run with other settings or from an earlier model, when two stages write to one folder, and for data that are not there.
    """
    _check_folders(stages)
    done = {stage: is_done(settings) for stage, settings in stages.items()}
    _check_order(stages, done)
    for stage, settings in stages.items():
        if not done[stage] and not settings.dry_run:
            _check_data(stage, settings)
    results: dict[str, dict[str, Any]] = {}
    for stage, settings in stages.items():
        if done[stage] and not settings.dry_run:
            logger.info("%s is done, in %s", stage, settings.output_dir)
            results[stage] = _read_json(settings.output_dir / RESULT_FILE)
            continue
        logger.info("%s, into %s", stage, settings.output_dir)
        results[stage] = _dry_run(stage, settings, run) if settings.dry_run else run(stage, settings)
        if not results[stage].get("finished") and not settings.dry_run:
            break
        if after is not None and not settings.dry_run:
            after(stage, settings, results[stage])
        _meet()
    finished = len(results) == len(stages) and all(result.get("finished") for result in results.values())
    model = str(list(stages.values())[-1].output_dir / "model")
    return {"finished": finished, "model": model, "skipped": [stage for stage in stages if done[stage]], "stages": results}


def _dry_run(stage: str, settings: TrainSettings, run: RunStage) -> dict[str, Any]:
    """The stage's dry run; packages and models that are on another machine are named under `not_checked`, all settings resolved anyway."""
    try:
        return run(stage, settings)
    except (NotFoundError, MissingExtraError) as error:
        logger.warning("%s was not checked further: %s", stage, error)
        return {"dry_run": True, "settings": {"stage": stage} | settings_values(settings), "not_checked": str(error)}


def _meet() -> None:
    """Wait for the other processes of this run: the next stage reads the model that the first process writes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch.distributed

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()


def _check_folders(stages: Mapping[str, TrainSettings]) -> None:
    """Raises InputError for two stages with one folder."""
    owners: dict[Path, str] = {}
    for stage, settings in stages.items():
        other = owners.setdefault(settings.output_dir.resolve(), stage)
        if other != stage:
            raise InputError(f"{other} and {stage} would both write to {settings.output_dir}: give each stage an output_dir of its own, or none.")


def _check_data(stage: str, settings: TrainSettings) -> None:
    """Raises InputError for a stage without data, NotFoundError for data that are not there."""
    if not settings.data:
        raise InputError(f"{stage} has nothing to train on: name its data in its section, for example  {stage}: {{data: FILE}}.")
    check_files([*settings.data, *settings.eval_data], "questions" if stage == "sft" else "documents")


def _check_order(stages: Mapping[str, TrainSettings], done: Mapping[str, bool]) -> None:
    """Raises InputError for a stage that is done though the one it starts from has still to run."""
    models = {str(settings.output_dir / "model"): stage for stage, settings in stages.items()}
    for stage, settings in stages.items():
        start = models.get(settings.model or "")
        if start is not None and done[stage] and not done[start]:
            raise InputError(f"{stage} in {settings.output_dir} was trained from an earlier {start}, which is to run again: remove the folder of {stage} too.")
