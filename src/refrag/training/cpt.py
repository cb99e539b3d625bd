"""Stage 2, continual pre-training (paper section 2): s context tokens compressed, the next o predicted; then with mixed inputs."""

import logging
import random
from typing import Any

from ..model import RefragModel
from .batches import ChunkedDocuments, ChunkRef, layout_batch
from .curriculum import num_chunks
from .documents import document_data
from .fit import fit, freeze
from .settings import CptSettings

logger = logging.getLogger(__name__)


class ContinualPretraining:
    """Micro-batches of the stage: the curriculum over the first part, then windows of full length with random chunks left as tokens."""

    def __init__(self, model: RefragModel, settings: CptSettings, *, num_items: int) -> None:
        self.model, self.settings = model, settings
        self.num_compressed = round(num_items * (1 - settings.mixed_share))
        self.num_items = num_items
        self.num_chunks = settings.max_chunks + self._output_chunks(settings.max_chunks)
        most = max(settings.expand_range or settings.expand_fractions) if settings.mixed_share else 0.0
        expanded = int(most * settings.max_chunks + 1e-9)
        self.num_slots = 1 + settings.max_chunks + expanded * (model.config.chunk_size - 1) + self._output_tokens(settings.max_chunks)
        """Most slots of a row: the start, the context with its largest share expanded, the output."""

    def _output_tokens(self, length: int) -> int:
        return self.settings.output_tokens or length * self.model.config.chunk_size

    def _output_chunks(self, length: int) -> int:
        return -(-self._output_tokens(length) // self.model.config.chunk_size)

    def _length(self, item: int) -> tuple[int, int]:
        """(stage of the curriculum, L); stage 0 is the mixed part."""
        if item >= self.num_compressed:
            return 0, self.settings.max_chunks
        kind = self.settings.curriculum
        return num_chunks(kind, item=item, num_items=self.num_compressed, max_chunks=self.settings.max_chunks, seed=self.settings.seed)

    def _fraction(self, item: int, rng: random.Random) -> tuple[float, str]:
        """(share of the chunks left as tokens, its name in the log)."""
        if item < self.num_compressed:
            return 0.0, ""
        if self.settings.expand_range is not None:
            low, high = self.settings.expand_range
            return rng.uniform(low, high), f"p={low:g}..{high:g}"
        shares = self.settings.expand_fractions
        place = (item - self.num_compressed) * len(shares) // max(self.num_items - self.num_compressed, 1)
        share = shares[min(place, len(shares) - 1)]
        return share, f"p={share:g}"

    def needed(self, item: int) -> int:
        """Chunks of context and output."""
        length = self._length(item)[1]
        return length + self._output_chunks(length)

    def batch(self, item: int, rows: list[tuple[ChunkedDocuments, list[ChunkRef]]]) -> dict[str, Any]:
        """The first L chunks are context, exactly floor(p*L) of them as tokens; the next o tokens are the labels."""
        stage, length = self._length(item)
        rng = random.Random(f"cpt-{self.settings.seed}-{item}")
        prompts, masks, completions, name = [], [], [], ""
        for chunked, refs in rows:
            share, name = self._fraction(item, rng)
            expanded = set(rng.sample(range(length), k=int(share * length + 1e-9)))
            prompts.append(chunked.prompt(refs[:length]))
            masks.append([place in expanded for place in range(length)])
            completions.append(self._completion(chunked, refs[length:])[: self._output_tokens(length)])
        names = [f"stage-{stage}", f"L={length}"] if stage else [name]
        ids = [passage.id for prompt in prompts for passage in prompt.passages]
        return layout_batch(self.model, prompts, masks, encode_all=True, completions=completions) | {"name": names, "rows": ids}

    def _completion(self, chunked: ChunkedDocuments, refs: list[ChunkRef]) -> list[int]:
        """The tokens of the chunks; where another document begins, the end token stands between."""
        end, tokens = self.model.tokenizer.eos_token_id, []
        for place, ref in enumerate(refs):
            if place and ref.document != refs[place - 1].document and end is not None:
                tokens.append(end)
            tokens += chunked.token_ids(ref)
        return tokens


def run(settings: CptSettings) -> dict[str, Any]:
    """Train, or go on, and write `model/`; returns the result that result.json holds.

    Raises InputError for settings and data that cannot be trained with, NonFiniteLossError when the loss stops being a number.
    """
    return fit(settings, "cpt", prepare)


def prepare(model: RefragModel, settings: CptSettings) -> Any:
    """Everything but the policy is trained; returns the data."""
    shares = settings.expand_range[1:] if settings.expand_range else settings.expand_fractions
    for share in shares if settings.mixed_share else ():
        if share > 0 and int(share * settings.max_chunks + 1e-9) == 0:
            logger.warning("a share of %g of %d chunks is no chunk: nothing is left as tokens there, take %.2g or more, or raise --max-chunks", share, settings.max_chunks, 1 / settings.max_chunks)
    freeze(model.policy)
    return document_data(model, settings, ContinualPretraining)
