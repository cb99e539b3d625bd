"""Files, folders and datasets -> a stream of passages of bounded length, split at sentence ends, offsets kept."""

import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from ..config import IndexSettings
from ..errors import InputError, NotFoundError, RefragError, first_line
from ..text import Passage, PromptBuilder
from .documents import READERS, Document, Source, check_on_hub, is_hub_name, reader_of

log = logging.getLogger(__name__)

_SENTENCE_END = re.compile(r"""(?<=[.!?…])["'”’»)\]]*(?=\s)|(?<=[。！？])["”’」』）]*|\n(?=\s*\n)""")
_BATCH = 256
Span = tuple[int, int]


def read_passages(
    paths: Sequence[str | Path],
    *,
    builder: PromptBuilder,
    settings: IndexSettings,
    skip_bad: bool = False,
    encoding: str = "utf-8",
    text_column: str = "text",
    subset: str | None = None,
    sources: set[str] | None = None,
) -> Iterator[Passage]:
    """Passages of files, folders (txt, md, html, pdf, json, jsonl, csv, tsv, parquet; .gz too), saved datasets and datasets on the hub, streamed.

    A row's text stands under `text_column`; a dataset on the hub is `owner/name` or `owner/name:split`, of its `subset`.

    A passage has at most `settings.passage_tokens` decoder tokens. Longer rows, and all documents, become passages with `#1`,
    `#2`, … after the id; `source`, `start` and `end` (characters of the row's or document's text) are kept in the metadata.
    `sources` receives the files that were read to their end, none with a bad row: see `PassageIndex.add`.
    Raises NotFoundError for a missing path and InputError for an unknown format, before anything is read; InputError for a
    wrong encoding, a corpus without text and, unless `skip_bad`, the first bad row, with its file and line.
    """
    try:
        "".encode(encoding)
    except LookupError as error:
        raise InputError(f"There is no text encoding {encoding!r}: try --encoding utf-8 or --encoding latin-1.") from error
    files = [file for path in paths for file in _files(Path(os.path.normpath(path)))]
    if subset is not None and not any(map(is_hub_name, files)):
        raise InputError(f"A subset belongs to a dataset on the hub, none was named: leave --subset {subset} out.")
    documents = _Documents(list(dict.fromkeys(files)), encoding, text_column, subset, skip_bad, set() if sources is None else sources)
    return _read(documents, Splitter(builder, settings))


def _files(path: Path) -> list[Path]:
    check_path(path)
    if reader_of(path):
        return [path]
    endings = ", ".join(ending[1:] for ending in READERS)
    if path.is_file():
        raise InputError(f"{path} is of a kind that cannot be read: refrag reads {endings}, folders of them and saved Hugging Face datasets.")
    found = sorted(_inside(path))
    if not found:
        raise InputError(f"The folder {path} holds no file that can be read: refrag reads {endings}.")
    return found


def check_path(path: Path) -> None:
    """Raises NotFoundError unless it is a file, a folder, or the name of a dataset that the hub has."""
    if path.exists():
        return
    if not is_hub_name(path):
        raise NotFoundError(f"There is no file or folder {path}: check the path.")
    check_on_hub(path)


def _inside(folder: Path) -> Iterator[Path]:
    """The files in a folder that can be read, none that is hidden; a folder that is a saved dataset is one source."""
    for root, folders, names in os.walk(folder):
        inner = [Path(root, name) for name in folders if not name.startswith(".")]
        folders[:] = [path.name for path in inner if not reader_of(path) and path.suffix != ".lance"]  # the tables of an index are no documents
        yield from (path for path in inner if reader_of(path))
        files = (Path(root, name) for name in names if not name.startswith("."))
        yield from (path for path in files if path.is_file() and reader_of(path))


def _read(documents: "_Documents", splitter: "Splitter") -> Iterator[Passage]:
    count = 0
    for passage in splitter.split(documents):
        count += 1
        yield passage
    num_bad, first = documents.bad.total(), str(documents.first_bad).replace(", or keep the rest with --skip-bad", "")
    if num_bad and not count:
        raise InputError(f"Not one row or file could be read, {num_bad:,} {'was' if num_bad == 1 else 'were'} bad; the first: {first}")
    if num_bad:
        where = ", ".join(f"{number:,} in {file}" for file, number in documents.bad.most_common(5)) + ", …" * (len(documents.bad) > 5)
        what = "1 bad row or file was" if num_bad == 1 else f"{num_bad:,} bad rows or files were"
        log.warning("%s left out (%s); the first: %s", what, where, first)
    if not count:
        named = ", ".join(map(str, documents.files[:3])) + "…" * (len(documents.files) > 3)
        raise InputError(f"No passage with text was found in {named}: check that the files are not empty.")


@dataclass
class _Documents:
    """The documents of files, one after the other; counts what is bad."""

    files: list[Path]
    encoding: str
    text_column: str
    subset: str | None
    skip_bad: bool
    finished: set[str]
    """Files that were read to their end and without a bad row."""
    bad: Counter[str] = field(default_factory=Counter)
    """Rows that could not be read, by file; a file that could not be read counts as one."""
    first_bad: InputError | None = None

    def __iter__(self) -> Iterator[Document]:
        for file in self.files:
            yield from self._of(file)
            if not self.bad[str(file)]:
                self.finished.add(str(file))

    def _of(self, path: Path) -> Iterator[Document]:
        reader, on_bad = reader_of(path), partial(self._on_bad, str(path))
        assert reader is not None
        try:
            str(path).encode()
            yield from reader(Source(path, self.encoding, on_bad, self.text_column, self.subset))
        except UnicodeEncodeError:
            on_bad(InputError(f"The name of the file {str(path)!a} is not text in this system's encoding: rename it."))
        except UnicodeError as error:
            why = f"byte 0x{error.object[error.start]:02x}" if isinstance(error, UnicodeDecodeError) else first_line(error)
            on_bad(InputError(f"{path} is not {self.encoding} text ({why}): pass its encoding, for example --encoding latin-1, or keep the rest with --skip-bad."))
        except (EOFError, OSError, zlib.error) as error:
            if isinstance(error, RefragError):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            on_bad(InputError(f"{path} cannot be read ({reason}): check the file, or keep the rest with --skip-bad."))

    def _on_bad(self, file: str, error: InputError) -> None:
        if not self.skip_bad:
            raise error
        self.bad[file] += 1
        self.first_bad = self.first_bad or error


class Splitter:
    """Splits documents at sentence ends so that no passage exceeds the token budget, the last sentences repeated as overlap."""

    def __init__(self, builder: PromptBuilder, settings: IndexSettings) -> None:
        self.builder = builder
        self.budget, self.overlap = settings.passage_tokens, settings.overlap_tokens

    def split(self, documents: Iterable[Document]) -> Iterator[Passage]:
        """The passages of each document in turn; blank documents have none."""
        stream, previous, number = iter(documents), "", 0
        while batch := list(islice(stream, _BATCH)):
            batch = [document for document in batch if document.text.strip()]
            for document, length in zip(batch, self._lengths([document.text for document in batch]), strict=True):
                spans = [_strip(document.text, (0, len(document.text)))] if length <= self.budget else self.spans(document.text)
                number = number if document.start and document.id == previous else 0
                previous = document.id
                for span in spans:
                    number += 1
                    keeps_id = document.start is None and len(spans) == 1
                    yield _passage(document, span, document.id if keeps_id else f"{document.id}#{number}")

    def spans(self, text: str) -> list[Span]:
        """Characters of each passage of `text`: whole sentences, as many as the budget holds; a longer sentence is cut between words."""
        sentences = self._fitting(text, _sentences(text))
        passages: list[Span] = []
        first = 0
        while first < len(sentences):
            last, size = first, 0
            while last < len(sentences) and size + sentences[last][1] <= self.budget:
                size += sentences[last][1]
                last += 1
            last = max(last, first + 1)
            while last > first + 1 and self._length(text, sentences[first][0][0], sentences[last - 1][0][1]) > self.budget:
                last -= 1  # tokens can merge differently across sentences
            passages.append(_strip(text, (sentences[first][0][0], sentences[last - 1][0][1])))
            first = last if last == len(sentences) else self._back(sentences, first, last)
        return passages

    def _back(self, sentences: list[tuple[Span, int]], first: int, last: int) -> int:
        """Where the next passage starts: as many whole sentences before `last` as the overlap holds, with room left for a new one."""
        start, size = last, 0
        room = min(self.overlap, self.budget - sentences[last][1])
        while start - 1 > first and size + sentences[start - 1][1] <= room:
            start -= 1
            size += sentences[start][1]
        return start

    def _fitting(self, text: str, spans: list[Span]) -> list[tuple[Span, int]]:
        """The spans that hold text with their token counts, those over the budget halved between words until they fit."""
        spans = [(start, end) for start, end in spans if not text[start:end].isspace()]
        lengths = self._lengths([text[start:end].strip() for start, end in spans])
        fitting: list[tuple[Span, int]] = []
        for (start, end), length in zip(spans, lengths, strict=True):
            if length <= self.budget or end - start < 2:
                fitting.append(((start, end), length))
            else:
                cut = _middle(text, start, end)
                fitting += self._fitting(text, [(start, cut), (cut, end)])
        return fitting

    def _length(self, text: str, start: int, end: int) -> int:
        start, end = _strip(text, (start, end))
        return len(self.builder.encode(text[start:end]))

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(chunked.token_ids) for chunked in self.builder.chunk_batch(texts)] if texts else []


def _passage(document: Document, span: Span, identity: str) -> Passage:
    start, end = span
    offset = document.start or 0
    place = {"start": offset + start, "end": offset + end}
    metadata = place | document.metadata if identity == document.id else document.metadata | place  # a whole row's own `start` stays
    return Passage(identity, document.text[start:end], document.title, metadata)


def _sentences(text: str) -> list[Span]:
    """Spans that cover the text and end after each sentence or paragraph; white space stands at their starts."""
    ends = sorted({match.end() for match in _SENTENCE_END.finditer(text)} | {len(text)})
    return list(zip([0, *ends], ends, strict=False))


def _middle(text: str, start: int, end: int) -> int:
    """A white space near the middle of a span, else its middle."""
    middle = (start + end) // 2
    before, after = text.rfind(" ", start + 1, middle), text.find(" ", middle, end - 1)
    candidates = [place for place in (before, after) if place > start]
    return min(candidates, key=lambda place: abs(place - middle), default=middle)


def _strip(text: str, span: Span) -> Span:
    """The span without white space at its ends."""
    piece = text[span[0] : span[1]]
    start = span[0] + len(piece) - len(piece.lstrip())
    return start, start + len(piece.strip())
