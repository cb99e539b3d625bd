"""`refrag eval`: the quality of answers, of what follows a context, and of retrieval."""

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import subcommand

from ..errors import InputError
from ..evaluation.tasks import PerplexitySettings, QaSettings, QuestionSettings, RetrievalSettings, portable_name, resolve_systems
from .options import AsJson, Messages, ModelOptions, show

ALMANAC: dict[str, dict[str, Any]] = {"almanac": {}, "almanac-long": {"length": "long"}, "almanac-forms": {"split": "held-out-forms"}}
"""Names of the invented world as a data set: usual passages, long ones, and sentence and question forms that training never showed."""


@dataclass(frozen=True, kw_only=True)
class EvalQa:
    """Ask several systems the same questions over the same passages: one table, paired with plain RAG."""

    settings: QaSettings
    model: ModelOptions
    messages: Messages
    as_json: AsJson = False
    """Print the whole result as one JSON object instead of the table."""

    def run(self) -> int:
        """Everything happens in refrag.evaluation.qa."""
        console = self.messages.console()
        _check_out(self.settings.out, self.settings.answers_out, self.settings.prompts_out)
        if self.settings.rouge:
            from ..evaluation.metrics import rouge

            rouge("", [""])  # refused now, where the package is missing
        questions, counts = _questions(self.settings, num_passages=self.settings.num_passages)
        _check_index(self.settings.index)
        model = self.model.load()
        resolve_systems(self.settings, has_trained_policy=model.has_trained_policy)  # before anything is indexed
        from ..engine import Refrag
        from ..evaluation import qa
        from ..evaluation.questions import searched_index

        with searched_index(model, questions, self.settings) as index, _bars(console) as progress:
            content = qa.run(Refrag(model, index=index), questions, self.settings, counts=counts, progress=progress)
        _show(content, _qa_table, as_json=self.as_json)
        _saved(self.settings.out, console)
        return 0


@dataclass(frozen=True, kw_only=True)
class EvalRetrieval:
    """How often retrieval finds the gold passages: recall@k and MRR."""

    settings: RetrievalSettings
    model: ModelOptions
    messages: Messages
    as_json: AsJson = False
    """Print the whole result as one JSON object instead of the table."""

    def run(self) -> int:
        """Everything happens in refrag.evaluation.retrieval."""
        console = self.messages.console()
        _check_out(self.settings.out)
        questions, counts = _questions(self.settings, num_passages=8)
        from ..evaluation import retrieval
        from ..evaluation.questions import searched_index

        model = self.model.load() if self.settings.pool else None
        with searched_index(model, questions, self.settings) as index, _bars(console) as progress:
            assert index is not None
            content = retrieval.run(index, questions, self.settings, counts=counts, progress=progress)
        _show(content, _retrieval_table, as_json=self.as_json)
        _saved(self.settings.out, console)
        return 0


@dataclass(frozen=True, kw_only=True)
class EvalPerplexity:
    """Log-perplexity of what follows a context: in full, cut, compressed, and at equal rate by every policy."""

    settings: PerplexitySettings
    model: ModelOptions
    messages: Messages
    data: tuple[str, ...] = ()
    """Texts: files, folders, saved data sets, or names on the Hugging Face hub."""
    text_field: str = "text"
    """Field of a row that holds its text."""
    skip_bad: bool = False
    """Leave out rows that cannot be used instead of stopping at the first."""
    out: Path | None = None
    """JSON file for the result."""
    as_json: AsJson = False
    """Print the whole result as one JSON object instead of the table."""

    def run(self) -> int:
        """Everything happens in refrag.evaluation.perplexity."""
        if not self.data:
            raise InputError("There is nothing to read: name texts with --data.")
        console = self.messages.console()
        _check_out(self.out)
        from ..data.sources import find_sources

        sources = find_sources(self.data, "documents", streaming=False)
        model = self.model.load()
        from ..evaluation.perplexity import measure
        from ..evaluation.provenance import result, write_result

        with _bars(console) as progress:
            values = measure(model, self._documents(sources), self.settings, progress=progress)
        settings = asdict(self.settings) | {"data": [portable_name(name) for name in self.data], "model": portable_name(self.model.model)}
        content = result("perplexity", settings=settings, values=values, seed=self.settings.seed)
        if self.out is not None:
            write_result(self.out, content)
        _show(content, _perplexity_table, as_json=self.as_json)
        _saved(self.out, console)
        return 0

    def _documents(self, sources: list[Any]) -> Iterator[Any]:
        from ..data.rows import document_of

        for place, row in (pair for source in sources for pair in source.read()):
            try:
                if isinstance(row, InputError):
                    raise row
                yield document_of(row, place, text_field=self.text_field)
            except InputError:
                if not self.skip_bad:
                    raise


@dataclass(frozen=True)
class Eval:
    """Measure quality: answers, retrieval, perplexity."""

    command: Annotated[EvalQa, subcommand("qa")] | Annotated[EvalRetrieval, subcommand("retrieval")] | Annotated[EvalPerplexity, subcommand("perplexity")]

    def run(self) -> int:
        """Run the command."""
        return self.command.run()


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _questions(settings: QuestionSettings, *, num_passages: int) -> tuple[list[Any], dict[str, int]]:
    """The questions of files and data sets, or of the almanac."""
    from ..evaluation.questions import read_questions, take_questions

    world = next((name for name in settings.data if name in ALMANAC), None)
    if world is None:
        return read_questions(settings)
    if len(settings.data) > 1:
        raise InputError(f"The almanac is a data set of its own: give --data {world} alone.")
    from ..demo.almanac import evaluation_rows

    count = settings.limit or 1000
    rows = evaluation_rows(count, num_passages=num_passages if not settings.pool else 8, seed=settings.seed, **ALMANAC[world])
    return take_questions(((f"{world}, row {number}", row) for number, row in enumerate(rows, 1)), settings)


def _check_index(index: str | None) -> None:
    """Refused before a model is loaded: an index that is not there."""
    if index is not None:
        from ..index import PassageIndex

        PassageIndex.open(index)


def _check_out(*paths: Path | None) -> None:
    """Refused before anything is measured: a result that cannot be written."""
    for path in filter(None, paths):
        if path.is_dir():
            raise InputError(f"A result is written to a file, {path} is a folder: name a file, for example {path / 'result.json'}")
        existing = next(parent for parent in path.absolute().parents if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise InputError(f"The result cannot be written to {path}, {existing} is no folder that you may write to: name another file.")


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _bars(console: Console) -> Generator[Callable[[str, int, int], None]]:
    """A bar for each thing that is going on, with the time left; nothing is drawn before there is one."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bars = Progress(*columns, console=console, disable=console.quiet, transient=True)
    tasks: dict[str, Any] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            bars.start()
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done)

    try:
        yield progress
    finally:
        if tasks:
            bars.stop()


def _show(content: dict[str, Any], table: Callable[[dict[str, Any]], Any], *, as_json: bool) -> None:
    if as_json:
        show(content, as_json=True)
    else:
        Console().print(table(content))


def _saved(path: Path | None, console: Console) -> None:
    if path is not None:
        console.print(f"result: {path}", markup=False)


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, box=None, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column(columns[0], no_wrap=True)
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _qa_table(content: dict[str, Any]) -> Any:
    data = content["data"]
    title = f"{data['questions']:,} questions, {data['passages_per_question']:.1f} passages each, one decoder"
    table = _table(title, "system", "EM", "F1", "EM less plain, 95 %", "evidence\nexpanded", "slots", "rate", "TTFT\nms")
    for name, own in content["systems"].items():
        if not own["num_questions"]:
            table.add_row(name, "failed")
            continue
        gap = own["against_plain"].get("exact_match")
        cells = [
            *(f"{own['metrics'][metric]['mean']:.3f}" for metric in ("exact_match", "f1")),
            f"{gap['mean']:+.2f} [{gap['low']:+.2f}, {gap['high']:+.2f}]" if gap else "",
            f"{own['evidence_recall']['mean']:.2f}" if own["evidence_recall"] else "",
            f"{own['prompt_slots']:.0f}",
            f"{own['compression_rate']:.1f}",
            f"{1000 * own['ttft_s']['median']:.0f}" if own["ttft_s"] else "",
        ]
        table.add_row(f"{name}\n{own['num_failed']} failed" if own["num_failed"] else name, *cells)
    return table


def _retrieval_table(content: dict[str, Any]) -> Any:
    modes = content["modes"]
    names = [name for name in next(iter(modes.values())) if name != "search_s"]
    title = f"{content['data']['questions']:,} questions, {content['passages']:,} passages; gold by {content['data']['gold_by']}"
    table = _table(title, "mode", *names, "search ms")
    for mode, own in modes.items():
        table.add_row(mode, *(f"{own[name]['mean']:.3f}" for name in names), f"{1000 * own['search_s']['p50']:.1f}")
    return table


def _perplexity_table(content: dict[str, Any]) -> Any:
    outputs = [str(number) for number in content["settings"]["output_tokens"]]
    title = f"nats a token after {content['settings']['context_tokens']} tokens of context, and share of its benefit kept; {content['windows']} windows, k = {content['chunk_size']}"
    table = _table(title, "context", "slots", *(part for o in outputs for part in (f"o = {o}", "kept")))
    for name, own in content["variants"].items():
        cells = []
        for o in outputs:
            kept = own.get("kept", {}).get(o, {}).get("mean")
            cells += [f"{own['nats'][o]['mean']:.3f}" if "nats" in own else "failed", f"{kept:.0%}" if kept is not None else ""]
        table.add_row(name, str(own["slots"]), *cells)
    return table
