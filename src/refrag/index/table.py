"""The Lance table of an index: opened, read and written without a word about models."""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from ..errors import BackendError, InputError, NotFoundError
from .manifest import MANIFEST_KEY, Manifest

log = logging.getLogger(__name__)

TABLE = "passages"
APPROXIMATE_FROM = 50_000
"""Passages from which on dense search uses an approximate (IVF) index."""
NUM_PROBES = 32
"""Partitions that an approximate search reads, of about the square root of the number of passages."""
KEPT_VERSIONS = timedelta(milliseconds=1)
"""Age from which on `optimize` deletes versions that nobody can need any more."""

T = TypeVar("T")


def table_schema(manifest: Manifest, retrieval_width: int) -> pa.Schema:
    """Columns of the table, the manifest in its metadata."""
    fields = [
        pa.field("id", pa.utf8(), nullable=False),
        pa.field("title", pa.utf8()),
        pa.field("text", pa.utf8()),
        pa.field("search_text", pa.utf8()),
        pa.field("metadata", pa.json_(pa.utf8())),
        pa.field("content_hash", pa.utf8()),
        pa.field("vector", pa.list_(pa.float16(), retrieval_width)),
        pa.field("chunk_embeds", pa.large_binary()),
        pa.field("num_chunks", pa.int32()),
    ]
    return pa.schema(fields, metadata={MANIFEST_KEY: manifest.to_json().encode()})


def is_remote(path: str) -> bool:
    """An object store's address, such as s3://bucket/index."""
    return "://" in path


def quoted(ids: Sequence[str]) -> str:
    """An SQL filter for these ids."""
    return "id IN ({})".format(", ".join("'" + identity.replace("'", "''") + "'" for identity in ids))


class PassageTable:
    """One Lance table. Every change is one commit: a reader, or the next process after a crash, sees it whole or not at all."""

    def __init__(self, table: Any, path: str) -> None:
        self._table = table
        self.path = path

    @classmethod
    def open(cls, path: str) -> "PassageTable":
        """Raises NotFoundError when there is no index at `path`."""
        missing = NotFoundError(f"There is no index at {path}: make one with  refrag index build PATH… --index {path}")
        if not is_remote(path) and not Path(path).is_dir():
            raise missing
        try:
            return cls(_connect(path).open_table(TABLE), path)
        except ValueError as error:
            raise missing from error

    @classmethod
    def create(cls, path: str, schema: pa.Schema, *, replace: bool) -> "PassageTable":
        """A new, empty table with its indexes, in place of one that is there only if `replace`."""
        from lancedb.index import FTS, BTree

        if not is_remote(path) and Path(path).exists() and not Path(path).is_dir():
            raise InputError(f"{path} is a file, an index needs a folder: pass another --index.")
        with plain_errors(path):
            try:
                table = _connect(path).create_table(TABLE, schema=schema, mode="overwrite" if replace else "create")
            except ValueError as error:
                if "already exists" not in str(error):
                    raise
                raise InputError(f"There is an index at {path} already: open it, or replace it with --rebuild.") from error
            table.create_index("id", config=BTree())
            table.create_index("search_text", config=FTS(base_tokenizer="icu"))  # finds words in scripts without spaces too
        return cls(table, path)

    @property
    def schema(self) -> pa.Schema:
        return self._table.schema

    @property
    def count(self) -> int:
        """Number of passages."""
        return self._read(lambda table: table.count_rows())

    def info(self) -> dict[str, int]:
        """Size on disk of the current version, its number, and how many files hold it."""
        stats = self._read(lambda table: table.stats())
        return {"bytes": stats["total_bytes"], "version": self._table.version, "fragments": stats["fragment_stats"]["num_fragments"]}

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def rows(self, ids: Sequence[str], columns: Sequence[str]) -> pa.Table:
        """The rows of these ids, in any order; unknown ids are left out. One read through the B-tree on id."""
        if not ids:
            return self.schema.empty_table().select(list(columns))
        return self._read(lambda table: table.search().where(quoted(ids)).select(list(columns)).limit(len(ids)).to_arrow())

    def scan(self, columns: Sequence[str], *, batch_size: int = 1024) -> Iterator[pa.RecordBatch]:
        """All rows, in batches."""
        return iter(self._read(lambda table: table.search().select(list(columns)).to_batches(batch_size)))

    def nearest(self, vector: Any, columns: Sequence[str], *, limit: int, where: str | None, exact: bool) -> pa.Table:
        """The rows whose vector has the largest inner product, `_distance` (1 - product) ascending."""

        def query(table: Any) -> pa.Table:
            search = table.search(vector, vector_column_name="vector").distance_type("dot")
            search = search.bypass_vector_index() if exact else search.nprobes(NUM_PROBES)
            search = search.where(where, prefilter=True) if where else search
            return search.select([*columns, "_distance"]).limit(limit).to_arrow()

        return self._read(query)

    def matching(self, words: str, columns: Sequence[str], *, limit: int, where: str | None) -> pa.Table:
        """The rows that hold the words, by BM25, `_score` descending."""
        from lancedb.query import MatchQuery

        def query(table: Any) -> pa.Table:
            search = table.search(MatchQuery(words, "search_text"), query_type="fts")
            search = search.where(where, prefilter=True) if where else search
            return search.select([*columns, "_score"]).limit(limit).to_arrow()

        return self._read(query)

    def _read(self, query: Callable[[Any], T]) -> T:
        """A query on the newest version; once more when another process has just deleted the version that was read."""
        try:
            return query(self._table)
        except RuntimeError as error:
            if "Not found" not in str(error):
                raise
            self._table.checkout_latest()
            return query(self._table)

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def merge(self, rows: pa.Table) -> tuple[int, int]:
        """Inserts new ids and replaces known ones, in one commit. Returns (inserted, replaced)."""
        with plain_errors(self.path):
            result = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)
        return result.num_inserted_rows, result.num_updated_rows

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes these ids. Returns how many there were."""
        with plain_errors(self.path):
            return self._table.delete(quoted(ids)).num_deleted_rows if ids else 0

    def optimize(self) -> None:
        """Joins small files, brings the indexes up to date, makes the approximate one when large, deletes old versions."""
        from lancedb.index import IvfFlat

        with plain_errors(self.path):
            self._table.optimize(cleanup_older_than=KEPT_VERSIONS)
            names = {index.name for index in self._table.list_indices()}
            if self.count >= APPROXIMATE_FROM and "vector_idx" not in names:
                self._table.create_index("vector", config=IvfFlat(distance_type="dot", num_partitions=max(2, round(self.count**0.5))))


def _connect(path: str) -> Any:
    import lancedb

    return lancedb.connect(path, read_consistency_interval=timedelta(seconds=1))


@contextmanager
def plain_errors(path: str) -> Generator[None]:
    """A full disk and a forbidden folder become one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reasons = {"No space left": "the disk is full", "File too large": "the file system refuses files of this size", "Permission denied": "it may not be written"}
        reason = next((words for sign, words in reasons.items() if sign in str(error)), None)
        if reason is None or isinstance(error, BackendError):
            raise
        raise BackendError(f"The index at {path} could not be written since {reason}: what was there before is whole; make room and run the same command again.") from error
