"""The folder of a run: whose it is, checkpoints that appear whole, the log, and what happens when the process is told to stop."""

import dataclasses
import json
import logging
import math
import os
import re
import shutil
import signal
import threading
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from transformers import EarlyStoppingCallback, TrainerCallback

from ..errors import InputError
from .settings import BEST_LINK, LOG_FILE, MODEL_FOLDER, RESULT_FILE, SETTINGS_FILE, WITHOUT_EFFECT, TrainSettings, has_begun

logger = logging.getLogger(__name__)

FINGERPRINT = "data_fingerprint"
"""Key in settings.json: what the data were when the run began."""
LOCK_FILE = ".lock"
_STAGING = ".saving"


# ── whose folder ─────────────────────────────────────────────────────────────────────────────────────────────────────


def check_folder(settings: TrainSettings, stage: str) -> dict[str, Any] | None:
    """Whether this run may use its output folder; returns the result of a run that is finished there. Nothing is written.

    Raises InputError when the folder holds another run that has begun, something else, or a run that must not go on, and when
    there can be no such folder.
    """
    folder, resolved = settings.output_dir, resolve(settings, stage)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"--output-dir must be a folder, {there} is a file: choose another.")
    known = read_json(folder / SETTINGS_FILE)
    if known is None and folder.exists() and any(path.name != LOCK_FILE for path in folder.iterdir()):
        raise InputError(f"--output-dir must be a new folder or one of a run, {folder} holds other files: choose another.")
    if known is not None and has_begun(folder):
        other = next((key for key in (*known, *resolved) if key not in (*WITHOUT_EFFECT, FINGERPRINT) and known.get(key) != resolved.get(key)), None)
        if other is not None:
            raise InputError(
                f"The folder {folder} holds another run ({other} was {known.get(other)!r}, now {resolved.get(other)!r}): choose another --output-dir, or remove it."
            )
        result = read_json(folder / RESULT_FILE)
        if result is not None and result.get("finished") and (folder / MODEL_FOLDER).is_dir():
            return result
        if not settings.resume and checkpoints(folder):
            raise InputError(f"The folder {folder} holds an unfinished run: leave --no-resume out to go on with it, or choose another --output-dir.")
    return None


@contextmanager
def claimed(settings: TrainSettings, stage: str, fingerprint: str | None) -> Generator[None]:
    """The output folder is this process's meanwhile; its resolved settings are written there, and what its data are.

    Raises InputError when another process trains there, when the run began with other data, and where nothing can be written.
    """
    folder, path = settings.output_dir, settings.output_dir / SETTINGS_FILE
    lock = FileLock(folder / LOCK_FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(NotImplementedError):  # a file system without locks
            lock.acquire(blocking=False)
        try:
            before = (read_json(path) or {}).get(FINGERPRINT) if has_begun(folder) else None
            if None not in (before, fingerprint) and before != fingerprint:
                raise InputError(f"The run in {folder} began with other data than --data and --eval-data hold now: put them back, or choose another --output-dir.")
            write_json(path, resolve(settings, stage) | {FINGERPRINT: fingerprint})
        except BaseException:
            lock.release()
            raise
    except Timeout as error:
        raise InputError(f"Another process trains in {folder}: wait for its end, or choose another --output-dir.") from error
    except OSError as error:
        if _is_disk_full(error):
            raise
        raise InputError(f"--output-dir must be a folder that can be written to, {folder} is not ({error.strerror}): choose another.") from error
    try:
        yield
    finally:
        lock.release()


def resolve(settings: TrainSettings, stage: str) -> dict[str, Any]:
    """All settings of a stage as JSON values."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {"stage": stage} | json.loads(json.dumps(values, default=str))


def read_json(path: Path) -> Any:
    """The object in a JSON file; None where there is no file. Raises InputError for one that is damaged."""
    try:
        values = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged: remove the folder of the run, or choose another --output-dir.")
    return values if path.exists() else None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file whole: beside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=1, default=str) + "\n", "utf-8")
    os.replace(temporary, path)


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    return [path for _, path in sorted(found)]


def latest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files can be read; damaged ones are named in a warning. Raises InputError where all are damaged."""
    saved = checkpoints(folder)
    for path in reversed(saved):
        broken = _broken(path)
        if broken is None:
            return path
        logger.warning("%s is damaged (%s): it is left out", path, broken)
    if saved:
        raise InputError(f"All checkpoints in {folder} are damaged: remove the folder and start again, or choose another --output-dir.")
    return None


def _broken(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that is damaged or missing."""
    files = sorted(checkpoint.iterdir())
    for pattern in ("trainer_state.json", "scheduler.pt", "optimizer*", "*model*"):  # sharded ones are folders
        if not any(file.match(pattern) for file in files):
            return pattern.replace("*", "")
    return next((file.name for file in files if not _is_readable(file)), None)


def _is_readable(file: Path) -> bool:
    """Whether a file of weights or of training state is whole, as far as its format says."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                return True
        if file.name == "trainer_state.json":
            return "global_step" in (read_json(file) or {})
        return file.suffix not in (".pt", ".pth", ".bin") or zipfile.is_zipfile(file)
    except (SafetensorError, InputError):
        return False


def save_whole(trainer: Any, save: Callable[[], None]) -> None:
    """Let `save` write a checkpoint into a folder beside the others, then rename it; keep `save_total_limit` and the best one.

    When it fails, the half-written one is removed and all others stay. Raises InputError when the disk is full.
    """
    folder, args, state = Path(trainer.args.output_dir), trainer.args, trainer.state
    staging = folder / _STAGING
    keep, args.save_total_limit = args.save_total_limit, None
    name = f"checkpoint-{state.global_step}"
    try:
        if args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        trainer.staging = str(staging)
        save()
        trainer.accelerator.wait_for_everyone()
        if state.best_global_step:  # on every process: each loads the best one at the end
            state.best_model_checkpoint = str(folder / f"checkpoint-{state.best_global_step}")
        if args.should_save:
            if state.best_global_step:
                state.save_to_json(str(staging / name / "trainer_state.json"))
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(staging / name, folder / name)
            _tidy(folder, keep=keep, best=state.best_model_checkpoint)
        trainer.accelerator.wait_for_everyone()
    except (OSError, RuntimeError, InputError) as error:
        if not _is_disk_full(error):
            raise
        latest = checkpoints(folder)
        stays = f"the last good checkpoint is {latest[-1].name}" if latest else "no checkpoint was saved before"
        raise InputError(f"The checkpoint of step {state.global_step} could not be written to {folder}, the disk is full ({stays}): free some space, then run the same command again.") from error
    finally:
        trainer.staging, args.save_total_limit = None, keep
        if args.should_save:
            shutil.rmtree(staging, ignore_errors=True)


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if "No space left on device" in str(error) or getattr(error, "errno", None) in (28, 122):
            return True
        error = error.__cause__ or error.__context__
    return False


def _tidy(folder: Path, *, keep: int | None, best: str | None) -> None:
    """Remove all but the latest `keep` checkpoints and the best one, which a link named `best` marks."""
    if best:
        link = folder / BEST_LINK
        link.unlink(missing_ok=True)
        link.symlink_to(Path(best).name, target_is_directory=True)
    for path in checkpoints(folder)[: -keep if keep else 0]:
        if best is None or path.name != Path(best).name:
            shutil.rmtree(path)


# ── callbacks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _step_of(line: str) -> int:
    """The step of a log line; 0 for one that a kill cut short, or that is none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, LookupError):
        return 0


class LogFile(TrainerCallback):
    """Appends every log entry to log.jsonl; entries after the step a run goes on from are dropped first."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG_FILE

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.path.exists():
            kept = [line for line in self.path.read_text("utf-8", errors="replace").splitlines() if 0 < _step_of(line) <= state.global_step]
            self.path.write_text("".join(f"{line}\n" for line in kept), "utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class StopOnSignal(TrainerCallback):
    """SIGTERM saves a checkpoint after the running step and ends the training; the handler before is put back.

    Processes that train together end after the same step, whichever of them was told.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._before: Any = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, *args: Any) -> None:
        self.stopped = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if args.world_size > 1:
            told = torch.tensor(int(self.stopped), device=args.device)
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
            self.stopped = bool(told)
        if self.stopped:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


class Patience(EarlyStoppingCallback):
    """Stops after so many evaluations without a better result; how many there were is read from the log, so that a run that goes on counts on."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = self._without_better(state.log_history)

    def is_exhausted(self, checkpoint: Path) -> bool:
        """Whether the run of this checkpoint had stopped here."""
        log = (read_json(checkpoint / "trainer_state.json") or {}).get("log_history", [])
        return self._without_better(log) >= self.early_stopping_patience

    @staticmethod
    def _without_better(log: list[dict[str, Any]]) -> int:
        """Evaluations since the best one."""
        best, count = math.inf, 0
        for value in (entry["eval_loss"] for entry in log if "eval_loss" in entry):
            count = 0 if value < best else count + 1
            best = min(best, value)
        return count


class Bar(TrainerCallback):
    """A bar on stderr: steps, loss, tokens per second, time left."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from tqdm import tqdm

        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.bar is not None and logs:
            shown = {"loss": "loss", "tokens_per_s": "tokens/s", "eval_loss": "eval"}
            self.bar.set_postfix({shown[key]: f"{float(logs[key]):.4g}" for key in shown if key in logs}, refresh=False)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the bar's line, also where an error ends the run."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
