"""Micro-batches of layouts: what the stages over documents share. Item i of a data set is micro-batch i, a pure function of (seed, i).

Documents are cut into chunks once; put behind one another they are one long row of chunks, and a window is a stretch of
it. So exact resume on any number of processes follows, and long documents are windowed while short ones are packed,
each its own passage, or dropped and counted.
"""

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from ..encoder import encoder_inputs
from ..errors import InputError
from ..layout import IGNORED, PADDING, lay_out
from ..model import RefragModel
from ..text import Chunk, ChunkedText, Passage, Prompt, PromptBuilder

logger = logging.getLogger(__name__)

ROUND = 64
"""Slots and chunks of a large batch are padded to multiples of this, those of a small one to less (`padding`): kernels are compiled once per shape."""

CACHED_DOCUMENTS = 4096


def padding(size: int) -> int:
    """How much is added to `size` slots or chunks, so that few sizes occur: a sixteenth at the most, but for the shortest."""
    step = min(ROUND, max(8, 1 << max(0, size.bit_length() - 5)))
    return -size % step


@runtime_checkable
class Text(Protocol):
    """What a document has."""

    @property
    def id(self) -> str: ...
    @property
    def text(self) -> str: ...


def layout_batch(model: RefragModel, prompts: list[Prompt], masks: list[list[bool]], *, encode_all: bool = False, **targets: Any) -> dict[str, Any]:
    """What `RefragModel.forward` takes for right-padded rows: the layout, and the encoder's inputs where a chunk is compressed.

    `targets` are `completions` and `labels` as in `lay_out`. With `encode_all` the encoder's inputs are there in any case:
    several processes need every part of the model in every step. Slots and chunks are padded to round numbers, but not beyond the decoder's positions.
    Raises InputError for a row that has more slots than these.
    """
    layout = lay_out(prompts, masks, padding_side="right", **targets)
    width = layout.source.shape[1]
    room = check_positions(model, width, "--num-passages, --max-chunks or --output-tokens")
    extra = min(padding(width), room)
    source, labels = nn.functional.pad(layout.source, (0, extra), value=PADDING), nn.functional.pad(layout.labels, (0, extra), value=IGNORED)
    batch: dict[str, Any] = {"layout": replace(layout, source=source, labels=labels, num_chunks=0), "labels": labels}
    if all(map(all, masks)) and not encode_all:
        return batch
    texts = [text for prompt in prompts for text in prompt.chunk_texts()] or [""]
    ids, mask = encoder_inputs(model.encoder, model.encoder_tokenizer, texts + [""] * padding(len(texts)))
    batch["layout"] = replace(batch["layout"], num_chunks=len(ids))
    return batch | {"encoder_input_ids": ids, "encoder_attention_mask": mask}


def check_positions(model: RefragModel, slots: int, settings: str) -> int:
    """How many more slots than `slots` the decoder has positions for. Raises InputError where it has fewer; `settings`: what to lower."""
    limit = getattr(model.decoder.config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 30
    if slots > limit:
        raise InputError(f"The decoder has {limit:,} positions, a row would take {slots:,} slots: lower {settings}.")
    return limit - slots


def place_completions(layout: Any, values: Sequence[Sequence[float]], *, width: int) -> torch.Tensor:
    """[batch slot]: `values[b]` on the last slots of row b (its completion), 0 elsewhere; right-padded rows."""
    placed = torch.zeros(len(values), width)
    for row, (own, slots) in enumerate(zip(values, layout.num_slots, strict=True)):
        placed[row, slots - len(own) : slots] = torch.tensor(own, dtype=torch.float32)
    return placed


class ChunkRef(NamedTuple):
    """Chunk `chunk` of document `document`."""

    document: int
    chunk: int


class ChunkedDocuments:
    """Documents as one row of chunks; texts are tokenised when they are needed, and the latest are kept."""

    def __init__(self, documents: Sequence[Text], builder: PromptBuilder) -> None:
        self.documents, self.builder = documents, builder
        self.chunked = lru_cache(maxsize=CACHED_DOCUMENTS)(self._chunked)
        self.num_chunks = np.array([len(self.chunked(number).spans) for number in range(len(documents))], dtype=np.int64)
        self.ends = np.cumsum(self.num_chunks)

    def _chunked(self, number: int) -> ChunkedText:
        return self.builder.chunk(self.documents[number].text)

    @property
    def total(self) -> int:
        """Chunks of all documents."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def refs(self, start: int, count: int) -> list[ChunkRef]:
        """`count` chunks of the row from `start` on."""
        places = np.arange(start, start + count)
        documents = np.searchsorted(self.ends, places, side="right")
        return [ChunkRef(int(d), int(p - self.ends[d] + self.num_chunks[d])) for d, p in zip(documents, places, strict=True)]

    def prompt(self, refs: Sequence[ChunkRef]) -> Prompt:
        """BOS and the chunks; each document among them is one passage."""
        numbers = list(dict.fromkeys(ref.document for ref in refs))
        passages = tuple(Passage(self.documents[number].id, self.documents[number].text) for number in numbers)
        chunks = tuple(
            Chunk(index, numbers.index(ref.document), *self.chunked(ref.document).spans[ref.chunk], self.token_ids(ref))
            for index, ref in enumerate(refs)
        )
        bos = self.builder.tokenizer.bos_token_id
        return Prompt((() if bos is None else (bos,), *chunks), chunks, passages)

    def token_ids(self, ref: ChunkRef) -> tuple[int, ...]:
        """Decoder tokens of one chunk."""
        text = self.chunked(ref.document)
        return text.token_ids[ref.chunk * text.chunk_size : (ref.chunk + 1) * text.chunk_size]

    def windows(self, num_chunks: int, *, pack: bool) -> tuple[np.ndarray, dict[str, int]]:
        """Starts of windows of `num_chunks` chunks that do not overlap, and what became of the documents.

        With `pack` a window may hold several documents, else those shorter than a window are dropped.
        Raises InputError when there is no window at all.
        """
        if pack:
            starts = np.arange(0, self.total - num_chunks + 1, num_chunks)
            short = int((self.num_chunks < num_chunks).sum())
            counts = {"packed_documents": short, "dropped_documents": 0, "dropped_chunks": self.total - num_chunks * len(starts)}
        else:
            begins = self.ends - self.num_chunks
            per_document = self.num_chunks // num_chunks
            starts = np.concatenate([begins[d] + num_chunks * np.arange(n) for d, n in enumerate(per_document) if n] or [np.zeros(0, dtype=np.int64)])
            counts = {"packed_documents": 0, "dropped_documents": int((per_document == 0).sum()), "dropped_chunks": self.total - num_chunks * len(starts)}
        if not len(starts):
            longest, size = int(self.total if pack else self.num_chunks.max(initial=0)), self.builder.chunk_size
            what = "All texts together" if pack else "The longest text"
            raise InputError(
                f"A window takes {num_chunks} chunks of {size} tokens ({num_chunks * size} tokens); {what.lower()} have {longest} chunks: "
                f"lower --max-chunks or --output-tokens{'' if pack else ', pass --short-documents pack,'} or add longer texts."
            )
        return starts, {"documents": len(self.documents), "chunks": self.total, "windows": len(starts)} | counts


class Windows:
    """Windows drawn for rows: pass after pass over all of them, each pass in another order, a function of (seed, row)."""

    def __init__(self, chunked: ChunkedDocuments, num_chunks: int, *, pack: bool, seed: int) -> None:
        self.chunked, self.num_chunks, self.seed = chunked, num_chunks, seed
        self.starts, self.counts = chunked.windows(num_chunks, pack=pack)
        self._order = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(self.starts)))

    def __len__(self) -> int:
        return len(self.starts)

    def refs(self, row: int, count: int) -> list[ChunkRef]:
        """`count` chunks of the window of row `row`, from a place in it drawn at random."""
        epoch, place = divmod(row, len(self.starts))
        start = int(self.starts[self._order(epoch)[place]])
        offset = random.Random(f"window-{self.seed}-{row}").randint(0, self.num_chunks - count)
        return self.chunked.refs(start + offset, count)


@runtime_checkable
class DocumentStage(Protocol):
    """A stage over documents: how it turns chunks into a micro-batch."""

    num_chunks: int
    """Chunks of its longest window."""

    def needed(self, item: int) -> int:
        """Chunks that each row of micro-batch `item` needs."""
        ...

    def batch(self, item: int, rows: list[tuple[ChunkedDocuments, list[ChunkRef]]]) -> dict[str, Any]:
        """The micro-batch."""
        ...


class DocumentBatches(Dataset):
    """Micro-batches over documents that lie ready; `item` numbers go on where a pass over the windows ends."""

    def __init__(self, stage: DocumentStage, windows: Windows, *, num_items: int, batch_size: int, num_rows: int | None = None) -> None:
        """The last micro-batch is smaller where there are only `num_rows`."""
        self.stage, self.windows, self.num_items, self.batch_size = stage, windows, num_items, batch_size
        self.num_rows = num_items * batch_size if num_rows is None else num_rows

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, item: int) -> dict[str, Any]:
        count = self.stage.needed(item)
        rows = [self.windows.refs(row, count) for row in range(item * self.batch_size, min((item + 1) * self.batch_size, self.num_rows))]
        return self.stage.batch(item, [(self.windows.chunked, refs) for refs in rows])


class DocumentStream(IterableDataset):
    """The same over documents that come one after another: each micro-batch takes as many as it needs, in their order.

    Documents too short for the row at hand are packed, or dropped and counted; what is left of a long one is cut further.
    """

    def __init__(
        self, stage: DocumentStage, documents: Iterable[Text], builder: PromptBuilder, *, num_items: int, batch_size: int, pack: bool, counts: dict[str, int] | None = None
    ) -> None:
        """What is dropped is counted in `counts`, under `dropped_documents`: what is left of long ones too."""
        self.stage, self.documents, self.builder = stage, documents, builder
        self.num_items, self.batch_size, self.pack = num_items, batch_size, pack
        self.counts = {} if counts is None else counts

    def __len__(self) -> int:
        return self.num_items

    def __iter__(self) -> Iterator[dict[str, Any]]:
        source, held, used = iter(self.documents), ChunkedDocuments([], self.builder), 0
        self.counts["dropped_documents"] = 0
        for item in range(self.num_items):
            rows = []
            for _ in range(self.batch_size):
                count = self.stage.needed(item)
                while held.total - used < count:
                    left = [] if not self.pack else _rest(held, used)
                    self.counts["dropped_documents"] += not self.pack and held.total > used
                    document = next(source, None)
                    if document is None:
                        raise InputError(f"The stream ended after {item} of {self.num_items} micro-batches: add data, or start anew, in another --output-dir, with a lower --num-steps.")
                    held, used = ChunkedDocuments([*left, document], self.builder), 0
                rows.append((held, held.refs(used, count)))
                used += count
            yield self.stage.batch(item, rows)


class _Rest(NamedTuple):
    id: str
    text: str


def _rest(held: ChunkedDocuments, used: int) -> list[_Rest]:
    """What is left of the documents behind the first `used` chunks."""
    if used >= held.total:
        return []
    first = held.refs(used, 1)[0]
    text = held.documents[first.document]
    start = held.chunked(first.document).spans[first.chunk][0]
    return [_Rest(text.id, text.text[start:]), *(_Rest(d.id, d.text) for d in held.documents[first.document + 1 :])]
