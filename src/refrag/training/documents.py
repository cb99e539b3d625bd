"""The data of the stages over documents: windows of the training documents, micro-batches to evaluate on, and what was counted."""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import InputError
from ..model import RefragModel
from ..text import PromptBuilder
from .batches import ChunkedDocuments, DocumentBatches, DocumentStream, Windows, check_positions
from .data import load
from .fit import StageData
from .settings import DocumentSettings

logger = logging.getLogger(__name__)


def world_size() -> int:
    """Processes of this run, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def items_per_step(settings: Any) -> int:
    """Micro-batches behind one optimizer step, over all processes."""
    return settings.gradient_accumulation_steps * world_size()


def steps_of(settings: Any, rows: int) -> int:
    """Optimizer steps: as set, or as many as `num_epochs` passes over `rows` take, the last one filled up with rows of the next pass. Raises InputError for none."""
    if settings.num_steps is not None:
        return settings.num_steps
    batches = settings.num_epochs * rows / (settings.batch_size * items_per_step(settings))
    steps = math.ceil(batches - 1e-9)
    if batches < 1 - 1e-9:
        raise InputError(
            f"The run would take no optimizer step: {rows} rows make less than one batch of {settings.batch_size * items_per_step(settings)}: "
            "add data, lower --batch-size or --gradient-accumulation-steps, or pass --num-steps."
        )
    replace(settings, num_steps=steps)  # refuses a warm-up that is longer than this
    return steps


def document_data(model: RefragModel, settings: DocumentSettings, stage: Callable[..., Any]) -> StageData:
    """Train and evaluation micro-batches of a stage over documents. Raises InputError for texts that are all too short."""
    loaded = load(settings, "documents")
    builder = PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size)
    pack = settings.short_documents == "pack"
    size = stage(model, settings, num_items=1).num_chunks
    check_positions(model, stage(model, settings, num_items=1).num_slots, "--max-chunks or --output-tokens")
    if settings.streaming:
        assert settings.num_steps is not None
        num_steps, counts = settings.num_steps, loaded.counts  # which the stream goes on counting in
        num_items = num_steps * items_per_step(settings)
        train: Any = DocumentStream(stage(model, settings, num_items=num_items), loaded.train, builder, num_items=num_items, batch_size=settings.batch_size, pack=pack, counts=counts)
    else:
        windows = Windows(ChunkedDocuments(loaded.train, builder), size, pack=pack, seed=settings.seed)
        num_steps = steps_of(settings, len(windows))
        num_items = num_steps * items_per_step(settings)
        train = DocumentBatches(stage(model, settings, num_items=num_items), windows, num_items=num_items, batch_size=settings.batch_size)
        counts = loaded.counts | windows.counts
    logger.info("data: %s", ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in counts.items()))
    return StageData(train, _evaluation(model, settings, stage, loaded.evaluation, builder, pack), num_steps, counts, loaded.fingerprint)


def _evaluation(model: RefragModel, settings: DocumentSettings, stage: Callable[..., Any], documents: Any, builder: PromptBuilder, pack: bool) -> Any:
    """Windows of the longest length, nothing drawn at random but what is expanded; None without documents to cut one from."""
    if not len(documents):
        return None
    plain = replace(settings, curriculum="none", seed=settings.seed + 1, **({"mixed_share": 0.0} if hasattr(settings, "mixed_share") else {}))
    size = stage(model, plain, num_items=1).num_chunks
    chunked = ChunkedDocuments(documents, builder)
    if chunked.total < size:
        logger.warning("The held-out documents have %d chunks, a window takes %d: nothing is evaluated.", chunked.total, size)
        return None
    windows = Windows(chunked, size, pack=pack or not (chunked.num_chunks >= size).any(), seed=plain.seed)
    num_rows = min(plain.eval_rows, len(windows))
    num_items = -(-num_rows // plain.batch_size)
    return DocumentBatches(stage(model, plain, num_items=num_items), windows, num_items=num_items, batch_size=plain.batch_size, num_rows=num_rows) if num_rows else None
