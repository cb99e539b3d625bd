"""Stage 1, reconstruction (paper section 2): L chunk vectors in, all their L*k tokens out, jointly and teacher-forced; the decoder is frozen."""

from typing import Any

from ..model import RefragModel
from .batches import ChunkedDocuments, ChunkRef, layout_batch
from .curriculum import num_chunks
from .documents import document_data
from .fit import fit, freeze
from .settings import ReconstructionSettings


class Reconstruction:
    """Micro-batches of the stage; L follows the curriculum over `num_items` micro-batches."""

    def __init__(self, model: RefragModel, settings: ReconstructionSettings, *, num_items: int) -> None:
        self.model, self.settings, self.num_items = model, settings, num_items
        self.num_chunks = settings.max_chunks
        self.num_slots = 1 + settings.max_chunks * (1 + model.config.chunk_size)
        """Most slots of a row: the start, the vectors, all their tokens."""

    def _length(self, item: int) -> tuple[int, int]:
        """(stage of the curriculum, L)."""
        kind = self.settings.curriculum
        return num_chunks(kind, item=item, num_items=self.num_items, max_chunks=self.num_chunks, seed=self.settings.seed)

    def needed(self, item: int) -> int:
        """L."""
        return self._length(item)[1]

    def batch(self, item: int, rows: list[tuple[ChunkedDocuments, list[ChunkRef]]]) -> dict[str, Any]:
        """Nothing expanded; every token of the chunks is a label."""
        stage, length = self._length(item)
        prompts = [chunked.prompt(refs) for chunked, refs in rows]
        completions = [[token for chunk in prompt.chunks for token in chunk.token_ids] for prompt in prompts]
        masks = [[False] * len(prompt.chunks) for prompt in prompts]
        names = [f"stage-{stage}", f"L={length}"]
        ids = [passage.id for prompt in prompts for passage in prompt.passages]
        return layout_batch(self.model, prompts, masks, completions=completions) | {"name": names, "rows": ids}


def run(settings: ReconstructionSettings) -> dict[str, Any]:
    """Train, or go on, and write `model/`; returns the result that result.json holds.

    Raises InputError for settings and data that cannot be trained with, NonFiniteLossError when the loss stops being a number.
    """
    return fit(settings, "reconstruction", prepare)


def prepare(model: RefragModel, settings: ReconstructionSettings) -> Any:
    """Freeze what this stage does not train; returns its data."""
    freeze(model.decoder)
    freeze(model.policy)
    return document_data(model, settings, Reconstruction)
