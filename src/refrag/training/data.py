"""Training data: files, folders, saved data sets and hub names become documents or questions, split and checked for leaks.

    --data ─readers─▶ rows ─┬─▶ Rows: an Arrow copy in the cache of `datasets`, read row by row from disk
                            └─▶ Stream: nothing is copied, nothing is counted first

`refrag.data.rows` says what a row holds, `refrag.data.sources` what is read. Every row is checked before training begins (in a stream: when it
is met); what is wrong with one names its file, line and field.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, overload

import numpy as np

from ..data.rows import Document, Item, Kind, Question, content_of, document_of, group_of, keys_of, question_from, question_of
from ..data.sources import Source, find_sources, import_datasets
from ..errors import InputError, RefragError
from ..text import PromptBuilder
from .settings import TrainSettings

log = logging.getLogger(__name__)

__all__ = ["Document", "Loaded", "Question", "Rows", "Stream", "check_disjoint", "check_long_enough", "lengths", "load"]

T = TypeVar("T")


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """Data to train on and data to evaluate on.

    `counts`: `rows` read from --data, of which `bad` left out, `held_out`, and `train` to train on (`duplicates` of them
    repeat an earlier one); `evaluation` rows to evaluate on, and `eval_bad` left out of --eval-data. Of a stream there are
    `evaluation`, and the `rows`, `bad`, `held_out` and `train` of its latest pass so far.
    """

    train: Any
    """`Rows[T]`, a sequence; with `streaming` a `Stream[T]`, which has no length."""
    evaluation: Sequence[T]
    counts: dict[str, int]
    fingerprint: str | None = None
    """Changes with anything in the rows to train and evaluate on; None for a stream."""


def load(settings: TrainSettings, kind: Kind) -> Loaded[Any]:
    """The documents or questions of `settings.data`, and those to evaluate on: of `settings.eval_data`, or a share held out.

    Held out is what the hash of a row's own content says (of the text, or of the first question of a conversation), so it
    depends neither on the order nor on other rows, and equal rows are on one side. At most `eval_rows` are evaluated on,
    those with the lowest hash. With `streaming` it is the first `eval_rows` of --eval-data, or of the held-out rows among the
    first 2 * eval_rows / eval_fraction rows of --data; all held-out rows of the stream are left out of training.
    Raises NotFoundError for data that is not there, InputError for rows that cannot be used (left out and counted with
    `skip_bad`), for no rows at all, and where a row to evaluate on is among those to train on.
    """
    if not settings.data:
        raise InputError("Training needs data, none was given: pass --data with a file, a folder or a hub name.")
    return (_load_stream if settings.streaming else _load_rows)(settings, kind)


# ── rows on disk ──


class Rows(Sequence[T]):
    """Documents or questions, made one by one from an Arrow file; a slice is a view. Pickles without its contents."""

    def __init__(self, dataset: Any, kept: np.ndarray, kind: Kind) -> None:
        self._dataset = dataset
        self._kept = kept
        self._kind: Kind = kind

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows[T]": ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(index)
        row = self._dataset[int(self._kept[index])]
        return Document(row["id"], row["content"]) if self._kind == "documents" else question_from(row["content"])

    def take(self, index: slice | np.ndarray) -> "Rows[T]":
        """The rows of a slice, of a bool mask or of positions."""
        return Rows(self._dataset, self._kept[index], self._kind)

    def place(self, index: int) -> str:
        """File and line of a row."""
        return self._dataset[int(self._kept[index])]["place"]

    @property
    def groups(self) -> np.ndarray:
        """int64 [row]: what decides whether a row is held out."""
        return self._dataset.data.column("group").to_numpy()[self._kept]

    def keys(self) -> tuple[np.ndarray, np.ndarray]:
        """Content hashes of all rows, and the row of each: both int64 [hash], in the order of the rows."""
        column = self._dataset.data.column("keys").combine_chunks()
        position = np.full(len(self._dataset), -1)
        position[self._kept] = np.arange(len(self._kept))
        owners = np.repeat(position, np.diff(column.offsets.to_numpy()))
        return column.flatten().to_numpy()[owners >= 0], owners[owners >= 0]


def _load_rows(settings: TrainSettings, kind: Kind) -> Loaded[Any]:
    rows, bad = _prepare(settings.data, kind, settings)
    eval_bad = 0
    if settings.eval_data:
        train, (evaluation, eval_bad) = rows, _prepare(settings.eval_data, kind, settings)
        check_disjoint(train, evaluation)
    else:
        held_out = rows.groups < _threshold(settings)
        train, evaluation = rows.take(~held_out), rows.take(held_out)
    if not len(train):
        raise InputError(f"Some rows must be left to train on, but all {len(rows)} are held out: lower --eval-fraction or pass --eval-data.")
    keys, owners = train.keys()
    counts = {"rows": len(rows) + bad, "bad": bad, "held_out": len(rows) - len(train), "train": len(train)}
    counts["duplicates"] = len(train) - len(np.unique(keys[np.unique(owners, return_index=True)[1]]))
    evaluation = evaluation.take(np.sort(np.argsort(evaluation.groups, kind="stable")[: settings.eval_rows]))
    return Loaded(train, evaluation, counts | {"evaluation": len(evaluation), "eval_bad": eval_bad}, _fingerprint(train, evaluation))


def _fingerprint(*parts: Rows[Any]) -> str:
    """Changes with anything that a row holds, and with the order."""
    told = sha256(b"/".join(rows._kept.tobytes() for rows in parts))
    for dataset in {id(rows._dataset): rows._dataset for rows in parts}.values():  # held-out rows are of the same one
        for cell in dataset.data.column("content"):
            told.update(cell.as_buffer() or b"")
            told.update(b"/")
    return told.hexdigest()[:16]


def _sources(names: Sequence[str], kind: Kind, settings: TrainSettings) -> list[Source]:
    return find_sources(names, kind, streaming=settings.streaming)


class _Record(NamedTuple):
    """A row as it was read: usable, or with what is wrong with it."""

    place: str
    item: Item | None
    content: str
    problem: str


def _records(sources: list[Source], kind: Kind, settings: TrainSettings) -> Iterator[_Record]:
    """Rows in the order of the sources. Raises InputError at the first bad one, unless `skip_bad`."""
    parse = partial(document_of, text_field=settings.text_field) if kind == "documents" else question_of
    for place, row in (pair for source in sources for pair in source.read()):
        try:
            if isinstance(row, InputError):
                raise row
            item = parse(row, place)
            record = _Record(place, item, content_of(item, place), "")
        except InputError as error:
            if not settings.skip_bad:
                raise
            record = _Record(place, None, "", str(error))
        yield record


def _prepare(names: Sequence[str], kind: Kind, settings: TrainSettings) -> tuple[Rows[Any], int]:
    """The usable rows, and how many are not. The Arrow copy is made once for the same files and settings."""
    dataset = _arrow_copy(_sources(names, kind, settings), kind, settings)
    usable = dataset.data.column("usable").to_numpy()
    if bad := int((~usable).sum()):
        first = dataset[int(np.flatnonzero(~usable)[0])]["problem"]
        if not usable.any():
            raise InputError(f"The data must have rows that can be used, but all {bad} are bad, the first: {first}")
        log.warning("%d of %d rows are left out, the first: %s", bad, len(usable), first)
    return Rows(dataset, np.flatnonzero(usable), kind), bad


def _arrow_copy(sources: list[Source], kind: Kind, settings: TrainSettings) -> Any:
    """The rows as a `datasets.Dataset` on disk, from the cache where the same sources were read before by the same code."""
    datasets = import_datasets()
    here = Path(__file__)
    code = [path.read_text(encoding="utf-8") for path in (here, *sorted((here.parents[1] / "data").glob("*.py")))]
    recipe = [code, kind, settings.text_field, settings.skip_bad, [(source.name, source.stamp) for source in sources]]
    value = datasets.Value
    features = {"place": value("string"), "id": value("string"), "content": value("large_string"), "group": value("int64"), "usable": value("bool"), "problem": value("string")}
    try:
        return datasets.Dataset.from_generator(
            partial(_arrow_rows, sources, kind, settings),
            features=datasets.Features(features | {"keys": datasets.List(value("int64"))}),
            fingerprint=sha256(json.dumps(recipe).encode()).hexdigest()[:32],
            writer_batch_size=100,
        )
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, RefragError):
            raise cause from None
        if isinstance(cause, OSError):
            folder = datasets.config.HF_DATASETS_CACHE
            raise InputError(f"The data could not be copied to the cache {folder} ({cause}): make room there, or set HF_DATASETS_CACHE to another folder.") from error
        raise


def _arrow_rows(sources: list[Source], kind: Kind, settings: TrainSettings) -> Iterator[dict[str, Any]]:
    empty = True
    for place, item, content, problem in _records(sources, kind, settings):
        empty = False
        row = {"place": place, "id": "", "content": content, "group": 0, "keys": [], "usable": item is not None, "problem": problem}
        yield row if item is None else row | {"id": item.id, "group": group_of(item), "keys": keys_of(item)}
    if empty:
        raise _no_rows(sources)


def _no_rows(sources: list[Source]) -> InputError:
    return InputError(f"The data must have one row or more, {', '.join(source.name for source in sources[:3])} has none: check --data and --eval-data.")


# ── streams ──


class Stream(Iterable[T]):
    """Documents or questions in the order of the data, read anew in each pass: resume by skipping as many as were seen."""

    def __init__(self, settings: TrainSettings, kind: Kind, counts: dict[str, int]) -> None:
        self._settings = settings
        self._kind: Kind = kind
        self.sources = _sources(settings.data, kind, settings)
        self._forbidden: dict[int, str] = {}
        self._threshold = 0 if settings.eval_data else _threshold(settings)
        self.counts = counts
        """Rows of the latest pass so far; rows read by other processes are not counted here."""

    def forbid(self, places: Iterable[tuple[str, Item]]) -> None:
        """Raise an InputError when one of these rows to evaluate on is met."""
        self._forbidden |= {key: place for place, item in places for key in keys_of(item)}

    def records(self) -> "Iterator[_Record]":
        """All rows, bad and held-out ones too."""
        return _records(self.sources, self._kind, self._settings)

    def held_out(self, item: Item) -> bool:
        """Whether a row is never trained on."""
        return self._threshold > 0 and group_of(item) < self._threshold

    def __iter__(self) -> Iterator[Any]:
        self.counts |= dict.fromkeys(("rows", "bad", "held_out", "train"), 0)
        for place, item, _, _ in self.records():
            self.counts["rows"] += 1
            if item is None:
                self.counts["bad"] += 1
            elif self.held_out(item):
                self.counts["held_out"] += 1
            elif self._forbidden and (leaked := self._forbidden.keys() & keys_of(item)):
                raise _leak(self._forbidden[leaked.pop()], place)
            else:
                self.counts["train"] += 1
                yield item


def _load_stream(settings: TrainSettings, kind: Kind) -> Loaded[Any]:
    counts: dict[str, int] = {}
    train: Stream[Any] = Stream(settings, kind, counts)
    if settings.eval_data:
        sources = _sources(settings.eval_data, kind, settings)
        found = _first_items(_records(sources, kind, settings), settings.eval_rows)
        if settings.eval_rows and not found:
            raise _no_rows(sources)
        train.forbid(found)
    else:
        reach = int(2 * settings.eval_rows / settings.eval_fraction) if settings.eval_fraction else 0
        found = _first_items((record for record in islice(train.records(), reach) if record.item and train.held_out(record.item)), settings.eval_rows)
    if next(iter(train), None) is None:
        raise _no_rows(train.sources)
    counts["evaluation"] = len(found)
    return Loaded(train, tuple(item for _, item in found), counts)


def _first_items(records: Iterator[_Record], most: int) -> list[tuple[str, Item]]:
    return list(islice(((record.place, record.item) for record in records if record.item), most))


# ── leaks ──


def check_disjoint(train: Sequence[Item], evaluation: Sequence[Item]) -> None:
    """Raises InputError if a row to evaluate on is among those to train on.

    Documents are the same if their texts are, white space and case aside; questions if the conversation up to the question
    is, and they share an answer. Passages do not count: the same question with other passages would give its answer away.
    """
    (wanted, owners), (seen, places) = _key_table(evaluation), _key_table(train)
    hits = np.flatnonzero(np.isin(wanted, seen))
    if len(hits):
        evaluated, trained = int(owners[hits[0]]), int(places[seen == wanted[hits[0]]][0])
        more = len(np.unique(owners[hits])) - 1
        raise _leak(_name(evaluation, evaluated), _name(train, trained), f", and so are {more} more of {len(evaluation)}" if more else "")


def _key_table(rows: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(rows, Rows):
        return rows.keys()
    pairs = [(key, number) for number, item in enumerate(rows) for key in keys_of(item)]
    keys, owners = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return keys, owners


def _name(rows: Sequence[Item], index: int) -> str:
    return rows.place(index) if isinstance(rows, Rows) else rows[index].id


def _leak(evaluation: str, train: str, more: str = "") -> InputError:
    return InputError(
        f"No row may be both trained and evaluated on, but the evaluation row {evaluation!r} is also the training row {train!r}{more}:"
        " take it out of --data, or leave --eval-data out so that a share of --data is held out."
    )


def _threshold(settings: TrainSettings) -> int:
    return int(settings.eval_fraction * 2**63)


# ── lengths ──


def lengths(documents: Iterable[Document], builder: PromptBuilder) -> dict[str, int]:
    """How long texts are, in decoder tokens: `documents`, `tokens` of all, `shortest`, `p10`, `median`, `p90`, `longest` (zeros without documents)."""
    counts = np.fromiter((len(builder.encode(document.text)) for document in documents), dtype=np.int64)
    names = {"shortest": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "longest": 1.0}
    quantiles = np.quantile(counts, list(names.values()), method="nearest") if len(counts) else np.zeros(len(names))
    return {"documents": len(counts), "tokens": int(counts.sum())} | dict(zip(names, map(int, quantiles), strict=True))


def check_long_enough(lengths: Mapping[str, int], needed_tokens: int, *, lower: str = "--max-chunks") -> None:
    """Raises InputError if not even the longest text (of `lengths`) has the tokens of one window; `lower` names the setting that shortens it."""
    if lengths["longest"] < needed_tokens:
        raise InputError(
            f"A text must have {needed_tokens} tokens or more, the longest of {lengths['documents']} has {lengths['longest']}: pass longer texts, or lower {lower}."
        )
