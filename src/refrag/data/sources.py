"""Files, folders, saved data sets and hub names become rows, each with its place: file and line. One reader per format.

A row that a reader cannot read is an `InputError` in its stead. Files of a folder are read in the order of their names.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError, NotFoundError, first_line, missing_extra
from .formats import question_rows
from .rows import Kind, bad_row

END_OF_TEXT = "<|endoftext|>"
"""Where one document of a .txt file ends and the next begins."""
_SAVED = ("state.json", "dataset_dict.json")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_READ_ERRORS = (OSError, EOFError, zlib.error)
Read = Callable[[], Iterator[tuple[str, Any]]]


class Source(NamedTuple):
    """Something with rows in it."""

    name: str
    read: Read
    """Place and row (or InputError) of each, anew with each call."""
    stamp: str
    """Changes when the contents do."""


def find_sources(names: Sequence[str], kind: Kind, *, streaming: bool) -> list[Source]:
    """The sources under these names; `name:split` picks a split of a data set, else it is `train`.

    Raises NotFoundError for a name that is neither a path nor on the hub, InputError for what cannot hold rows of this kind.
    """
    return [source for name in names for source in _find(name, kind, streaming)]


def check_files(names: Sequence[str], kind: Kind) -> None:
    """Raises as `find_sources` does, but names on the hub are not looked up."""
    for name in names:
        base = name.rpartition(":")[0] if re.search(r"[^:]:\w+$", name) else name
        here = any(Path(one).expanduser().exists() or _reader(Path(one), "documents") is not None for one in (name, base))
        if here or _HUB_NAME.fullmatch(base) is None:
            _find(name, kind, False)


def holds_questions(names: Sequence[str]) -> bool:
    """Whether the first row that can be read is a question or a conversation; a text is neither. Raises as `find_sources` does."""
    for source in find_sources(names, "documents", streaming=False):
        for _, row in source.read():
            if not isinstance(row, InputError):
                return isinstance(row, Mapping) and ("question" in row or "messages" in row)
    return False


def import_datasets() -> Any:
    """The datasets module. Raises MissingExtraError when it is not installed."""
    try:
        import datasets  # takes a second
    except ImportError as error:
        raise missing_extra("datasets", "data", "Reading a data set") from error
    return datasets


def _find(name: str, kind: Kind, streaming: bool) -> list[Source]:
    if not name.strip():
        raise NotFoundError("A name of data must not be empty: name a file, a folder or a data set.")
    full, split = name, ""
    if not Path(name).expanduser().exists() and re.search(r"[^:]:\w+$", name):
        name, _, split = name.rpartition(":")
    path = Path(name).expanduser()
    if any((path / marker).is_file() for marker in _SAVED):
        return [_saved(path, split)]
    if path.exists() and split:
        raise NotFoundError(f"No data {full!r} was found, {name} is no saved data set with splits: check the name.")
    if path.is_dir():
        return _folder(path, kind)
    if path.exists():
        if _reader(path, kind) is None:
            raise InputError(f"{path}: {kind} are read from {_endings(kind)} files, .gz and .zst too: convert it or give it its ending.")
        return [_file(path, kind)]
    if _HUB_NAME.fullmatch(name) and _reader(path, "documents") is None:
        return [_hub(name, split or "train", streaming)]
    raise NotFoundError(f"No data {full!r} was found: check the name.")


def _folder(folder: Path, kind: Kind) -> list[Source]:
    inside = sorted(path for path in folder.rglob("*") if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    sources = [_file(path, kind) for path in inside if path.is_file() and _reader(path, kind) and path.name.lower() != README]
    if not sources:
        raise InputError(f"The folder {folder} must hold {_endings(kind)} files with {kind} or a saved data set, has neither: convert what it holds, or name another.")
    return sources


def _file(path: Path, kind: Kind) -> Source:
    reader = _reader(path, kind)
    assert reader
    read: Read = partial(reader, path)
    return Source(str(path), partial(_questions, read) if kind == "questions" else read, _stamp(path))


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def _saved(folder: Path, split: str) -> Source:
    """A data set written by `save_to_disk`."""
    datasets = import_datasets()
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever its files can be damaged by
        raise InputError(f"The saved data set {folder} cannot be read ({first_line(error)}): save it again.") from error
    if isinstance(found, datasets.DatasetDict):
        wanted = split or ("train" if "train" in found else next(iter(found)) if len(found) == 1 else "")
        if wanted not in found:
            raise InputError(f"The saved data set {folder} has the splits {', '.join(found)}: name one, as in {folder}:{next(iter(found))}.")
        found = found[wanted]
    stamp = "\n".join(_stamp(path) for path in sorted(folder.rglob("*")) if path.is_file())
    return Source(f"{folder}:{split}" if split else str(folder), partial(_numbered, found.with_format(None), str(folder)), stamp)


def _hub(name: str, split: str, streaming: bool) -> Source:
    datasets = import_datasets()
    try:
        found = datasets.load_dataset(name, split=split, streaming=streaming)
    except Exception as error:  # errors of several libraries
        raise NotFoundError(f"No data {name!r} (split {split!r}) was found here or on the hub ({first_line(error)}): check the name.") from error
    return Source(f"{name}:{split}", partial(_numbered, found, name), str(getattr(found, "_fingerprint", "")))


# ── readers ──


def _questions(read: Read) -> Iterator[tuple[str, Any]]:
    """Each question as a row of its own, where one entry of a file holds many."""
    for place, row in read():
        try:
            yield from ((f"{place}, question {number}" if own is not row else place, own) for number, own in enumerate(question_rows(row), 1))
        except (KeyError, TypeError) as error:
            yield place, bad_row(place, f"the articles of a SQuAD file need paragraphs with context and qas (here: {error})")


def _numbered(rows: Iterable[Any], name: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, 1):
        yield f"{name}, row {number}", row


def _open(path: Path) -> io.BufferedIOBase:
    """The file's bytes, decompressed."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path, "rb")
        case ".zst":
            import pyarrow as pa

            return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
        case _:
            return path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str | InputError]]:
    """Numbered lines, decoded one by one; an InputError stands for one that is not UTF-8, and for the rest of a damaged file."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                try:
                    text: str | InputError = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    text = bad_row(f"{path}, line {number}", f"this is not UTF-8 text (byte 0x{line[error.start]:02x})", "convert it")
                yield number, text
    except _READ_ERRORS as error:
        yield number + 1, bad_row(f"{path}, line {number + 1}", f"the file cannot be read from here ({first_line(error)})", "copy it again")


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip() else ""
        return bad_row(place, f"this is not JSON ({error.msg}, {line}column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        return bad_row(place, f"this is not JSON ({first_line(error)})")


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(path):
        place = f"{path}, line {number}"
        if isinstance(line, InputError):
            yield place, line
        elif line.strip():
            yield place, _json(line.rstrip(), place)


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """A JSON list of rows or one row, held in memory whole; JSON lines under this name are read as such."""
    first = next((line for _, line in _lines(path) if isinstance(line, str) and line.strip()), "")
    if first.lstrip().startswith("{") and isinstance(_json(first, ""), dict):
        yield from _read_json_lines(path)
        return
    lines = []
    for number, line in _lines(path):
        if isinstance(line, InputError):
            yield f"{path}, line {number}", line
            return
        lines.append(line)
    rows = _json("".join(lines), str(path)) if first else []
    yield from _numbered(rows if isinstance(rows, list) else [rows], str(path))


def _read_text(path: Path) -> Iterator[tuple[str, Any]]:
    """One document, or several with `<|endoftext|>` between them. A document with a line that cannot be read is an InputError."""
    number, parts, problem = 1, [], None
    for _, line in chain(_lines(path), [(0, END_OF_TEXT)]):
        if isinstance(line, InputError):
            problem = problem or line
            continue
        *ends, rest = line.replace("\r\n", "\n").split(END_OF_TEXT)
        for end in ends:
            text = "".join([*parts, end]).strip()
            if problem or text:
                yield f"{path}, document {number}", problem or text
                number += 1
            parts, problem = [], None
        parts.append(rest)


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=128):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        place = f"{path}, row {number + 1}"
        yield place, bad_row(place, f"the file cannot be read from here ({first_line(error)})", "copy it again")


README = "readme.md"
"""Of a folder's files it is about the others."""
_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    **dict.fromkeys(TEXT_ENDINGS := (".md", ".markdown", ".text", ".txt"), _read_text),
}


def _reader(path: Path, kind: Kind) -> Callable[[Path], Iterator[tuple[str, Any]]] | None:
    ending = Path(path.name.lower().removesuffix(".gz").removesuffix(".zst")).suffix
    return None if kind == "questions" and ending in TEXT_ENDINGS else _READERS.get(ending)


def _endings(kind: Kind) -> str:
    *most, last = (ending for ending in _READERS if kind == "documents" or ending not in TEXT_ENDINGS)
    return f"{', '.join(most)} or {last}"
