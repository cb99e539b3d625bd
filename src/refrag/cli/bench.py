"""`refrag bench` and `refrag report`."""

import json
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, subcommand

from ..evaluation.settings import IndexingSettings, LatencySettings, ThroughputSettings, TrainingSpeedSettings
from .options import Messages


@dataclass(frozen=True)
class BenchLatency:
    """Time to first token and between tokens: REFRAG against the bare decoder on as many slots, and against plain RAG."""

    settings: LatencySettings
    messages: Messages


@dataclass(frozen=True)
class BenchThroughput:
    """Tokens a second of REFRAG and of plain RAG, from one request at once to many."""

    settings: ThroughputSettings
    messages: Messages


@dataclass(frozen=True)
class BenchIndex:
    """Indexing against the encoder's own forward, and the peak memory of two corpora."""

    settings: IndexingSettings
    messages: Messages


@dataclass(frozen=True)
class BenchTrain:
    """A training step against its decoder's and encoder's bare forward and backward, with and without gradient checkpointing."""

    settings: TrainingSpeedSettings
    messages: Messages


MODULES: dict[type, str] = {BenchLatency: "latency", BenchThroughput: "throughput", BenchIndex: "indexing", BenchTrain: "training"}
"""Where in refrag.evaluation each is measured."""


@dataclass(frozen=True)
class Bench:
    """Measure speed and memory: the result goes to stdout as JSON, and in words to stderr. See docs/benchmarks.md."""

    command: (
        Annotated[BenchLatency, subcommand("latency")]
        | Annotated[BenchThroughput, subcommand("throughput")]
        | Annotated[BenchIndex, subcommand("index")]
        | Annotated[BenchTrain, subcommand("train")]
    )

    def run(self) -> int:
        """Measure, then say it."""
        console = self.command.messages.console()
        from ..evaluation.provenance import finite

        measurement = import_module(f"refrag.evaluation.{MODULES[type(self.command)]}")
        content = measurement.run(self.command.settings)
        print(json.dumps(finite(content), indent=1))
        console.print(measurement.summary(content), markup=False, soft_wrap=True)
        return 0


@dataclass(frozen=True)
class Report:
    """Make one page of results files: tables, plots, examples, and where every number comes from."""

    results: Positional[tuple[Path, ...]]
    """Results files, or folders of them."""
    messages: Messages
    out: Path = Path("report.html")
    """The page; it needs no network and no other file."""
    png: Path | None = None
    """Also write every plot as a picture into this folder."""

    def run(self) -> int:
        """Everything happens in refrag.evaluation.report."""
        console = self.messages.console()
        from ..evaluation.report import write_report

        shown, refused = write_report(self.results, self.out, png=self.png)
        for reason in refused:
            console.print(f"left out: {reason}", markup=False, soft_wrap=True)
        console.print(f"{shown} results in {self.out}", markup=False, soft_wrap=True)
        return 0
