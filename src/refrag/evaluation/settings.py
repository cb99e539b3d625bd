"""Settings of the measurements: plain dataclasses, without torch or transformers, so that the CLI can show them at once."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import Budget, PolicyName
from ..errors import InputError

DecoderShape = Literal["tiny", "smollm2-135m", "llama-3.2-1b", "llama-3.2-3b", "llama-2-7b"]
"""Decoders built with random weights of the real sizes: values do not change speed."""

EncoderShape = Literal["tiny", "roberta-base-shallow", "roberta-base", "roberta-large"]
"""Encoders built the same way; `roberta-base-shallow` has the width of roberta-base (768) and two of its twelve layers."""


@dataclass(frozen=True)
class Rounds:
    """How often the systems run, and what becomes of the result."""

    min_repeats: int = 7
    """Rounds at least; a round runs every system once, in a shuffled order."""
    max_repeats: int = 40
    """Rounds at most; when the medians are not steady by then, the result says so."""
    tolerance: float = 0.02
    """Steady: the 95 % interval of every reported ratio's median is within this share of it, either side."""
    threads: int | None = None
    """Torch threads; by default as many as torch chooses."""
    seed: int = 0
    """Seed of weights, text and the order within a round."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        """Raises InputError for values that cannot be measured with."""
        if self.min_repeats < 6:  # fewer rounds have no 95 % interval of a median
            raise InputError(f"min_repeats must be 6 or more for an interval of the median, was {self.min_repeats}.")
        if self.max_repeats < self.min_repeats:
            raise InputError(f"max_repeats must be {self.min_repeats} or more, the least number of rounds, was {self.max_repeats}.")
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance must lie between 0 and 1, was {self.tolerance}: try 0.02.")
        if self.threads is not None:
            at_least_one(self, "threads")
        check_out(self.out)

    def portable(self) -> dict[str, Any]:
        """The settings without this machine's folders."""
        return {name: value for name, value in asdict(self).items() if name not in ("index", "out")}


@dataclass(frozen=True)
class Reading(Rounds):
    """A model, and prompts of so many tokens."""

    shape: DecoderShape = "llama-3.2-1b"
    """Decoder to build with random weights; not used with --model."""
    encoder_shape: EncoderShape = "roberta-base"
    """Encoder to build with random weights; not used with --model."""
    model: str | None = None
    """A trained REFRAG model to measure instead of a shape: folder, name, or `bundled`."""
    context_tokens: int = 4096
    """Tokens of passage text in the prompt."""
    question_tokens: int = 128
    """Question and template tokens, numbering and separators included: they are never compressed."""
    chunk_size: int = 16
    """Tokens per chunk, k; with --model the model's own."""
    num_passages: int = 8
    """Passages that share the context tokens."""
    policy: PolicyName = "learned"
    """Policy that scores the chunks; a shape has an untrained transformer policy of the real size."""
    question_aware: bool = True
    """A shape's policy reads the question too, with the encoder; the paper's does not. With --model its own policy is used."""
    expand_fraction: float = 0.0
    """Share of the chunks to expand. 0 still runs the policy, and leaves one slot a chunk."""
    index_passages: int = 64
    """Passages in the on-disk index; every request draws `num_passages` of them."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    """Weights' dtype."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    index: Path | None = None
    """Folder for the index; by default a temporary one, removed afterwards."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "context_tokens", "question_tokens", "chunk_size", "num_passages", "index_passages")
        self._check_context(self.context_tokens, "context_tokens")
        if self.index_passages < self.num_passages:
            raise InputError(f"index_passages must be num_passages ({self.num_passages}) or more, was {self.index_passages}.")
        Budget(expand_fraction=self.expand_fraction)
        if self.model is not None and not self.question_aware:
            raise InputError(f"A trained model has its own policy, --model {self.model} was given with --no-question-aware: leave one of them out.")

    def _check_context(self, tokens: int, name: str) -> None:
        if tokens < 1 or tokens % self.num_passages:
            near = tokens // self.num_passages * self.num_passages or self.num_passages
            raise InputError(f"{name} must divide evenly over num_passages, were {tokens} and {self.num_passages}: try {name} {max(near, self.num_passages)}.")


@dataclass(frozen=True)
class LatencySettings(Reading):
    """Time to first token and between tokens: REFRAG against the bare decoder on the same number of slots, and against plain RAG."""

    baseline: Literal["none", "full"] = "none"
    """`full` also times plain RAG: the same engine with every chunk expanded."""
    uncached: bool = False
    """Also time requests whose chunk vectors are computed by the encoder, not read."""
    in_memory: bool = False
    """Also time requests whose passages and chunk vectors lie in memory already."""
    new_tokens: int = 1
    """Tokens to decode for the time between tokens, against plain `generate` on as many slots; 1: it is not measured."""
    peak_memory: bool = False
    """Also serve requests of each system in a process of its own, for the most memory it needs (a GPU's is measured anyway)."""
    sweep_context: tuple[int, ...] = ()
    """Context lengths to measure one after another, each in a process of its own; a point that fails is marked."""
    sweep_chunk_size: tuple[int, ...] = ()
    """Chunk sizes to measure at every context length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "new_tokens")
        for tokens in self.sweep_context:
            self._check_context(tokens, "sweep_context")
        for size in self.sweep_chunk_size:
            if size < 1:
                raise InputError(f"sweep_chunk_size must be 1 or more, was {size}: try 8 16 32.")
        if self.model is not None and self.sweep_chunk_size:
            raise InputError(f"A trained model has its own chunk size, --model {self.model} was given with sweep_chunk_size: leave one of them out.")


@dataclass(frozen=True)
class ThroughputSettings(Reading):
    """Tokens a second of REFRAG and of plain RAG, answering many requests in one batch."""

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    """Requests answered at once, each number in a process of its own; a point that fails is marked."""
    new_tokens: int = 32
    """Tokens decoded for every request."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "new_tokens")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise InputError(f"batch_sizes must be numbers of 1 or more, were {list(self.batch_sizes)}: try 1 2 4 8.")


@dataclass(frozen=True)
class IndexingSettings:
    """Chunks per second of indexing ÷ those of the encoder's own best forward; peak memory of two corpora."""

    encoder_shape: EncoderShape = "roberta-base"
    """Encoder with random weights of the real size."""
    passages: int = 256
    """Passages added a round."""
    passage_tokens: int = 256
    """Tokens a passage."""
    chunk_size: int = 16
    """Tokens a chunk."""
    batch_size: int = 64
    """Passages encoded and written at a time."""
    rounds: int = 7
    """Rounds of add and bare forward."""
    memory_passages: tuple[int, int] = (2_000, 12_000)
    """Sizes of the two corpora whose peak memory is compared; 0 0 leaves that out."""
    seed: int = 0
    """Seed of weights and text."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        """Raises InputError for values that cannot be measured with."""
        at_least_one(self, "passages", "passage_tokens", "chunk_size", "batch_size", "rounds")
        check_out(self.out)
        if min(self.memory_passages) < 0:
            raise InputError(f"memory_passages must be 0 or more, were {list(self.memory_passages)}: try 1000 5000, or 0 0 for none.")


@dataclass(frozen=True)
class TrainingSpeedSettings(Rounds):
    """A training step against the bare forward and backward of its decoder and encoder; memory with and without checkpointing."""

    stage: Literal["reconstruction", "cpt"] = "cpt"
    """Whose step: `reconstruction` freezes the decoder, `cpt` trains it too."""
    shape: DecoderShape = "smollm2-135m"
    """Decoder to build with random weights, in float32 as training does."""
    encoder_shape: EncoderShape = "roberta-base"
    """Encoder to build with random weights."""
    context_tokens: tuple[int, ...] = (1024, 4096, 8192)
    """Tokens of compressed context a row, each in a process of its own; a point that fails is marked."""
    output_tokens: int = 512
    """Tokens predicted behind the context (cpt; reconstruction predicts the context itself)."""
    chunk_size: int = 16
    """Tokens per chunk, k."""
    batch_size: int = 1
    """Rows a micro-batch."""
    gradient_checkpointing: Literal["off", "on", "both"] = "both"
    """Recompute activations in the backward pass; `both` measures every point twice."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """As in training: autocast over float32 weights."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "output_tokens", "chunk_size", "batch_size")
        for tokens in self.context_tokens:
            if tokens < 1 or tokens % self.chunk_size:
                near = max(tokens // self.chunk_size, 1) * self.chunk_size
                raise InputError(f"context_tokens must be whole chunks of {self.chunk_size}, was {tokens}: try {near}.")
        if not self.context_tokens:
            raise InputError("context_tokens must name one length or more, none was given: try 1024 4096.")


def at_least_one(settings: Any, *names: str) -> None:
    """Raises InputError for a field below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise InputError(f"{name} must be 1 or more, was {getattr(settings, name)}.")


def check_out(path: Path | None, *, name: str = "result.json") -> None:
    """Before anything is measured. Raises InputError for a file that could not be written there; `name` is an example of one."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"out must name a file, {path} is a folder: try --out {path / name}.")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"out must lie in a folder that can be written to, {there} {'cannot' if there.is_dir() else 'is a file'}: choose another --out.")
