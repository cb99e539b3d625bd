"""PassageIndex: passages with their retrieval vectors and chunk vectors, made once and reused for every question."""

import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from zlib import crc32

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from torch import Tensor

from ..config import BUNDLED_MODEL, MAX_TOP_K, IndexSettings, check_whole, resolve_model
from ..errors import InputError, MismatchError, NotFoundError, RefragError
from ..text import Passage, PromptBuilder
from .batches import ahead, groups
from .documents import json_text
from .manifest import Manifest
from .retrieve import Hit, SentenceEncoder, check_filter, check_question, fuse, search_text
from .seen import Seen
from .table import TABLE, DamagedIndexError, PassageTable, quoted, table_schema
from .vectors import pack, row_type, unpack

if TYPE_CHECKING:
    from ..model import RefragModel

log = logging.getLogger(__name__)

MODES = ("dense", "text", "hybrid")
PASSAGE_COLUMNS = ("id", "title", "text", "metadata")
OPTIMIZE_ROWS = 4_096
"""While building, the table is optimised when this many rows, and as many as it had before, are new."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Batch:
    """New and changed passages, cut into chunks and ready to be encoded."""

    passages: list[Passage]
    hashes: list[str]
    chunk_texts: list[str]
    num_chunks: list[int]
    size: int
    """Passages read, those without changes included."""
    unchanged: int
    is_new: bool
    """No id of these passages is stored, or about to be."""


class PassageIndex:
    """Passages on disk with what answering needs of them. Made by `create`, opened by `open`; safe to read from threads."""

    def __init__(self, table: PassageTable, manifest: Manifest, *, model: "RefragModel | None", retriever: SentenceEncoder | None) -> None:
        self.table, self.manifest, self.model = table, manifest, model
        self.settings = manifest.settings
        self.path = table.path
        if retriever is not None:
            self.retriever = retriever
        self._rows_since = 0

    # ── opening ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def open(cls, path: str | Path, *, model: "RefragModel | None" = None, retriever: SentenceEncoder | None = None) -> "PassageIndex":
        """The index at a folder or an object store's address. Without a model it can be searched and read, not added to.

        Raises NotFoundError when there is none; MismatchError, naming what differs and the command that mends it, when its
        format, the model or the retriever is not the one it was made with.
        """
        table = PassageTable.open(local_address(path))
        manifest = Manifest.from_metadata(table.schema.metadata, table.path)
        if model is not None:
            if not hasattr(model, "fingerprint"):
                raise InputError(f"The model of an index must be a RefragModel, was {model!r}: load it with refrag.model.load_model(name).")
            manifest.check_model(model.fingerprint(), table.path, chunk_sizes=model.config.chunk_sizes or ())
        if retriever is not None:
            manifest.check_retriever(retriever.identity(), table.path)
        return cls(table, manifest, model=model, retriever=retriever)

    @classmethod
    def create(
        cls,
        path: str | Path,
        model: "RefragModel",
        settings: IndexSettings | None = None,
        *,
        rebuild: bool = False,
        retriever: SentenceEncoder | None = None,
        name: str = TABLE,
    ) -> "PassageIndex":
        """A new, empty index for this model; with `rebuild` in place of one that is there, which stays whole until then.

        `name` is that of the table in the folder: see `refrag.index.build.building`, which replaces an index only when it can.

        Raises InputError when there is an index already, NotFoundError for a retriever that cannot be loaded.
        """
        settings = settings or IndexSettings()
        retriever = retriever or SentenceEncoder(settings.retriever, instruction=settings.question_instruction, device=model.device)
        manifest = Manifest(settings, model.fingerprint(), retriever.identity(), model_name=_model_name(model))
        table = PassageTable.create(local_address(path), table_schema(manifest, retriever.width), replace=rebuild, name=name)
        return cls(table, manifest, model=model, retriever=retriever)

    @classmethod
    def open_or_create(cls, path: str | Path, model: "RefragModel", settings: IndexSettings | None = None) -> "PassageIndex":
        """What `refrag index build` does: the index that is there, to be finished, else a new one.

        Raises MismatchError when the index that is there was made with another retriever, storage or passage length.
        """
        try:
            index = cls.open(path, model=model)
        except NotFoundError:
            return cls.create(path, model, settings)
        names = "retriever", "question_instruction", "storage", "passage_tokens", "overlap_tokens"
        pairs = [(f"--{name.replace('_', '-')}", getattr(index.settings, name), getattr(settings or index.settings, name)) for name in names]
        differing = ", ".join(f"{option} {stored}, now it is {given}" for option, stored, given in pairs if stored != given)
        if differing:
            raise MismatchError(f"The index at {path} was made with {differing}: give the same again, or make it anew with --rebuild.")
        return index

    @cached_property
    def retriever(self) -> SentenceEncoder:
        """The sentence encoder that the index was made with, loaded on first use. Raises MismatchError if its weights are others."""
        device = self.model.device if self.model is not None else "auto"
        name, instruction = str(self.manifest.retriever["name"]), str(self.manifest.retriever["instruction"])
        retriever = SentenceEncoder(name, instruction=instruction, device=device)
        self.manifest.check_retriever(retriever.identity(), self.path)
        return retriever

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def add(
        self, passages: Iterable[Passage], *, progress: Callable[[int], object] | None = None, sources: Set[str] = frozenset()
    ) -> dict[str, int]:
        """Adds passages, replaces those whose content changed, skips the rest; a later passage replaces an earlier one of its id.

        Streams: a batch is encoded while the next is read and tokenised and the one before is written, each in one commit,
        so memory does not grow with the corpus and after a crash the same call finishes the rest. `progress` is called
        with the number of passages done. `sources`, looked at in the end, are files that `passages` holds completely: what
        the index still has of them from an earlier state is removed. Returns how many passages were `added`, `updated`,
        `unchanged`, the `chunks` encoded and, only when there were any, `removed` ones and `duplicates`: passages that
        another with the same id and other content replaced. Raises InputError for metadata that JSON cannot hold and for what is no
        Passage, BackendError when the disk is full or another process is writing.
        """
        totals = Counter(added=0, updated=0, unchanged=0, chunks=0)
        seen = Seen()
        with self.table.writing(), ThreadPoolExecutor(1) as writer:
            pending: Future[tuple[int, int]] | None = None
            for batch in ahead(self._prepared(passages, seen)):
                vectors = self._encoded(batch) if batch.passages else None
                totals.update(unchanged=batch.unchanged, chunks=len(batch.chunk_texts))
                _count(totals, pending)
                pending = writer.submit(self._write, batch, *vectors) if vectors else None
                if progress:
                    progress(batch.size)
            _count(totals, pending)
            totals.update(self._settle(seen, sources))
            self._optimize()
        return dict(totals)

    def _settle(self, seen: Seen, sources: Set[str]) -> dict[str, int]:
        """After everything was read: removes what its files no longer hold, reports ids that were given twice."""
        counts = {}
        if sources:
            where = quoted(sorted(sources), "json_get_string(metadata, 'source')") if len(sources) <= 100 else None
            rows = (row for batch in self.table.scan(("id", "metadata"), where=where) for row in zip(batch["id"].to_pylist(), batch["metadata"].to_pylist(), strict=True))
            stale = [identity for identity, metadata in rows if seen.missing([identity]) and json.loads(metadata).get("source") in sources]
            removed = sum(self.table.delete(stale[start : start + 1000]) for start in range(0, len(stale), 1000))
            counts |= {"removed": removed} if removed else {}
        if seen.num_replaced:
            example = next((identity for batch in self.table.scan(("id",)) for identity in seen.replaced(batch["id"].to_pylist())), "")
            log.warning("Passages with the id of another: %d, for example %r; only the last of each was kept: give every passage its own id.", seen.num_replaced, example)
            counts["duplicates"] = seen.num_replaced
        return counts

    def delete(self, ids: Iterable[str]) -> int:
        """Deletes passages by id, in one commit. Returns how many there were. Raises InputError for one id that is not in a list."""
        if isinstance(ids, str):
            raise InputError(f"The ids to delete must be a list, was the text {ids!r}: put it between brackets.")
        with self.table.writing():
            return self.table.delete(list(map(str, ids)))

    def optimize(self) -> None:
        """Joins small files, brings the search indexes up to date and frees the space of old versions; `add` ends with it."""
        with self.table.writing():
            self._optimize()

    def _optimize(self) -> None:
        self.table.optimize()
        self._rows_since = 0

    def _prepared(self, passages: Iterable[Passage], seen: Seen) -> Iterator[_Batch]:
        """Batches of passages that are not stored as they are, cut into chunks."""
        unwritten: deque[Set[str]] = deque(maxlen=3)  # ids of the batch that is encoded, the one that is written, and one to spare
        for group in groups(passages, self.settings.batch_size):
            unique, hashes = {passage.id: passage for passage in group}, {}
            for passage in group:
                hashes[passage.id] = content_hash(passage)
                seen.add(passage.id, hashes[passage.id])
            rows = self.table.rows(list(unique), ("id", "content_hash"))
            stored = dict(zip(rows["id"].to_pylist(), rows["content_hash"].to_pylist(), strict=True))
            pending = unique.keys() & set().union(*unwritten)  # what is stored of these is not the last word
            fresh = [passage for identity, passage in unique.items() if identity in pending or stored.get(identity) != hashes[identity]]
            chunked = self._builder.chunk_batch([passage.text for passage in fresh])
            texts = [text[start:end] for own, text in zip(chunked, (passage.text for passage in fresh), strict=True) for start, end in own.spans]
            counts = [len(own.spans) for own in chunked]
            is_new = not stored and not pending
            unwritten.append(unique.keys())
            yield _Batch(fresh, [hashes[passage.id] for passage in fresh], texts, counts, len(group), len(group) - len(fresh), is_new)

    def _encoded(self, batch: _Batch) -> tuple[np.ndarray, np.ndarray]:
        """Chunk vectors [chunk enc] and retrieval vectors [passage width] of a batch: the only step that runs networks."""
        assert self.model is not None
        return self.model.encode(batch.chunk_texts).cpu().numpy(), self.retriever.encode_passages(batch.passages)

    def _write(self, batch: _Batch, embeds: np.ndarray, vectors: np.ndarray) -> tuple[int, int]:
        rows = self._rows(batch, embeds, vectors)
        counts = (self.table.append(rows), 0) if batch.is_new else self.table.merge(rows)
        self._rows_since += len(batch.passages)
        if self._rows_since >= max(OPTIMIZE_ROWS, self.count - self._rows_since):
            self._optimize()
        return counts

    def _rows(self, batch: _Batch, embeds: np.ndarray, vectors: np.ndarray) -> pa.Table:
        """A batch as rows of the table."""
        passages = batch.passages
        metadata = pa.array([json_text(passage.metadata) for passage in passages], pa.utf8())
        retrieval = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float16).ravel()), vectors.shape[1])
        chunks = pack(embeds, batch.num_chunks, self.settings.storage)
        columns = [
            pa.array([passage.id for passage in passages], pa.utf8()),
            pa.array([passage.title for passage in passages], pa.utf8()),
            pa.array([passage.text for passage in passages], pa.utf8()),
            pa.array([search_text(passage) for passage in passages], pa.utf8()),
            pa.ExtensionArray.from_storage(pa.json_(pa.utf8()), metadata),
            pa.array(batch.hashes, pa.utf8()),
            retrieval,
            chunks,
            pa.array(batch.num_chunks, pa.int32()),
            pa.array(_checksums(retrieval, chunks), pa.uint32()),
        ]
        return pa.table(columns, schema=table_schema(self.manifest, vectors.shape[1]))

    @cached_property
    def _builder(self) -> PromptBuilder:
        if self.model is None:
            raise InputError(f"Passages can only be added with the model whose vectors the index holds: PassageIndex.open({self.path!r}, model=…).")
        return PromptBuilder(self.model.tokenizer, chunk_size=self.model.config.chunk_size)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def count(self) -> int:
        """Number of passages."""
        return self.table.count

    def search(self, question: str, *, top_k: int = 8, mode: str = "dense", where: str | None = None, exact: bool = False) -> list[Hit]:
        """The `top_k` best passages: by meaning (`dense`), by words (`text`, BM25), or by both rankings fused (`hybrid`).

        `where` is an SQL filter over id, title, text, num_chunks and metadata, for example
        `json_get_string(metadata, 'source') = 'a.txt'`. `exact` compares with every vector, however large the index.
        Raises InputError for another mode, a blank question, `top_k` below 1 and a filter that cannot be read.
        """
        return self.search_batch([question], top_k=top_k, mode=mode, where=where, exact=exact)[0]

    def search_batch(self, questions: Sequence[str], *, top_k: int = 8, mode: str = "dense", where: str | None = None, exact: bool = False) -> list[list[Hit]]:
        """As `search`, for several questions: their vectors are made together, and one read looks for all of them."""
        if mode not in MODES:
            raise InputError(f"mode must be one of {', '.join(MODES)}, was {mode!r}.")
        check_whole("top_k", top_k, minimum=1, maximum=MAX_TOP_K)
        if isinstance(questions, str):
            raise InputError("The questions must be a list of texts, was one text: call search, or put it between brackets.")
        if where is not None and not isinstance(where, str):
            raise InputError(f"The filter must be SQL text, was {where!r}: write for example  title = 'Paris'.")
        check_filter(where)
        for question in questions:
            check_question(question)
        depth = max(50, 4 * top_k) if mode == "hybrid" else top_k
        try:
            dense = self._dense(questions, depth, where, exact) if mode != "text" and questions else []
            text = [self._text(question, depth, where) for question in questions] if mode != "dense" else []
        except (ValueError, RuntimeError) as error:
            if where is None or isinstance(error, RefragError):
                raise
            reason = str(error).split(", /")[0].splitlines()[0]
            raise InputError(f"The filter {where!r} cannot be used ({reason}): write SQL such as  title = 'Paris'  or  json_get_string(metadata, 'source') = 'a.txt'") from error
        if mode == "hybrid":
            return [_fused(pair)[:top_k] for pair in zip(dense, text, strict=True)]
        return dense or text

    def _dense(self, questions: Sequence[str], limit: int, where: str | None, exact: bool) -> list[list[Hit]]:
        tables = self.table.nearest(self.retriever.encode_questions(questions), PASSAGE_COLUMNS, limit=limit, where=where, exact=exact)
        return [_hits(rows, [1 - distance for distance in rows["_distance"].to_pylist()]) for rows in tables]

    def _text(self, question: str, limit: int, where: str | None) -> list[Hit]:
        rows = self.table.matching(question, PASSAGE_COLUMNS, limit=limit, where=where)
        return _hits(rows, rows["_score"].to_pylist())

    def chunk_embeds(self, ids: Sequence[str]) -> dict[str, Float[Tensor, "_ enc"]]:
        """The stored chunk vectors of passages, float32 on the CPU, by id; unknown ids are left out. One read for all."""
        rows = self.table.rows(ids, ("id", "chunk_embeds"))
        vectors = unpack(rows["chunk_embeds"], self.settings.storage, self.manifest.encoder_width)
        return dict(zip(rows["id"].to_pylist(), vectors, strict=True))

    def stored(self, ids: Sequence[str]) -> dict[str, tuple[str, Float[Tensor, "_ enc"]]]:
        """As `chunk_embeds`, each with the text it was made of, from the same read."""
        rows = self.table.rows(ids, ("id", "text", "chunk_embeds"))
        vectors = unpack(rows["chunk_embeds"], self.settings.storage, self.manifest.encoder_width)
        return dict(zip(rows["id"].to_pylist(), zip(rows["text"].to_pylist(), vectors, strict=True), strict=True))

    def known(self, ids: Sequence[str]) -> set[str]:
        """Which of these ids there are."""
        return set(self.table.rows(ids, ("id",))["id"].to_pylist())

    def passages(self, ids: Sequence[str]) -> dict[str, Passage]:
        """Passages by id; unknown ids are left out."""
        rows = self.table.rows(ids, PASSAGE_COLUMNS)
        return {passage.id: passage for passage in _passages(rows)}

    def retrieval_vectors(self) -> tuple[list[str], Float[np.ndarray, "passage width"]]:
        """All ids and their retrieval vectors, float32, in memory: for other retrievers over the same vectors."""
        batches = list(self.table.scan(("id", "vector")))
        ids = [identity for batch in batches for identity in batch["id"].to_pylist()]
        none = np.empty((0, self.table.schema.field("vector").type.list_size), np.float32)
        return ids, np.concatenate([none, *(_matrix(batch["vector"]) for batch in batches)])

    # ── inspection ───────────────────────────────────────────────────────────────────────────────────────────────────

    def info(self) -> dict[str, Any]:
        """What the index holds and what its vectors depend on, as plain values."""
        chunks = sum(int(np.sum(batch["num_chunks"].to_numpy())) for batch in self.table.scan(("num_chunks",)))
        model = {key: value for key, value in self.manifest.model.items() if not key.startswith("projector")}
        counts = {"path": self.path, "format_version": self.manifest.format_version, "passages": self.count, "chunks": chunks}
        return counts | self.table.info() | {"storage": self.settings.storage, "model": model, "retriever": dict(self.manifest.retriever)}

    def verify(self, *, progress: Callable[[int], object] | None = None) -> list[str]:
        """Reads everything and says, a sentence each, what is wrong; an empty list: nothing. With a model, chunk counts are checked too.

        `progress` is called with the number of passages read.
        """
        problems: list[str] = []
        seen: set[str] = set()
        try:
            for batch in self.table.scan((*PASSAGE_COLUMNS, "content_hash", "vector", "chunk_embeds", "num_chunks", "vectors_crc32"), batch_size=256):
                rows = pa.Table.from_batches([batch])
                passages = _passages(rows)
                for passage in passages:
                    if passage.id in seen:
                        problems.append(f"Passage {passage.id!r} is stored twice.")
                    seen.add(passage.id)
                problems += self._problems(rows, passages)
                if progress:
                    progress(len(passages))
            self.table.rows([*seen][:1], ("id",))  # the files of the search indexes
            self.table.matching("a", ("id",), limit=1, where=None)
        except DamagedIndexError as error:
            problems.append(str(error))
        return problems

    def _problems(self, rows: pa.Table, passages: list[Passage]) -> Iterator[str]:
        row_bytes = row_type(self.settings.storage, self.manifest.encoder_width).itemsize
        vectors = rows["vector"].combine_chunks()
        norms, checksums = np.linalg.norm(_matrix(vectors), axis=1), _checksums(vectors, rows["chunk_embeds"].combine_chunks())
        chunked = self._builder.chunk_batch([passage.text for passage in passages]) if self.model is not None else None
        for number, passage in enumerate(passages):
            cell, count = rows["chunk_embeds"][number].as_py(), rows["num_chunks"][number].as_py()
            if rows["content_hash"][number].as_py() != content_hash(passage):
                yield f"Passage {passage.id!r} is not the one that was stored: its content hash differs."
            if rows["vectors_crc32"][number].as_py() != checksums[number]:
                yield f"Passage {passage.id!r} does not hold the vectors that were stored: their checksum differs."
            if len(cell) != count * row_bytes:
                yield f"Passage {passage.id!r} should hold {count} chunk vectors, its bytes are {len(cell)}."
            elif not np.isfinite(unpack(pa.array([cell], pa.large_binary()), self.settings.storage, self.manifest.encoder_width)[0].numpy()).all():
                yield f"Passage {passage.id!r} holds a chunk vector that is not finite."
            if chunked is not None and len(chunked[number].spans) != count:
                yield f"Passage {passage.id!r} holds {count} chunk vectors, the model cuts it into {len(chunked[number].spans)} chunks."
            if not abs(norms[number] - 1) < 0.01:
                yield f"Passage {passage.id!r} has a retrieval vector of length {norms[number]:.3f}, not 1."


def _checksums(vectors: pa.FixedSizeListArray, chunks: pa.LargeBinaryArray) -> list[int]:
    """CRC-32 of each passage's retrieval vector and, after it, its chunk vectors."""
    halves = vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(vectors), -1)
    return [crc32(cell.as_buffer(), crc32(vector.tobytes())) for vector, cell in zip(halves, chunks, strict=True)]


def content_hash(passage: Passage) -> str:
    """Changes when the title, text or metadata of a passage do. Raises InputError for what cannot be stored."""
    for name in ("id", "title", "text"):
        if not isinstance(value := getattr(passage, name), str):
            raise InputError(f"The {name} of a passage must be a text, was {value!r}: put it between quotes.")
    try:
        passage.id.encode()
        return sha256(json_text({"title": passage.title, "text": passage.text, "metadata": passage.metadata}).encode()).hexdigest()[:32]
    except UnicodeEncodeError as error:
        raise InputError(f"The passage {passage.id!r} holds half a character (a lone surrogate): mend its id, title, text or metadata.") from error


def _model_name(model: "RefragModel") -> str:
    """The name a model was loaded by, an absolute path for a folder; empty for one made in memory."""
    name = str(model.name_or_path or "")
    with suppress(NotFoundError):
        if name == resolve_model(BUNDLED_MODEL):
            return BUNDLED_MODEL
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


def local_address(path: str | Path) -> str:
    """A folder with `~` expanded; an object store's address as it is. Raises InputError for an empty text."""
    if isinstance(path, str) and not path.strip():
        raise InputError("The index needs a folder, its name was empty: pass --index FOLDER.")
    return path if isinstance(path, str) and "://" in path else str(Path(path).expanduser())


def _matrix(vectors: pa.FixedSizeListArray) -> Float[np.ndarray, "passage width"]:
    return vectors.flatten().to_numpy().reshape(len(vectors), -1).astype(np.float32)


def _passages(rows: pa.Table) -> list[Passage]:
    columns = [rows[name].to_pylist() for name in PASSAGE_COLUMNS]
    return [Passage(identity, text, title, json.loads(metadata)) for identity, title, text, metadata in zip(*columns, strict=True)]


def _hits(rows: pa.Table, scores: Sequence[float]) -> list[Hit]:
    return [Hit(passage, score) for passage, score in zip(_passages(rows), scores, strict=True)]


def _fused(rankings: Sequence[Sequence[Hit]]) -> list[Hit]:
    passages = {hit.passage.id: hit.passage for ranking in rankings for hit in ranking}
    scores = fuse([[hit.passage.id for hit in ranking] for ranking in rankings])
    return [Hit(passages[identity], score) for identity, score in scores.items()]


def _count(totals: Counter[str], pending: Future[tuple[int, int]] | None) -> None:
    """Waits for a write and counts what it did."""
    if pending is not None:
        added, updated = pending.result()
        totals.update(added=added, updated=updated)
