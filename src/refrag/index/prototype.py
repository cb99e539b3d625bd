"""Import of the index that the prototype (`src/refrag_v2.py` and its relatives) left on disk, without running anything in it.

Its passages are pickled NumPy object arrays. They are read by an unpickler that knows lists and arrays of strings and has
inert stand-ins for the three NumPy names such a file mentions; every other name, and every unusual opcode, is refused.
"""

import io
import pickle
import pickletools
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, NotFoundError
from ..text import Passage
from .documents import Document, from_row

PASSAGE_FILES = ("faiss_passages.npy", "texts.npy")

_OPCODES = re.compile(
    "PROTO|FRAME|STOP|MARK|MEMOIZE|(LONG_)?BIN(PUT|GET)|(STACK_)?GLOBAL|REDUCE|BUILD|NONE|NEWTRUE|NEWFALSE|BININT[12]?"
    "|SHORT_BINBYTES|(SHORT_)?BINUNICODE8?|EMPTY_LIST|APPENDS?|EMPTY_TUPLE|TUPLE[123]?"
)
"""All that a pickled array of strings is made of."""


class _Array:
    """Stands in for a NumPy array: keeps the list of items of its state and nothing else."""

    items: Any = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array has an unexpected state")
        self.items = state[4]


class _Kind:
    """Stands in for a NumPy type; its state says nothing about the strings."""

    def __setstate__(self, state: Any) -> None:
        pass


class _StringsUnpickler(pickle.Unpickler):
    """Finds the stand-ins of NumPy's array names and no other name."""

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("numpy._core", "numpy.core"), name:
            case "numpy.core.multiarray", "_reconstruct":
                return lambda *_: _Array()
            case "numpy", "ndarray":
                return _Array
            case "numpy", "dtype":
                return lambda *_: _Kind()
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def load_strings(path: str | Path) -> list[str]:
    """The strings of a `.npy` file, an array of unicode type or a pickled object array of strings (or a list of them).

    Raises InputError for anything else: nothing in the file is run.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            _, _, kind = read_header(file)
            payload = file.read()
        if kind.hasobject:
            _check_opcodes(payload)
            strings = _flat(_StringsUnpickler(io.BytesIO(payload)).load())
        elif kind.kind == "U":
            strings = np.load(path, allow_pickle=False).ravel().tolist()
        else:
            raise InputError(f"{path} must hold strings, holds {kind}: pass the passages file of the prototype's index.")
    except (pickle.UnpicklingError, ValueError, TypeError, AttributeError, IndexError, KeyError, EOFError, MemoryError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is refused, since it must be an array of strings and nothing else ({error}): write the passages as JSON lines and use  refrag index build.") from error
    return strings


def _check_opcodes(payload: bytes) -> None:
    """Refuses opcodes that lists of strings do not need, and memo places that would only cost memory."""
    for position, (opcode, argument, _) in enumerate(pickletools.genops(payload)):
        if not _OPCODES.fullmatch(opcode.name):
            raise pickle.UnpicklingError(f"it uses the opcode {opcode.name}")
        if opcode.name in ("BINPUT", "LONG_BINPUT") and int(argument or 0) > position:
            raise pickle.UnpicklingError("it uses a memo place out of order")


def _flat(content: Any) -> list[str]:
    items = content.items if isinstance(content, _Array) else content
    if type(items) is not list or not all(type(item) is str for item in items):
        raise pickle.UnpicklingError("it holds something that is not a string")
    return items


def import_prototype(folder: str | Path) -> Iterator[Passage]:
    """The passages of a prototype index (`faiss.index` beside `faiss_passages.npy` or `texts.npy`), with stable ids.

    Its vectors are not taken over: they do not say which encoder made them. Raises NotFoundError when the files are missing,
    InputError when the passages are not strings, none has text, or they are not as many as the vectors.
    """
    folder = Path(folder)
    path = next((folder / name for name in PASSAGE_FILES if (folder / name).is_file()), None)
    if not folder.is_dir():
        raise NotFoundError(f"There is no folder {folder}: check the path.")
    if path is None:
        raise NotFoundError(f"{folder} must hold {' or '.join(PASSAGE_FILES)}: pass the folder that the prototype's `index` command wrote.")
    texts = load_strings(path)
    count = _num_vectors(folder / "faiss.index")
    if count is not None and count != len(texts):
        raise InputError(f"{folder} holds {count} vectors but {len(texts)} passages: build the index from the corpus instead, with  refrag index build.")
    if not any(map(str.strip, texts)):
        raise InputError(f"No passage with text was found in {path}: build the index from the corpus instead, with  refrag index build.")
    return (_passage(document) for text in texts if text.strip() for document in from_row(text, str(path), str(path), _refuse))


def _passage(document: Document) -> Passage:
    return Passage(document.id, document.text, document.title, document.metadata)


def _refuse(error: InputError) -> None:
    raise InputError(str(error).replace("; mend it, or keep the rest with --skip-bad", ": mend it"))


def _num_vectors(path: Path) -> int | None:
    """Number of vectors in the prototype's flat FAISS file, from its header (four letters, int32 width, int64 count)."""
    if not path.is_file():
        raise NotFoundError(f"There is no {path.name} in {path.parent}: pass the folder that the prototype's `index` command wrote.")
    with path.open("rb") as file:
        header = file.read(16)
    if len(header) < 16 or header[:2] != b"Ix":
        raise InputError(f"{path} is not a FAISS index: pass the folder that the prototype's `index` command wrote.")
    return struct.unpack("<4siq", header)[2] if header[:4] in (b"IxFI", b"IxF2", b"IxFl") else None
