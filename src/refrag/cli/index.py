"""`refrag index`: make an index of passages and look after it."""

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, subcommand

from ..config import IndexSettings
from ..errors import InputError, NotFoundError
from .options import AsJson, Folder, Messages, ModelOptions, Owner, Reading, check_paths, show
from .progress import Count, Gauge, passage_bar


@dataclass(frozen=True)
class IndexBuild:
    """Make an index of files and folders: txt, md, html, pdf, json, jsonl, csv, parquet (.gz too), and of Hugging Face datasets, saved ones or by hub name (owner/name, owner/name:split).

    After an interruption the same command finishes the rest. What a file no longer holds is removed.
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
    """Make it anew beside the index that is there, and replace that one at the end."""

    def run(self) -> int:
        """Create or continue the index."""
        check_paths(self.paths)
        from ..index import building

        console, model = self.messages.console(), self.model.load()
        sources: set[str] = set()
        passages = _started(self.reading.passages(self.paths, model, self.settings, sources))
        with building(self.index, model, self.settings, rebuild=self.rebuild) as index:
            return _add(index, passages, Gauge(self.paths), console=console, sources=sources)


@dataclass(frozen=True)
class IndexAdd:
    """Add files and folders to an index; passages with a known id are updated, unchanged ones are not encoded again.

    What a file no longer holds is removed.
    """

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
        sources: set[str] = set()
        passages = self.reading.passages(self.paths, model, index.settings, sources)
        return _add(index, passages, Gauge(self.paths), console=console, sources=sources)


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
        """Prints how many there were, and the ids that there were not; none at all is an error."""
        if not self.ids:
            raise InputError("Nothing was named to delete: give the ids of passages.")
        self.messages.console()
        index, ids = self.owner.open(self.index), list(dict.fromkeys(self.ids))
        known = index.known(ids)
        unknown = [identity for identity in ids if identity not in known]
        if not known:
            raise NotFoundError(f"The index at {self.index} has no passage with the id {', '.join(unknown[:3])}{'…' * (len(unknown) > 3)}: check the ids.")
        show({"deleted": index.delete(ids)} | ({"unknown": unknown} if unknown else {}), as_json=True)
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
        from ..index.table import DamagedIndexError

        try:
            index = self.owner.open(self.index)
            count = Count(index.count)
            with passage_bar(console, "verifying", count) as progress:
                problems = index.verify(progress=lambda number: progress(count.add(number)))
        except DamagedIndexError as error:
            print(error)
            return 1
        for problem in problems:
            print(problem)
        console.print(f"{index.count:,} passage{'s'[: index.count != 1]}, {len(problems) or 'no'} problem{'s'[: len(problems) != 1]}")
        return 1 if problems else 0


@dataclass(frozen=True)
class IndexImport:
    """Make an index of the prototype's index folder: faiss.index with faiss_passages.npy or texts.npy; convert its checkpoint too."""

    folder: Positional[Path]
    """The prototype's index folder."""
    index: Folder
    """Folder of the new index."""
    settings: IndexSettings
    model: ModelOptions
    messages: Messages
    rebuild: bool = False
    """Make it anew beside the index that is there, and replace that one at the end."""
    checkpoint: Path | None = None
    """Folder of a prototype checkpoint (checkpoint.pt and decoder/), whose model makes the index; needs --save-model."""
    save_model: Path | None = None
    """Folder for the model that is made of the checkpoint."""

    def run(self) -> int:
        """Its passages are encoded anew: the prototype stored no chunk vectors."""
        from ..index import building, import_prototype

        console = self.messages.console()
        passages = list(import_prototype(self.folder))  # they were read whole already
        with building(self.index, self._model(console), self.settings, rebuild=self.rebuild) as index:
            return _add(index, iter(passages), Count(len(passages)), console=console)

    def _model(self, console: Console) -> Any:
        """The model named, or the one made of the checkpoint."""
        if (self.checkpoint is None) != (self.save_model is None):
            raise InputError("A checkpoint is converted into a model folder: give both --checkpoint FOLDER and --save-model FOLDER.")
        if self.checkpoint is None:
            return self.model.load()
        if self.model.model != ModelOptions.model:
            raise InputError("The index is made by one model: give either --model or --checkpoint.")
        from ..index.checkpoint import NOT_CONVERTED, convert_checkpoint

        convert_checkpoint(self.checkpoint).save_pretrained(str(self.save_model))
        console.print(f"{self.checkpoint} is now the model {self.save_model}. {NOT_CONVERTED}")
        return replace(self.model, model=str(self.save_model)).load()


def _started(passages: Iterator[Any]) -> Iterator[Any]:
    """The same passages, the first one read now: input that is refused at once costs no index."""
    return chain(list(islice(passages, 1)), passages)


def _add(index: Any, passages: Iterator[Any], gauge: Gauge | Count, *, console: Console, sources: Set[str] = frozenset()) -> int:
    with passage_bar(console, "indexing", gauge) as progress:
        counts = index.add(gauge.watch(passages), progress=progress, sources=sources)
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
