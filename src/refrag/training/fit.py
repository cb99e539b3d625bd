"""From settings to a trained model in a folder: what every stage does the same way, around `transformers.Trainer`."""

import logging
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset, Subset
from transformers import AutoConfig, PrinterCallback, ProgressCallback, TrainingArguments

from .. import hub
from ..config import resolve_model
from ..encoder import fastest_dtype, resolve_device
from ..errors import InputError, MismatchError, MissingExtraError, first_line, missing_extra
from ..model import RefragConfig, RefragModel
from .checkpoints import Bar, LogFile, Patience, StopOnSignal, check_folder, claimed, latest_whole, resolve, write_json
from .settings import LOG_FILE, MODEL_FOLDER, RESULT_FILE, ReconstructionSettings, TrainSettings
from .sharding import full_state
from .trainer import RefragTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageData:
    """What a stage trains and evaluates on: data sets of micro-batches."""

    train: Any
    evaluation: Any | None
    num_steps: int
    """Optimizer steps."""
    counts: dict[str, int]
    """What became of the rows; of a stream so far."""
    fingerprint: str | None = None
    """What the rows are; None for a stream."""


Prepare = Callable[[RefragModel, Any], StageData]
Conclude = Callable[[Any, StageData], dict[str, Any]]


def fit(settings: Any, stage: str, prepare: Prepare, *, trainer_class: Any = RefragTrainer, conclude: Conclude | None = None) -> dict[str, Any]:
    """Run a stage: check the folder, build the model, claim the folder, train or go on, save; returns what result.json holds.

    `conclude` is called before the model is saved; what it returns joins the result.

    A run that is finished is not repeated. One that was told to stop (SIGTERM) has `finished` False and goes on when started again.
    """
    if settings.dry_run:
        return dry_run(settings, stage)
    if not settings.data:
        raise InputError("There is nothing to train on: name files, folders or data sets with --data.")
    check_processes(settings)
    done = check_folder(settings, stage)
    if done is not None:
        logger.info("%s holds this run, finished", settings.output_dir)
        return done
    model = build_model(settings)
    data = prepare(model, settings)
    trainer, signals = make_trainer(model, data, settings, trainer_class)  # all processes are there from here on
    with claimed(settings, stage, data.fingerprint) if trainer.args.should_save else nullcontext():
        result, finished = train(trainer, signals, data, stage)
        if finished:
            result |= conclude(trainer, data) if conclude else {}
            save_model(trainer, model, settings)
            if trainer.args.should_save:
                write_json(settings.output_dir / RESULT_FILE, result)
    return result


def build_model(settings: TrainSettings) -> RefragModel:
    """The model to start from, in float32 (master weights), in training mode, with LoRA layers if asked for.

    Raises MismatchError for a model of another chunk size.
    """
    torch.manual_seed(settings.seed)
    if settings.encoder is not None:
        shape = {"chunk_size": settings.chunk_size or 16, "pooling": settings.pooling or "cls", "projector_width": settings.projector_width}
        model = RefragModel.from_parts(settings.encoder, settings.decoder, part_kwargs={"dtype": torch.float32}, **shape)
    else:
        asked = {name: value for name in ("chunk_size", "pooling", "projector_width") if (value := getattr(settings, name)) is not None}
        model = RefragModel.from_pretrained(resolve_model(settings.start), dtype=torch.float32, **asked)
        model.config.chunk_sizes = None  # it is trained further with one
    model.requires_grad_(True)
    if settings.lora_rank:
        _add_lora(model, settings)
    return model.train()


def _add_lora(model: RefragModel, settings: TrainSettings) -> None:
    """LoRA on the decoder (saved with the model) and, if asked for, on the encoder (merged into it at the end); in reconstruction on the encoder alone."""

    def lora() -> Any:  # one for each part: peft writes the layers it found into it
        return hub.import_peft().LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear")

    if settings.lora_encoder:
        model.encoder.add_adapter(lora())
    if isinstance(settings, ReconstructionSettings):  # the decoder is frozen
        return
    if model.config.lora is None:
        model.add_lora(lora())
    elif model.config.lora["r"] != settings.lora_rank:
        raise MismatchError(f"This model has LoRA layers of rank {model.config.lora['r']}, --lora-rank {settings.lora_rank} was asked for: pass --lora-rank {model.config.lora['r']}.")
    else:
        for name, parameter in model.decoder.named_parameters():
            parameter.requires_grad_(".lora_" in name)


def freeze(module: nn.Module | None) -> None:
    """Train none of its parameters."""
    if module is not None:
        module.requires_grad_(False)


def precision_of(settings: TrainSettings) -> str:
    """bf16, fp16 or fp32; raises InputError for fp16 on a CPU."""
    device = resolve_device(settings.device)
    if settings.precision == "fp16" and device.type == "cpu":
        raise InputError("fp16 needs a GPU (its loss is scaled there), this run is on the CPU: pass --precision bf16 or fp32.")
    if settings.precision != "auto":
        return settings.precision
    return "bf16" if fastest_dtype(device) == torch.bfloat16 else "fp32"


def training_arguments(settings: TrainSettings, *, num_steps: int, evaluates: bool) -> TrainingArguments:
    """Our settings as `transformers.TrainingArguments`: an item of a data set is a micro-batch."""
    precision = precision_of(settings)
    for name in settings.report_to:
        if find_spec(name) is None:
            raise MissingExtraError(f"Reporting to {name} needs the package {name}: pip install {name}")
    if settings.optimizer == "adamw_8bit":
        _check_bitsandbytes()
    evaluation: dict[str, Any] = {"eval_strategy": "no"}
    if evaluates:
        evaluation = {"eval_strategy": "steps", "eval_steps": settings.eval_every or settings.save_every, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    return TrainingArguments(
        output_dir=str(settings.output_dir), max_steps=num_steps, per_device_train_batch_size=1, gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate, lr_scheduler_type=settings.schedule, warmup_steps=settings.warmup_steps(num_steps), weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm, optim="adamw_bnb_8bit" if settings.optimizer == "adamw_8bit" else "adamw_torch", bf16=precision == "bf16", fp16=precision == "fp16",
        torch_compile=settings.torch_compile, accelerator_config={"dispatch_batches": False},  # each process reads a stream itself: layouts are no tensors to hand out
        fsdp=True if settings.fsdp else None,  # ty: ignore[invalid-argument-type]  transformers wants True and says str
        use_cpu=resolve_device(settings.device).type == "cpu", logging_steps=min(settings.log_every, num_steps), logging_nan_inf_filter=False, save_steps=settings.save_every,
        save_total_limit=settings.keep, report_to=list(settings.report_to) or "none", seed=settings.seed, data_seed=settings.seed, remove_unused_columns=False, dataloader_num_workers=0,
        ddp_find_unused_parameters=False, **evaluation, **({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}} if settings.gradient_checkpointing else {}),
    )  # fmt: skip


def check_processes(settings: TrainSettings) -> None:
    """Raises InputError for FSDP without several GPUs, and for one process that sees several GPUs, which would be used by threads and not be ours."""
    device, processes = resolve_device(settings.device), int(os.environ.get("WORLD_SIZE", "1"))
    if settings.fsdp and (device.type != "cuda" or processes == 1):
        raise InputError(f"--fsdp shards over several GPUs, this run has {processes} process{'es' * (processes > 1)} on {device.type}: start it by torchrun --nproc-per-node GPUS -m refrag.cli …, or leave --fsdp out.")
    if processes == 1 and device.type == "cuda" and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        raise InputError(f"One process trains on one GPU, this one sees {count}: start it by torchrun --nproc-per-node {count} -m refrag.cli …, or set CUDA_VISIBLE_DEVICES=0.")


def _check_bitsandbytes() -> None:
    try:
        import bitsandbytes  # noqa: F401  # ty: ignore[import-not-found]
    except ImportError as error:
        raise missing_extra("bitsandbytes", "8bit", "The adamw_8bit optimizer") from error


def first(items: list[Any]) -> Any:
    """The collator: an item is a micro-batch already."""
    return items[0]


def make_trainer(model: RefragModel, data: StageData, settings: TrainSettings, trainer_class: Any = RefragTrainer) -> tuple[Any, StopOnSignal]:
    """The trainer of a stage, and the callback that knows whether it was told to stop."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("Nothing would be trained, every part of the model is frozen: check --lora-rank and the stage.")
    args, signals = training_arguments(settings, num_steps=data.num_steps, evaluates=data.evaluation is not None), StopOnSignal()
    callbacks: list[Any] = [LogFile(settings.output_dir), signals]
    if settings.patience and data.evaluation is not None:
        callbacks.append(Patience(early_stopping_patience=settings.patience))
    trainer = trainer_class(
        model=model, args=args, train_dataset=data.train, eval_dataset=data.evaluation, data_collator=first, callbacks=callbacks,
        optimizer_name=settings.optimizer,
    )  # fmt: skip
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    if logger.isEnabledFor(logging.INFO):
        trainer.add_callback(Bar())
    return trainer, signals


def train(trainer: Any, signals: StopOnSignal, data: StageData, stage: str) -> tuple[dict[str, Any], bool]:
    """Train, or go on from the last checkpoint; returns the result, and whether the end was reached."""
    saved, start = latest_whole(Path(trainer.args.output_dir)), time.perf_counter()
    if saved:
        logger.info("going on from %s", saved.name)
        if any(isinstance(callback, Patience) and callback.is_exhausted(saved) for callback in trainer.callback_handler.callbacks):
            _end_at(trainer, int(saved.name.rpartition("-")[2]))
    try:
        trainer.train(resume_from_checkpoint=str(saved) if saved else None)
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Bar):
                callback.close()
    result = {"stage": stage, "finished": not signals.stopped, "steps": trainer.state.global_step, "seconds": round(time.perf_counter() - start, 1), "counts": data.counts}
    if signals.stopped:
        logger.warning("told to stop: saved at step %d, the same command goes on", trainer.state.global_step)
        return result, False
    if data.evaluation is not None:
        result |= {"best_step": trainer.state.best_global_step or trainer.state.global_step} | trainer.evaluate()
    result["train_loss"] = next((entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry), None)
    return result, True


def _end_at(trainer: Any, step: int) -> None:
    """Make `step` the run's last: of a run that early stopping had ended there."""
    args, data = trainer.args, trainer.train_dataset
    args.max_steps, count = step, step * args.gradient_accumulation_steps * args.world_size
    if isinstance(data, IterableDataset):
        data.num_items = count
    else:
        trainer.train_dataset = Subset(data, range(count))


def save_model(trainer: Any, model: RefragModel, settings: TrainSettings) -> None:
    """Write the trained model to `model/`, whole or not at all."""
    if settings.lora_encoder and settings.lora_rank:
        merge_lora(model.encoder)
    state: dict[str, Any] = {"state_dict": full_state(model)} if settings.fsdp else {}
    if trainer.args.should_save:
        model.save_pretrained(settings.output_dir / MODEL_FOLDER, **state)
    trainer.accelerator.wait_for_everyone()  # the next stage of a pipeline reads it on every process


def merge_lora(module: nn.Module) -> None:
    """Put each LoRA layer's change into the layer it adapts, which takes its place again."""
    for name, layer in list(module.named_modules()):
        if hasattr(layer, "get_base_layer"):
            layer.merge(safe_merge=True)
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, layer.get_base_layer())


def dry_run(settings: TrainSettings, stage: str) -> dict[str, Any]:
    """Every setting, resolved, and what is derived from them; nothing is loaded or written."""
    derived: dict[str, Any] = shape_of(settings) | {"precision": precision_of(settings), "device": str(resolve_device(settings.device))}
    if settings.num_steps is not None:
        args = training_arguments(settings, num_steps=settings.num_steps, evaluates=True)
        derived |= {"warmup_steps": args.warmup_steps, "rows_per_step": settings.batch_size * settings.gradient_accumulation_steps * args.world_size}
    return {"dry_run": True, "settings": resolve(settings, stage), "resolved": derived, "log": str(settings.output_dir / LOG_FILE)}


def shape_of(settings: TrainSettings) -> dict[str, Any]:
    """Parameters of each part, from the configs alone; empty where they cannot be read, as for a model that an earlier stage is yet to make."""
    try:
        if settings.encoder is not None and settings.decoder is not None:
            configs = [AutoConfig.from_pretrained(name) for name in (settings.encoder, settings.decoder)]
            config = RefragConfig(encoder_config=configs[0], decoder_config=configs[1], chunk_size=settings.chunk_size or 16, pooling=settings.pooling or "cls", projector_width=settings.projector_width)
        else:
            config = hub.read_config(RefragConfig, resolve_model(settings.start))
        with torch.device("meta"):
            model = RefragModel(config)
    except (OSError, ValueError) as error:
        logger.warning("The model's shape is not checked: %s", first_line(error))
        return {}
    return {"parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}, "chunk_size": config.chunk_size}
