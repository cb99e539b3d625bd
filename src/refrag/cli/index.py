"""`refrag index`: make an index of passages and look after it."""
# ruff: noqa: T201

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, subcommand

from ..config import IndexSettings
from ..errors import InputError
from .options import AsJson, Folder, Messages, ModelOptions, Owner, Reading, check_paths, show
from .progress import Gauge, passage_bar


@dataclass(frozen=True)
class IndexBuild:
    """Make an index of files and folders: txt, md, html, pdf, json, jsonl, csv, parquet (.gz too) and saved datasets.

    After an interruption the same command finishes the rest.
    """

    paths: Positional[tuple[Path, ...]]
    """Files and folders to read."""
    index: Folder
    """Folder of the index, or an object store's address."""
    settings: IndexSettings
    reading: Reading
    model: ModelOptions
    messages: Messages
    rebuild: bool = False
    """Throw away the index that is there."""

    def run(self) -> int:
        """Create or continue the index."""
        check_paths(self.paths)
        from ..index import PassageIndex

        console, model = self.messages.console(), self.model.load()
        passages = self.reading.passages(self.paths, model, self.settings)
        make = partial(PassageIndex.create, rebuild=True) if self.rebuild else PassageIndex.open_or_create
        return _add(make(self.index, model, self.settings), passages, paths=self.paths, console=console)


@dataclass(frozen=True)
class IndexAdd:
    """Add files and folders to an index; passages with a known id are updated, unchanged ones are not encoded again."""

    paths: Positional[tuple[Path, ...]]
    """Files and folders to read."""
    index: Folder
    """Folder of the index, or an object store's address."""
    reading: Reading
    model: ModelOptions
    messages: Messages

    def run(self) -> int:
        """Open the index and add to it."""
        check_paths(self.paths)
        from ..index import PassageIndex

        console, model = self.messages.console(), self.model.load()
        index = PassageIndex.open(self.index, model=model)
        return _add(index, self.reading.passages(self.paths, model, index.settings), paths=self.paths, console=console)


@dataclass(frozen=True)
class IndexDelete:
    """Delete passages by id."""

    ids: Positional[tuple[str, ...]]
    """Ids of the passages."""
    index: Folder
    """Folder of the index, or an object store's address."""
    owner: Owner
    messages: Messages

    def run(self) -> int:
        """Prints how many there were."""
        if not self.ids:
            raise InputError("Nothing was named to delete: give the ids of passages.")
        self.messages.console()
        show({"deleted": self.owner.open(self.index).delete(list(self.ids))}, as_json=True)
        return 0


@dataclass(frozen=True)
class IndexInfo:
    """Show what an index holds and what its vectors depend on."""

    index: Folder
    """Folder of the index, or an object store's address."""
    owner: Owner
    messages: Messages
    as_json: AsJson = False
    """Print one JSON object."""

    def run(self) -> int:
        """Prints the information."""
        self.messages.console()
        show(self.owner.open(self.index).info(), as_json=self.as_json)
        return 0


@dataclass(frozen=True)
class IndexVerify:
    """Check every row of an index; problems are printed and end with exit status 1."""

    index: Folder
    """Folder of the index, or an object store's address."""
    owner: Owner
    messages: Messages

    def run(self) -> int:
        """Prints one problem a line."""
        console = self.messages.console()
        index = self.owner.open(self.index)
        problems = index.verify()
        for problem in problems:
            print(problem)
        console.print(f"{index.count:,} passages, {len(problems) or 'no'} problem{'s'[: len(problems) != 1]}")
        return 1 if problems else 0


@dataclass(frozen=True)
class IndexImport:
    """Make an index of the prototype's index folder: faiss.index with faiss_passages.npy or texts.npy."""

    folder: Positional[Path]
    """The prototype's folder."""
    index: Folder
    """Folder of the new index."""
    settings: IndexSettings
    model: ModelOptions
    messages: Messages
    rebuild: bool = False
    """Throw away the index that is there."""

    def run(self) -> int:
        """Its passages are encoded anew: the prototype stored no chunk vectors."""
        from ..index import PassageIndex, import_prototype

        console = self.messages.console()
        passages = import_prototype(self.folder)
        make = partial(PassageIndex.create, rebuild=True) if self.rebuild else PassageIndex.open_or_create
        return _add(make(self.index, self.model.load(), self.settings), passages, paths=(), console=console)


def _add(index: Any, passages: Iterator[Any], *, paths: Sequence[Path], console: Console) -> int:
    gauge = Gauge(paths)
    with passage_bar(console, "indexing", gauge) as progress:
        counts = index.add(gauge.watch(passages), progress=progress)
    show(counts, as_json=True)
    return 0


@dataclass(frozen=True)
class Index:
    """Make an index of passages and look after it."""

    command: (
        Annotated[IndexBuild, subcommand("build")]
        | Annotated[IndexAdd, subcommand("add")]
        | Annotated[IndexDelete, subcommand("delete")]
        | Annotated[IndexInfo, subcommand("info")]
        | Annotated[IndexVerify, subcommand("verify")]
        | Annotated[IndexImport, subcommand("import-prototype")]
    )

    def run(self) -> int:
        """Run the command."""
        return self.command.run()
