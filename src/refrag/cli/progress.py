"""A bar on stderr for streams of passages whose number nobody knows: how far it is follows from the files' sizes."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console


class Gauge:
    """Estimates the share of the input that was read: whole files, and of the current one the text that was seen."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.total = sum(map(_size, paths))
        self._finished = self._current = self._seen = 0
        self._source: str | None = None

    @property
    def read(self) -> int:
        """Bytes, never more than `total`."""
        return min(self._finished + min(self._seen, self._current), self.total)

    def watch(self, passages: Iterable[Any]) -> Iterator[Any]:
        """The same passages."""
        for passage in passages:
            source = passage.metadata.get("source")
            if source != self._source:
                self._finished += self._current
                self._source, self._seen = source, 0
                self._current = _size(Path(source)) if source else 0
            self._seen += len(passage.text)
            yield passage
        self._finished, self._current = self.total, 0


class Count:
    """A known number of passages, where the time left follows from the number done."""

    def __init__(self, total: int) -> None:
        self.total, self.read = total, 0

    def add(self, number: int) -> int:
        """So many more are done; returns the number."""
        self.read += number
        return number

    def watch(self, passages: Iterable[Any]) -> Iterator[Any]:
        """The same passages."""
        for passage in passages:
            self.add(1)
            yield passage


def _size(path: Path) -> int:
    """Bytes of a file, uncompressed, or of all files in a folder that can be read; 0 where nobody can say."""
    from ..index.documents import reader_of

    try:
        if path.is_dir():
            return sum(_size(file) for file in path.rglob("*") if file.is_file() and (reader_of(path) or reader_of(file)))
        size = path.stat().st_size
        if path.suffix.lower() != ".gz" or size < 4:
            return size
        with path.open("rb") as file:  # gzip ends with the length of what it holds, modulo 4 GiB
            file.seek(-4, 2)
            return max(int.from_bytes(file.read(4), "little"), size)
    except OSError:
        return 0


@contextmanager
def passage_bar(console: Console, what: str, gauge: Gauge | Count) -> Generator[Callable[[int], None]]:
    """A bar with count, rate and an estimate of the time left; the function takes the number of passages just done."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        TextColumn("{task.fields[passages]:,} passages, {task.fields[rate]:,.0f}/s, left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=console.quiet) as bars:
        task = bars.add_task(what, total=gauge.total or None, passages=0, rate=0.0)

        def done(count: int) -> None:
            state = bars.tasks[0]
            passages = state.fields["passages"] + count
            bars.update(task, completed=gauge.read, passages=passages, rate=passages / max(state.elapsed or 0, 1e-3))

        yield done
