"""The Lance table of an index: opened, read and written without a word about models."""

import ctypes
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from ..errors import BackendError, InputError, NotFoundError, RefragError
from .manifest import MANIFEST_KEY, Manifest

log = logging.getLogger(__name__)

TABLE = "passages"
OF_THE_SYSTEM = ("lost+found", "Thumbs.db", "desktop.ini")
REBUILD = "rebuild"
"""Name of a table that is filled beside the one in use, to take its place."""
REPLACED = "replaced"
"""Name of the table that was in use, while the new one takes its place. There without TABLE: a kill came between two renames."""
APPROXIMATE_FROM = 50_000
"""Passages from which on dense search uses an approximate (IVF) index."""
NUM_PROBES = 32
"""Partitions that an approximate search reads, of about the square root of the number of passages."""
KEPT_VERSIONS = timedelta(milliseconds=1)
"""Age from which on `optimize` deletes versions that nobody can need any more."""

WRITER_PATIENCE_S = 3.0
"""Longest wait for another writer, in seconds."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`: free memory at the heap's end, and size of a block, in bytes, from which on it goes back to the system when freed."""

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
        pa.field("vectors_crc32", pa.uint32()),
    ]
    return pa.schema(fields, metadata={MANIFEST_KEY: manifest.to_json().encode()})


def _is_free(folder: Path) -> bool:
    """Whether a local folder is not there, or holds nothing but tables of Lance, hidden files and what file systems put there."""
    return not folder.is_dir() or all(own.name.startswith(".") or own.suffix == ".lance" or own.name in OF_THE_SYSTEM for own in folder.iterdir())


def is_remote(path: str) -> bool:
    """An object store's address, such as s3://bucket/index."""
    return "://" in path


def quoted(ids: Iterable[str], column: str = "id") -> str:
    """An SQL filter for these ids, or for these values of another expression."""
    return f"{column} IN ({{}})".format(", ".join("'" + identity.replace("'", "''") + "'" for identity in ids))


class DamagedIndexError(BackendError):
    """A file of the index is damaged or missing."""


class PassageTable:
    """One Lance table. Every change is one commit: a reader, or the next process after a crash, sees it whole or not at all."""

    def __init__(self, table: Any, path: str) -> None:
        self._table = table
        self.path = path

    @classmethod
    def open(cls, path: str) -> "PassageTable":
        """Raises NotFoundError when there is no index at `path`, DamagedIndexError when its files cannot be read."""
        missing = NotFoundError(f"There is no index at {path}: make one with  refrag index build PATH… --index {path}")
        if not is_remote(path) and not Path(path).is_dir():
            raise missing
        PassageTable.finish_swap(path)
        try:
            with readable(path):
                return cls(_connect(path).open_table(TABLE), path)
        except ValueError as error:
            raise missing from error

    @classmethod
    def create(cls, path: str, schema: pa.Schema, *, replace: bool, name: str = TABLE) -> "PassageTable":
        """A new, empty table with its indexes, in place of one that is there only if `replace`. Raises InputError where no folder can be."""
        if not is_remote(path) and Path(path).exists() and not Path(path).is_dir():
            raise InputError(f"{path} is a file, an index needs a folder: pass another --index.")
        if name == TABLE and not is_remote(path) and not cls.exists(path) and not _is_free(Path(path)):
            raise InputError(f"An index needs a folder of its own, {path} holds other files: pass another --index.")
        with plain_errors(path):
            try:
                lance = _connect(path).create_table(name, schema=schema, mode="overwrite" if replace else "create")
            except ValueError as error:
                if "already exists" not in str(error):
                    raise
                raise InputError(f"There is an index at {path} already: open it, or replace it with --rebuild.") from error
            except (NotADirectoryError, FileNotFoundError) as error:
                raise InputError(f"No folder can be made at {path} ({error.strerror}): pass another --index.") from error
            table = cls(lance, path)
            table.make_indexes()
        return table

    @staticmethod
    def exists(path: str) -> bool:
        """Whether a local folder holds a table, readable or not."""
        return not is_remote(path) and _folder(path, TABLE).is_dir()

    @staticmethod
    def drop(path: str, name: str = TABLE) -> None:
        """Removes a table's files from a local folder, if there are any."""
        shutil.rmtree(_folder(path, name), ignore_errors=True)

    @staticmethod
    def swap(path: str) -> None:
        """Puts the table REBUILD of a local folder in the place of the one in use: two renames, then the old files go."""
        with plain_errors(path):
            PassageTable.drop(path, REPLACED)
            _folder(path, TABLE).rename(_folder(path, REPLACED))
            PassageTable.finish_swap(path)
        PassageTable.drop(path, REPLACED)

    @staticmethod
    def finish_swap(path: str) -> None:
        """The second rename of `swap`, where a kill came before it: the new table comes into use, or the old one again if there is no new one.

        Safe beside another process that does the same: a rename onto a table fails, and then there is one. Raises BackendError
        where the folder may not be changed.
        """
        if is_remote(path) or _folder(path, TABLE).exists() or not _folder(path, REPLACED).is_dir():
            return
        for name in (REBUILD, REPLACED):
            try:
                _folder(path, name).rename(_folder(path, TABLE))
                return
            except OSError:
                if _folder(path, TABLE).exists():
                    return
        raise BackendError(f"The index at {path} could not be put in its place: rename {REBUILD}.lance or {REPLACED}.lance in it to {TABLE}.lance.")

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

    def scan(self, columns: Sequence[str], *, batch_size: int = 1024, where: str | None = None) -> Iterator[pa.RecordBatch]:
        """All rows, or those that a filter leaves, in batches."""

        def query(table: Any) -> Any:
            search = table.search().where(where) if where else table.search()
            return search.select(list(columns)).to_batches(batch_size)

        batches = iter(self._read(query))
        with readable(self.path):
            yield from batches

    def nearest(self, vectors: Any, columns: Sequence[str], *, limit: int, where: str | None, exact: bool) -> list[pa.Table]:
        """For each of the vectors [query width] the rows with the largest inner product, `_distance` (1 - product) ascending. One read for all."""

        def query(table: Any) -> pa.Table:
            search = table.search(vectors if len(vectors) > 1 else vectors[0], vector_column_name="vector").distance_type("dot")
            search = search.bypass_vector_index() if exact else search.nprobes(NUM_PROBES)
            search = search.where(where, prefilter=True) if where else search
            return search.select([*columns, "_distance"]).limit(limit).to_arrow()

        found = self._read(query)
        if len(vectors) == 1:
            return [found]
        numbers = found["query_index"].to_numpy()
        return [found.filter(pa.array(numbers == number)).sort_by("_distance") for number in range(len(vectors))]

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
        with readable(self.path):
            try:
                return query(self._table)
            except RuntimeError as error:
                if "Not found" not in str(error):
                    raise
                self._table.checkout_latest()
                return query(self._table)

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def writing(self) -> Generator[None]:
        """Holds the folder against other writers, in this process and others; a process that dies lets go of it. An object store cannot be held.

        Raises BackendError when another one writes for longer than WRITER_PATIENCE_S. Do not enter it twice.
        """
        if is_remote(self.path):
            self._read(lambda table: table.checkout_latest())
            yield
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            until = time.monotonic() + WRITER_PATIENCE_S
            while not _held(folder):
                if time.monotonic() > until:
                    raise BackendError(f"Another process is writing to the index at {self.path}: wait until it is done, then run the same command again.")
                time.sleep(0.05)
            self._read(lambda table: table.checkout_latest())  # what the writer before has left
            yield
        finally:
            os.close(folder)

    def append(self, rows: pa.Table) -> int:
        """Adds rows whose ids are all new, in one commit: unlike `merge` it looks at nothing else. Returns how many."""
        with plain_errors(self.path), _memory_returned():
            self._table.add(rows)
        return rows.num_rows

    def merge(self, rows: pa.Table) -> tuple[int, int]:
        """Inserts new ids and replaces known ones, in one commit; takes more memory the larger the table is. Returns (inserted, replaced)."""
        with plain_errors(self.path), _memory_returned():
            merge = self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            result = merge.use_index(False).execute(rows)  # with the index, the memory of each merge grows with the table
        return result.num_inserted_rows, result.num_updated_rows

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes these ids. Returns how many there were."""
        with plain_errors(self.path):
            return self._table.delete(quoted(ids)).num_deleted_rows if ids else 0

    def optimize(self) -> None:
        """Joins small files, brings the indexes up to date, makes those that are missing, deletes old versions."""
        from lancedb.index import IvfFlat

        with plain_errors(self.path), _memory_returned():
            self.make_indexes()
            self._table.optimize(cleanup_older_than=KEPT_VERSIONS)
            names = {index.name for index in self._table.list_indices()}
            if self.count >= APPROXIMATE_FROM and "vector_idx" not in names:
                self._table.create_index("vector", config=IvfFlat(distance_type="dot", num_partitions=max(2, round(self.count**0.5))))

    def make_indexes(self) -> None:
        """Makes the indexes on id and on words where they are missing: a kill may have come between the table and them."""
        from lancedb.index import FTS, BTree

        present = {column for index in self._table.list_indices() for column in index.columns}
        if "id" not in present:
            self._table.create_index("id", config=BTree())
        if "search_text" not in present:
            self._table.create_index("search_text", config=FTS(base_tokenizer="icu"))  # finds words in scripts without spaces too


def _held(folder: int) -> bool:
    """Whether the open folder could be locked for this writer."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks
        log.debug("The folder of the index cannot be locked: %s", error)
    return True


@contextmanager
def _memory_returned() -> Generator[None]:
    """Memory that Lance frees goes back to the system (glibc; nothing elsewhere). Else the heaps of its threads keep what it took, more the larger the table is."""
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, 64 << 10)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # where glibc's own, moving limits end
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)


def _folder(path: str, name: str) -> Path:
    return Path(path) / f"{name}.lance"


def _connect(path: str) -> Any:
    import lancedb

    return lancedb.connect(path, read_consistency_interval=timedelta(seconds=1), session=_session())


@lru_cache(maxsize=1)
def _session() -> Any:
    """One bounded cache for all indexes of the process (Lance's own bound is 7 GB), and short batches when it joins files."""
    import lancedb

    os.environ.setdefault("LANCE_DEFAULT_BATCH_SIZE", "256")  # rows; its 8,192 passages with their vectors are hundreds of megabytes
    os.environ.setdefault("LANCE_DEFAULT_IO_BUFFER_SIZE", str(8 << 20))  # bytes read ahead; its own limit is 2 GB
    return lancedb.Session(index_cache_size_bytes=256 << 20, metadata_cache_size_bytes=16 << 20)


@contextmanager
def readable(path: str) -> Generator[None]:
    """Damaged and missing files, and an object store that does not answer, become one sentence."""
    try:
        yield
    except Exception as error:
        panicked = type(error).__name__ == "RustPanic"  # how Lance ends on some damaged files
        if not panicked and not isinstance(error, OSError | RuntimeError | ValueError):
            raise
        text = str(error)
        if is_remote(path) and "Generic " in text and not isinstance(error, RefragError):  # how the object_store library begins such errors
            reason = text[text.index("Generic ") + len("Generic ") :].splitlines()[0].split(", /")[0]
            raise BackendError(f"The index at {path} cannot be reached ({reason}): check the address, the network and the credentials.") from error
        if isinstance(error, RefragError) or not (panicked or "LanceError(" in text or "lance error: Not found" in text or "does not appear to be a Lance file" in text):
            raise
        reason = text.removeprefix("lance error: ").splitlines()[0].split(", /")[0]
        raise DamagedIndexError(
            f"The index at {path} cannot be read since a file of it is damaged or missing ({reason}): make it anew with  refrag index build PATH… --index {path} --rebuild"
        ) from error


@contextmanager
def plain_errors(path: str) -> Generator[None]:
    """A full disk and a forbidden folder become one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reasons = {"No space left": "the disk is full", "File too large": "the file system refuses files of this size", "Permission denied": "it may not be written", "Operation not permitted": "it may not be written", "Read-only file system": "its file system is read-only"}
        reason = next((words for sign, words in reasons.items() if sign in str(error)), None)
        if reason is None or isinstance(error, BackendError):
            raise
        raise BackendError(f"The index at {path} could not be written since {reason}: what was there before is whole; make room and run the same command again.") from error
