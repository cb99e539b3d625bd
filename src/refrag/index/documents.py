"""Files and folders -> documents: a title, a text and where they come from. One reader per format."""

import csv
import gzip
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from html.parser import HTMLParser
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from ..errors import InputError, NotFoundError, first_line, missing_extra

log = logging.getLogger(__name__)

BLOCK_CHARACTERS = 1_000_000
"""Plain text is read in blocks of about this size, which end at a blank line: a file of any size fits."""

KNOWN = ("id", "text", "title", "metadata")
_HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]+))?")
"""`owner/name`, perhaps with a split: `owner/name:train`."""
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
"""What Python's `surrogateescape` makes of a byte that an encoding cannot read."""

BadRow = Callable[[InputError], None]
"""Told of a row or file that cannot be read: raises the error, or counts it and returns."""


@dataclass(frozen=True)
class Document:
    """A text before it is split. Pieces of one file follow each other with the same id; `start` is where a piece begins in the file's text."""

    id: str
    text: str
    title: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    start: int | None = None
    """None: a row, which keeps its id when it needs no splitting."""


@dataclass(frozen=True)
class Source:
    """A file to read, and how."""

    path: Path
    encoding: str
    on_bad: BadRow
    text_column: str = "text"
    """Key or column of a row that holds its text."""
    subset: str | None = None
    """Subset (configuration) of a dataset on the hub."""

    def open(self, *, errors: str = "strict", newline: str | None = None) -> TextIOWrapper:
        """The file as text, decompressed where its name ends in .gz; a byte order mark is not text."""
        encoding = "utf-8-sig" if self._is_utf8 else self.encoding
        return self._opener(self.path, "rt", encoding=encoding, errors=errors, newline=newline)

    def lines(self) -> Iterator[tuple[int, str | InputError]]:
        """Lines with their numbers, decoded one by one: an InputError stands for one that the encoding cannot read."""
        if "\n".encode(self.encoding) != b"\n":  # UTF-16 and others whose bytes cannot be cut into lines
            with self.open() as file:
                yield from enumerate(file, 1)
            return
        with self._opener(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield number, line.decode(self.encoding).removeprefix("\ufeff" if number == 1 and self._is_utf8 else "")
                except UnicodeDecodeError as error:
                    yield number, self._undecodable(f"{self.path}, line {number}", line[error.start])

    def escaped(self, text: str, where: str) -> InputError | None:
        """The error for text that was read with `surrogateescape` and holds a byte that the encoding cannot read, else None."""
        found = _ESCAPED_BYTE.search(text)
        return self._undecodable(where, ord(found[0]) - 0xDC00) if found else None

    def _undecodable(self, where: str, byte: int) -> InputError:
        return InputError(
            f"{where}: this is not {self.encoding} text (byte 0x{byte:02x});"
            " pass its encoding, for example --encoding latin-1, or keep the rest with --skip-bad."
        )

    @property
    def _opener(self) -> Callable[..., Any]:
        return gzip.open if self.path.suffix.lower() == ".gz" else open

    @property
    def _is_utf8(self) -> bool:
        return self.encoding.lower().replace("_", "-") in ("utf-8", "utf8")

    @property
    def stem(self) -> str:
        """The file's name without its endings."""
        return self.path.name.removesuffix(".gz").rsplit(".", 1)[0]


def from_row(row: Any, source: str, where: str, on_bad: BadRow, text_column: str = "text") -> Iterator[Document]:
    """The documents of one row: its `text_column`, or the texts under `passages` (question answering rows).

    The id is the row's, else made of title and a hash of both, so that the same passage has the same id everywhere.
    """
    if isinstance(row, str):
        row = {text_column: row}
    if isinstance(row, Mapping) and isinstance(row.get("passages"), list):
        for passage in row["passages"]:
            yield from from_row(passage, source, where, on_bad, text_column)
        return
    if not isinstance(row, Mapping) or not isinstance(row.get(text_column), str):
        on_bad(InputError(f'{where}: a row must have a string under "{text_column}" or a list under "passages", has {_given(row, text_column)}; {_mend(row)}.'))
        return
    text, title = row[text_column], str(row.get("title") or "")
    given_metadata = row.get("metadata")
    metadata = dict(given_metadata) if isinstance(given_metadata, Mapping) else {} if _is_missing(given_metadata) else {"metadata": given_metadata}
    known = {"id", "title", "metadata", text_column}
    metadata |= {key: value for key, value in row.items() if key not in known and not _is_missing(value)}
    if "source" in metadata:
        metadata["row_source"] = metadata["source"]  # `source` is the file: what it no longer holds is found by it
    metadata["source"] = source
    identity = row.get("id")
    for name, value in (("text", text), ("title", title), ("id", identity), ("metadata", metadata)):
        try:
            (value if isinstance(value, str) else json_text(value)).encode()
        except UnicodeEncodeError:
            on_bad(InputError(f"{where}: the {name} holds half a character (a lone surrogate); mend it, or keep the rest with --skip-bad."))
            return
        except InputError as error:
            on_bad(InputError(f"{where}: {str(error).rstrip('.')}, or keep the rest with --skip-bad."))
            return
    digest = sha256(f"{title}\0{text}".encode()).hexdigest()[:12]
    yield Document(f"{title}#{digest}" if identity is None or identity == "" else str(identity), text, title, metadata)


def _given(row: Any, text_column: str) -> str:
    if not isinstance(row, Mapping):
        return f"a {type(row).__name__}"
    return f"a {type(row[text_column]).__name__} there" if text_column in row else f"the keys {', '.join(map(str, row))}"


def _is_missing(value: Any) -> bool:
    """None, or NaN, by which pandas means the same."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _mend(row: Any) -> str:
    """What to do about a row without a text: another of its columns may be it."""
    texts = [str(key) for key, value in row.items() if isinstance(value, str) and key not in KNOWN] if isinstance(row, Mapping) else []
    return f"name the column that holds it, such as --text-column {texts[0]}, or keep the rest with --skip-bad" if texts else "mend it, or keep the rest with --skip-bad"


def json_text(value: Any) -> str:
    """A passage's metadata as JSON, keys sorted. Raises InputError for what JSON cannot hold."""
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"The metadata of a passage must be JSON values under string keys ({error}): leave the value out.") from error


def read_text(source: Source) -> Iterator[Document]:
    """Plain text and Markdown: one document, in blocks. A Markdown file's title is its first heading."""
    start, title = 0, source.stem
    with source.open() as file:
        while block := _block(file):
            if start == 0 and ".md" in source.path.name.lower():
                title = next((line.lstrip("# ").strip() for line in block.splitlines() if line.startswith("#")), title)
            yield Document(str(source.path), block, title, {"source": str(source.path)}, start)
            start += len(block)


def _block(file: TextIOWrapper) -> str:
    lines, size = [], 0
    for line in iter(lambda: file.readline(BLOCK_CHARACTERS), ""):
        lines.append(line)
        size += len(line)
        if size >= 2 * BLOCK_CHARACTERS or (size >= BLOCK_CHARACTERS and not line.strip()):
            break
    return "".join(lines)


def read_json_lines(source: Source) -> Iterator[Document]:
    """One JSON row a line."""
    for number, line in source.lines():
        if isinstance(line, InputError):
            source.on_bad(line)
            continue
        if not line.strip():
            continue
        where = f"{source.path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError
            source.on_bad(InputError(f"{where}: this line is not JSON ({error}); mend it, or keep the rest with --skip-bad."))
            continue
        yield from from_row(row, str(source.path), where, source.on_bad, source.text_column)


def read_json(source: Source) -> Iterator[Document]:
    """A JSON list of rows or one row, held in memory whole; a file of JSON lines under this name is read as such.

    A byte that the encoding cannot read spoils its row only.
    """
    with source.open(errors="surrogateescape") as file:
        text = file.read()
    undecodable = source.escaped(text, str(source.path))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):
            yield from read_json_lines(source)
        else:
            source.on_bad(undecodable or InputError(f"{source.path}: this file is not JSON ({error}); mend it, or keep the rest with --skip-bad."))
        return
    for number, row in enumerate(content if isinstance(content, list) else [content], 1):
        where = f"{source.path}, row {number}"
        if undecodable and (bad := source.escaped(json.dumps(row, ensure_ascii=False), where)):
            source.on_bad(bad)
            continue
        yield from from_row(row, str(source.path), where, source.on_bad, source.text_column)


def read_csv(source: Source) -> Iterator[Document]:
    """Comma- or tab-separated rows under a header with a `text` column."""
    csv.field_size_limit(1 << 30)
    tabs = ".tsv" in source.path.name.lower()
    with source.open(errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if tabs else ",", strict=True)
        if bad := source.escaped("".join(rows.fieldnames or ()), f"{source.path}, line 1"):
            source.on_bad(bad)
            return
        if source.text_column not in (rows.fieldnames or ()):
            names = list(rows.fieldnames or ["nothing"])
            source.on_bad(InputError(
                f"{source.path}: the header must name a column {source.text_column!r}, has {', '.join(names)}; "
                f"name the column that holds the text, such as --text-column {names[-1] or 'text'}, or keep the rest with --skip-bad."
            ))
            return
        for row in _csv_rows(rows, source):
            where = f"{source.path}, line {rows.line_num}"
            extra = row.pop(None, None)  # type: ignore[call-overload]
            if extra or row[source.text_column] is None:
                source.on_bad(InputError(f"{where}: this row has {'more' if extra else 'fewer'} cells than the header; quote it, or keep the rest with --skip-bad."))
            elif bad := source.escaped("".join(filter(None, row.values())), where):
                source.on_bad(bad)
            else:
                yield from from_row(row, str(source.path), where, source.on_bad, source.text_column)


def _csv_rows(rows: csv.DictReader, source: Source) -> Iterator[dict[str, Any]]:
    """The rows that can be read; a quote that is never closed would make one cell of all that follows."""
    while True:
        first = rows.reader.line_num + 1
        try:
            yield next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            source.on_bad(InputError(f"{source.path}, line {first}: this row is not CSV ({error}); mend its quotes, or keep the rest with --skip-bad."))


def read_parquet(source: Source) -> Iterator[Document]:
    """Rows with a `text` (or `passages`) column, a thousand at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source.path) as file:
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield from from_row(row, str(source.path), f"{source.path}, row {number}", source.on_bad, source.text_column)
    except pa.ArrowInvalid as error:
        source.on_bad(InputError(f"{source.path}: this is not a Parquet file ({first_line(error)}); write it again, or keep the rest with --skip-bad."))


def read_dataset(source: Source) -> Iterator[Document]:
    """A Hugging Face dataset written by `save_to_disk`, or one on the hub by its name; all its splits, one after the other, or the one named."""
    try:
        from datasets import load_dataset, load_from_disk
    except ImportError as error:
        raise missing_extra("datasets", "data", "Reading a Hugging Face dataset") from error
    saved = source.path.is_dir()
    try:
        if saved:
            loaded = load_from_disk(str(source.path))
        else:
            name, split = _hub_parts(source.path)
            loaded = load_dataset(name, source.subset, split=split, streaming=True)
    except Exception as error:  # errors of several libraries
        if saved:
            source.on_bad(InputError(f"{source.path}: this dataset cannot be read ({first_line(error)}); save it again, or keep the rest with --skip-bad."))
            return
        raise NotFoundError(
            f"The hub gave no dataset {source.path} ({first_line(error)}): check the name, its split (owner/name:train) and --subset."
        ) from error
    for part in loaded.values() if isinstance(loaded, dict) else [loaded]:
        for number, row in enumerate(_readable(part, source), 1):
            yield from from_row(row, str(source.path), f"{source.path}, row {number}", source.on_bad, source.text_column)


def _readable(rows: Iterable[Any], source: Source) -> Iterator[Any]:
    """The rows, up to where the dataset cannot be read any further."""
    remaining = iter(rows)
    while True:
        try:
            row = next(remaining)
        except StopIteration:
            return
        except Exception as error:  # errors of several libraries
            source.on_bad(InputError(f"{source.path}: this dataset cannot be read from here ({first_line(error)}); get it again, or keep the rest with --skip-bad."))
            return
        yield row


def read_pdf(source: Source) -> Iterator[Document]:
    """The text layer of a PDF, page by page; offsets count in the whole text, pages joined by a blank line."""
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError as error:
        raise missing_extra("pypdf", "docs", "Reading PDF files") from error
    start, found = 0, False
    try:
        reader = PdfReader(source.path)
        title = str((reader.metadata or {}).get("/Title") or "") or source.stem
        for number, page in enumerate(reader.pages, 1):
            text = (page.extract_text() or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # fonts can map to half characters
            found = found or bool(text.strip())
            yield Document(str(source.path), text, title, {"source": str(source.path), "page": number}, start)
            start += len(text) + 2
    except PyPdfError as error:
        source.on_bad(InputError(f"{source.path}: this PDF cannot be read ({error}); mend it, or keep the rest with --skip-bad."))
        return
    if not found:
        log.warning("%s has no text layer (a scan?): nothing of it is indexed.", source.path)


class _Page(HTMLParser):
    """Text of an HTML page: block elements are separated by blank lines, scripts and styles left out."""

    _BLOCKS = re.compile(r"address|article|aside|blockquote|br|d[dlt]|div|fig\w+|footer|form|h[1-6r]|header|li|main|nav|[ou]l|p|pre|section|table|tr")
    _HIDDEN = frozenset(("script", "style", "template", "noscript"))

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.lines: list[list[str]] = [[]]
        self.title = ""
        self._open: list[str] = []
        self.feed(markup)
        self.close()

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """Skips what is between `<![` and `>` when it is of no known kind, as browsers do."""
        try:
            return super().parse_marked_section(i, report)
        except AssertionError:
            return self.parse_bogus_comment(i)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._BLOCKS.fullmatch(tag):
            self.lines.append([])
        if tag in self._HIDDEN or tag == "title":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._BLOCKS.fullmatch(tag):
            self.lines.append([])
        if tag in self._open:
            del self._open[self._open.index(tag) :]

    def handle_data(self, data: str) -> None:
        if "title" in self._open:
            self.title += data
        elif not self._open:
            self.lines[-1].append(data)

    @property
    def text(self) -> str:
        return "\n\n".join(filter(None, (" ".join("".join(line).split()) for line in self.lines)))


def read_html(source: Source) -> Iterator[Document]:
    """The visible text of an HTML page; the title is the page's."""
    with source.open() as file:
        markup = file.read()
    try:
        page = _Page(markup)
    except AssertionError as error:
        source.on_bad(InputError(f"{source.path}: this HTML cannot be read ({error}); mend it, or keep the rest with --skip-bad."))
        return
    yield Document(str(source.path), page.text, " ".join(page.title.split()) or source.stem, {"source": str(source.path)}, 0)


READERS: dict[str, Callable[[Source], Iterable[Document]]] = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown"), read_text),
    **dict.fromkeys((".html", ".htm"), read_html),
    **dict.fromkeys((".jsonl", ".ndjson"), read_json_lines),
    **dict.fromkeys((".csv", ".tsv"), read_csv),
    ".json": read_json,
    ".parquet": read_parquet,
    ".pdf": read_pdf,
}
"""Reader by the ending of the file's name; `.gz` may follow the endings of text formats."""


def is_hub_name(path: Path) -> bool:
    """Whether it can only be the name of a dataset on the hub: `owner/name`, no file or folder here, and no ending of a file that could be read."""
    return not path.exists() and _HUB_NAME.fullmatch(str(path)) is not None and Path(path.name.lower().removesuffix(".gz")).suffix not in READERS


def _hub_parts(path: Path) -> tuple[str, str | None]:
    """Name and split of `owner/name` or `owner/name:split`."""
    found = _HUB_NAME.fullmatch(str(path))
    assert found is not None
    return found[1], found[2]


@lru_cache
def check_on_hub(path: Path) -> None:
    """One request, without retries: raises NotFoundError when there is nothing at `path` and the hub does not answer or has no dataset of this name."""
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(_hub_parts(path)[0], timeout=10)
    except Exception as error:  # of httpx, huggingface_hub and the name's own check
        raise NotFoundError(f"There is no file or folder {path}, and the hub gave no dataset of this name ({first_line(error)}): check the name.") from error


def reader_of(path: Path) -> Callable[[Source], Iterable[Document]] | None:
    """The reader for a file, a dataset folder or the name of one on the hub, None for anything else."""
    if is_hub_name(path):
        return read_dataset
    if path.is_dir():
        return read_dataset if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")) else None
    return READERS.get(Path(path.name.lower().removesuffix(".gz")).suffix)
