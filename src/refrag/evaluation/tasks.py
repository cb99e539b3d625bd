"""Settings of the measurements of quality: plain dataclasses, without torch or transformers, so that the CLI can show them at once."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import POLICIES, Budget, IndexSettings, check_whole
from ..errors import InputError

Progress = Callable[[str, int, int], object]
"""(what is going on, how many are done, of how many)."""

Mode = Literal["dense", "text", "hybrid"]

RULES = tuple(name for name in POLICIES if name not in ("none", "all", "learned"))
"""The fixed rules that choose chunks."""


@dataclass(frozen=True, kw_only=True)
class QuestionSettings:
    """Where questions come from and what is retrieved for them."""

    data: tuple[str, ...] = ()
    """Questions: files, folders, saved data sets (`folder:split`), hub names, or the invented world: `almanac`, `almanac-long` (long passages), `almanac-forms` (new sentences)."""
    limit: int | None = None
    """Only so many questions, drawn at random by the seed."""
    index: str | None = None
    """Folder of an index to retrieve from, instead of each row's own passages."""
    pool: bool = False
    """Retrieve from the passages of all rows together, in an index made for the run, instead of each row's own."""
    sentence_encoder: str = IndexSettings.retriever
    """Sentence encoder of the pool's index and of --rank; an --index has its own."""
    skip_bad: bool = False
    """Leave out rows that cannot be used, and say how many, instead of stopping at the first."""
    seed: int = 0
    """Seed of everything drawn: questions, passages, the random policy, the order of the timings, the resampling."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        """Raises InputError for values out of range."""
        if not self.data:
            raise InputError("There is nothing to ask: name questions with --data, for example  --data almanac")
        if self.limit is not None:
            check_whole("limit", self.limit, minimum=1)
        if self.index is not None and self.pool:
            raise InputError("Passages are retrieved from one place: give either --index or --pool.")
        check_whole("seed", self.seed, minimum=0)

    def portable(self) -> dict[str, Any]:
        """The settings for a results file: without this machine's folders."""
        values = {name: value for name, value in asdict(self).items() if name not in ("out", "answers_out", "prompts_out", "index")}
        return values | {"data": [portable_name(name) for name in self.data], "index": self.index is not None}


@dataclass(frozen=True, kw_only=True)
class QaSettings(QuestionSettings):
    """Answers of every system to the same questions over the same passages, by one decoder in one run."""

    systems: tuple[str, ...] = ()
    """What is compared: no-passages, plain, plain-top1 (any number), truncated, and policies; by default all of them.

    `plain` is plain RAG, `truncated` plain RAG cut to the slots of the policy `none`. `similarity@0.2` has an expand fraction
    of its own, `truncated@0.2` as many slots as a policy then has."""
    num_passages: int = 8
    """Passages a question, at most."""
    expand_fractions: tuple[float, ...] = (0.1,)
    """Shares of the chunks to expand: every policy is run at each."""
    retriever: Literal["strong", "weak"] = "strong"
    """strong: the best passages; weak: the paper's random choice among the best `weak_depth`. Of a row's own passages strong keeps the gold ones."""
    rank: bool = False
    """Put each row's own passages in the order of their similarity to the question, by --sentence-encoder: what a search would have done.
    Otherwise they keep the row's order, and systems that read only the first ones find the answer there by chance."""
    weak_depth: int = 200
    """Passages that the weak retriever draws from."""
    mode: Mode = "dense"
    """Retrieval by meaning, by words (BM25), or by both."""
    max_new_tokens: int = 32
    """Longest answer, in tokens."""
    stop: tuple[str, ...] = ("\n",)
    """The answer ends before any of these strings."""
    rouge: bool = False
    """Also ROUGE-1, -2 and -L."""
    batch_size: int = 16
    """Questions answered at a time."""
    timed_requests: int = 16
    """Questions asked once more, one at a time and all systems by turns, for the time to first token; 0: none."""
    num_examples: int = 3
    """Questions whose answers and traces are kept in the result."""
    answers_out: Path | None = None
    """JSON lines file for every answer of every system with its scores."""
    prompts_out: Path | None = None
    """JSON lines file for the prompts of plain RAG in token ids: what benchmarks/peers reads."""

    def __post_init__(self) -> None:
        """Raises InputError for values out of range."""
        super().__post_init__()
        for name, minimum in (("num_passages", 1), ("weak_depth", 1), ("max_new_tokens", 1), ("batch_size", 1), ("timed_requests", 0), ("num_examples", 0)):
            check_whole(name, getattr(self, name), minimum=minimum)
        for fraction in self.expand_fractions:
            Budget(expand_fraction=fraction)
        if self.rank and (self.index is not None or self.pool):
            raise InputError("Retrieved passages come best first already: leave out --rank, or --index and --pool.")
        resolve_systems(self, has_trained_policy=True)


@dataclass(frozen=True)
class System:
    """One way to answer."""

    name: str
    kind: Literal["plain", "truncated", "policy"]
    policy: str = "all"
    expand_fraction: float | None = None
    """Of a policy; of `truncated` that of the policy whose slots it gets."""
    top: int | None = None
    """Only the first so many passages; None: all."""

    @property
    def is_baseline(self) -> bool:
        """A way without compressed passages."""
        return self.kind != "policy"


def resolve_systems(settings: QaSettings, *, has_trained_policy: bool) -> list[System]:
    """The systems of the settings, each once, `plain` first: what everything is compared with.

    Raises InputError for a name that is none, and for `learned` where the model has no trained policy.
    """
    rules = (*RULES, *(("learned",) if has_trained_policy else ()))
    names = settings.systems or ("no-passages", "plain", "plain-top1", "truncated", "none", *rules, *(f"truncated@{p:g}" for p in settings.expand_fractions))
    if "learned" in {name.partition("@")[0] for name in names} and not has_trained_policy:
        raise InputError("This model has no trained policy: leave 'learned' out of --systems, or train one.")
    found = [system for name in ("plain", *names) for system in _systems(name, settings)]
    return list({system.name: system for system in found}.values())


def _systems(name: str, settings: QaSettings) -> list[System]:
    base, at, share = name.partition("@")
    fraction = _fraction(share, name) if at else None
    if base == "truncated":
        return [System(name if at else "truncated", "truncated", expand_fraction=fraction or 0.0)]
    if base in ("random", "first", "similarity", "perplexity", "perplexity-low", "learned"):
        fractions = (fraction,) if fraction is not None else settings.expand_fractions
        return [System(f"{base}@{p:g}", "policy", base, p) for p in fractions]
    if not at:
        top = re.fullmatch(r"plain-top([1-9]\d*)", name)
        fixed = {
            "no-passages": System(name, "plain", top=0),
            "plain": System(name, "plain"),
            "none": System(name, "policy", "none"),
        }
        if name in fixed or top:
            return [System(name, "plain", top=int(top[1])) if top else fixed[name]]
    raise InputError(
        f"There is no system {name!r}: choose among no-passages, plain, plain-top1, truncated, none, {', '.join((*RULES, 'learned'))}; "
        "the policies and truncated also as in similarity@0.2."
    )


def _fraction(share: str, name: str) -> float:
    try:
        fraction = float(share)
    except ValueError as error:
        raise InputError(f"What follows @ must be a share of the chunks between 0 and 1, was {name!r}: write for example similarity@0.2") from error
    Budget(expand_fraction=fraction)  # refuses others
    return fraction


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings(QuestionSettings):
    """How often retrieval finds the gold passages."""

    modes: tuple[Mode, ...] = ("dense", "text", "hybrid")
    """Retrieval by meaning, by words (BM25), by both rankings fused."""
    cutoffs: tuple[int, ...] = (1, 5, 10, 20)
    """The k of recall@k; the MRR looks as far as the largest."""

    def __post_init__(self) -> None:
        """Raises InputError for values out of range, and where there is nothing to search in."""
        super().__post_init__()
        if self.index is None and not self.pool:
            raise InputError("Retrieval needs something to search in: give --index FOLDER, or --pool for the passages of all rows together.")
        for cutoff in self.cutoffs:
            check_whole("cutoffs", cutoff, minimum=1)
        if not self.cutoffs or not self.modes:
            raise InputError("There is nothing to measure: give --cutoffs and --modes at least one value each.")


@dataclass(frozen=True, kw_only=True)
class PerplexitySettings:
    """Log-perplexity of what follows a context, by how the context is given (the paper's protocol)."""

    context_tokens: int = 256
    """Tokens of context, s: a multiple of the chunk size."""
    output_tokens: tuple[int, ...] = (16, 32, 128)
    """Numbers of tokens after the context that are scored, o: a value for each."""
    policies: tuple[str, ...] = ()
    """Policies to compare at equal rate; by default all that the model has."""
    expand_fractions: tuple[float, ...] = (0.1,)
    """Shares of the chunks that each policy expands."""
    limit: int = 256
    """Windows of text at most, drawn at random by the seed."""
    batch_size: int = 8
    """Windows at a time."""
    seed: int = 0
    """Seed of the windows, of the random policy and of the resampling."""

    def __post_init__(self) -> None:
        """Raises InputError for values out of range."""
        for name in ("context_tokens", "limit", "batch_size"):
            check_whole(name, getattr(self, name), minimum=1)
        if not self.output_tokens:
            raise InputError("There is nothing to score: give --output-tokens one number or more, for example 16 128.")
        for number in self.output_tokens:
            check_whole("output_tokens", number, minimum=1)
        for fraction in self.expand_fractions:
            Budget(expand_fraction=fraction)


def portable_name(name: str) -> str:
    """A file's name with its folder, which says more than the name alone; a hub name as it is."""
    return "/".join(Path(name).parts[-2:]) if name.startswith((".", "/", "~")) or Path(name).exists() else name
