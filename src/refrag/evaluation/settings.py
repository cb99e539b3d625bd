"""Settings of the measurements: plain dataclasses, without torch or transformers, so that the CLI can show them at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import Budget, PolicyName
from ..errors import InputError

DecoderShape = Literal["tiny", "llama-3.2-1b", "llama-3.2-3b", "llama-2-7b"]
"""Decoders built with random weights of the real sizes: values do not change speed."""

EncoderShape = Literal["tiny", "roberta-base-shallow", "roberta-base", "roberta-large"]
"""Encoders built the same way; `roberta-base-shallow` has the width of roberta-base (768) and two of its twelve layers."""


@dataclass(frozen=True)
class LatencySettings:
    """Time to first token of REFRAG against the bare decoder's prefill on the same number of slots."""

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
    expand_fraction: float = 0.0
    """Share of the chunks to expand. 0 still runs the policy, and leaves one slot a chunk."""
    index_passages: int = 64
    """Passages in the on-disk index; every request draws `num_passages` of them."""
    baseline: Literal["none", "full"] = "none"
    """`full` also times plain RAG: the same engine with every chunk expanded."""
    uncached: bool = False
    """Also time requests whose chunk vectors are computed by the encoder, not read."""
    min_repeats: int = 7
    """Rounds at least; a round runs every system once, in a shuffled order."""
    max_repeats: int = 40
    """Rounds at most; when the medians are not steady by then, the result says so."""
    tolerance: float = 0.02
    """Steady: the 95 % interval of every reported ratio's median is within this share of it, either side."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    """Weights' dtype."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    threads: int | None = None
    """Torch threads; by default as many as torch chooses."""
    seed: int = 0
    """Seed of weights, text and the order within a round."""
    index: Path | None = None
    """Folder for the index; by default a temporary one, removed afterwards."""
    out: Path | None = None
    """JSON file for the result."""

    def __post_init__(self) -> None:
        for name in ("context_tokens", "question_tokens", "chunk_size", "num_passages", "index_passages"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, was {getattr(self, name)}.")
        if self.context_tokens % self.num_passages:
            raise InputError(
                f"context_tokens must divide evenly over num_passages, were {self.context_tokens} and {self.num_passages}: "
                f"try context_tokens {self.context_tokens // self.num_passages * self.num_passages or self.num_passages}."
            )
        if self.index_passages < self.num_passages:
            raise InputError(f"index_passages must be num_passages ({self.num_passages}) or more, was {self.index_passages}.")
        if self.min_repeats < 6:  # fewer rounds have no 95 % interval of a median
            raise InputError(f"min_repeats must be 6 or more for an interval of the median, was {self.min_repeats}.")
        if self.max_repeats < self.min_repeats:
            raise InputError(f"max_repeats must be min_repeats ({self.min_repeats}) or more, was {self.max_repeats}.")
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance must lie between 0 and 1, was {self.tolerance}: try 0.02.")
        Budget(expand_fraction=self.expand_fraction)
