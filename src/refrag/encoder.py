"""Chunk texts -> chunk vectors (any Hugging Face encoder) -> the decoder's width (paper section 2: c_i = M_enc(C_i), e_i = phi(c_i))."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn

from .errors import BackendError, InputError
from .text import _safe_copy as safe_copy

logger = logging.getLogger(__name__)

POOLINGS = ("cls", "mean")
"""How the encoder's token vectors become one vector per chunk."""

WINDOW_TEXTS = 8192
"""Texts tokenised and sorted by length at a time: bounds the memory, long enough that sorting leaves little padding."""

_backends: WeakKeyDictionary = WeakKeyDictionary()


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The torch device of `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; `auto` takes CUDA, then MPS, then the CPU.

    Raises InputError for another name and BackendError, naming `--device cpu`, when this machine has no such device.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if str(device) == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"The device must be auto, cpu, cuda, cuda:N or mps, was {device!r}: try --device cpu.") from error
    present = {"cpu": True, "cuda": cuda and (resolved.index or 0) < torch.cuda.device_count(), "mps": mps}
    if not present.get(resolved.type, True):
        raise BackendError(f"This PyTorch sees no device {str(resolved)!r}: run the same command with --device cpu.")
    return resolved


@lru_cache(maxsize=8)
def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where a short probe shows matrix products at least 1.3 times as fast as in float32, else float32."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float32
    try:
        return torch.bfloat16 if _matmul_s(device, torch.bfloat16) * 1.3 < _matmul_s(device, torch.float32) else torch.float32
    except RuntimeError:  # a backend without bfloat16
        return torch.float32


def _matmul_s(device: torch.device, dtype: torch.dtype, *, repeats: int = 5) -> float:
    """Fastest of some runs of one linear layer over 256 rows of width 1024, in seconds."""
    rows, weight = torch.ones(256, 1024, device=device, dtype=dtype), torch.ones(1024, 1024, device=device, dtype=dtype)
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        F.linear(rows, weight).sum().item()  # .item() waits for the device
        times.append(time.perf_counter() - start)
    return min(times[1:])


def rms_normalize(vectors: Float[Tensor, "*any enc"]) -> Float[Tensor, "*any enc"]:
    """Each vector divided by its root mean square: encoders differ in scale, what follows should not see it."""
    return vectors * torch.rsqrt(vectors.float().square().mean(-1, keepdim=True) + 1e-8).to(vectors.dtype)


def pool(
    hidden: Float[Tensor, "chunk token enc"], attention_mask: Int[Tensor, "chunk token"] | None, pooling: str
) -> Float[Tensor, "chunk enc"]:
    """One vector per chunk: the first token's (`cls`) or the mean over the real tokens (`mean`); mask None: no padding.

    Raises InputError for another pooling.
    """
    if pooling == "cls":
        return hidden[:, 0]
    if pooling != "mean":
        raise InputError(f"pooling must be one of {', '.join(POOLINGS)}, was {pooling!r}.")
    if attention_mask is None:
        return hidden.mean(1)
    weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


class Projector(nn.Module):
    """phi: a two-layer MLP from the encoder's width to the decoder's (paper section 2), times one learned scale.

    Chunk vectors are divided by their root mean square first, so that `calibrate` holds for every encoder.
    """

    def __init__(self, encoder_width: int, decoder_width: int, hidden_width: int) -> None:
        super().__init__()
        self.up = nn.Linear(encoder_width, hidden_width)
        self.down = nn.Linear(hidden_width, decoder_width)
        self.log_scale = nn.Parameter(torch.zeros(1))  # one element, not zero-dimensional: FSDP shards no scalars
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random weights, zero biases, scale 1."""
        for layer in (self.up, self.down):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.log_scale)

    @torch.no_grad()
    def calibrate(self, token_embedding_rms: float) -> None:
        """Set the scale so that outputs have this root mean square, that of the decoder's token embeddings.

        A wrong scale is the first cause of divergence. Measured on 256 random directions, seeded.
        """
        weight = self.up.weight
        probe = torch.randn(256, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        self.log_scale.zero_()
        measured = self(probe).float().square().mean().sqrt().item()
        self.log_scale.fill_(math.log(max(token_embedding_rms, 1e-6) / max(measured, 1e-12)))

    def forward(self, chunk_embeds: Float[Tensor, "*any enc"]) -> Float[Tensor, "*any hidden"]:
        """Chunk vectors of any floating type -> vectors at the decoder's width in the projector's type."""
        vectors = rms_normalize(chunk_embeds).to(self.up.weight.dtype)
        return self.down(F.gelu(self.up(vectors))) * self.log_scale.exp()


def encode_batch(
    encoder: Any,
    input_ids: Int[Tensor, "chunk token"],
    attention_mask: Int[Tensor, "chunk token"] | None,
    pooling: str,
) -> Float[Tensor, "chunk enc"]:
    """Vectors of one right-padded batch, differentiable: the form training uses."""
    return pool(encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state, attention_mask, pooling)


def encoder_window(encoder: Any, tokenizer: Any) -> int:
    """Tokens the encoder can read at once, special tokens included: the smaller of its positions and its tokenizer's limit."""
    positions = getattr(encoder.config, "max_position_embeddings", None) or 1 << 30
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    if padding is not None:  # RoBERTa counts positions from there
        positions -= padding + 1
    return int(min(positions, tokenizer.model_max_length))


def _backend(tokenizer: Any) -> tuple[Tokenizer, list[int], list[int]]:
    """(a private core in which no text spells a control token, ids before every text, ids after it)."""
    if tokenizer not in _backends:
        specification = tokenizer.backend_tokenizer.to_str()
        plain = Tokenizer.from_str(specification)
        plain.no_padding()
        plain.no_truncation()
        body, whole = (plain.encode("a", add_special_tokens=special).ids for special in (False, True))
        start = next(i for i in range(len(whole)) if whole[i : i + len(body)] == body)
        _backends[tokenizer] = safe_copy(specification), whole[:start], whole[start + len(body) :]
    return _backends[tokenizer]


def tokenize_texts(tokenizer: Any, texts: Sequence[str], *, window: int) -> list[list[int]]:
    """Encoder token ids per text, special tokens around them, never inside; longer ones are cut to `window` and reported.

    A text without any token (an encoder without special tokens, a blank text) gets the padding token.
    """
    backend, before, after = _backend(tokenizer)
    rows = [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    room = window - len(before) - len(after)
    too_long = sum(len(row) > room for row in rows)
    if too_long:
        logger.warning("%d of %d chunks were cut to the encoder's %d tokens: use a smaller chunk_size.", too_long, len(rows), window)
    return [before + row[:room] + after or [tokenizer.pad_token_id or 0] for row in rows]


def pad_rows(rows: Sequence[Sequence[int]], *, pad_id: int, width: int = 0) -> tuple[Int[Tensor, "chunk token"], Int[Tensor, "chunk token"]]:
    """Rows of ids -> (input_ids, attention_mask), padded on the right to the longest, or to `width` where that is more."""
    lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    mask = np.arange(lengths.max(initial=width)) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=int(lengths.sum()))
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def encoder_inputs(
    encoder: Any, tokenizer: Any, texts: Sequence[str]
) -> tuple[Int[Tensor, "chunk token"], Int[Tensor, "chunk token"]]:
    """(input_ids, attention_mask) of some chunk texts in one batch: what a training collator needs before `encode_batch`."""
    return pad_rows(tokenize_texts(tokenizer, texts, window=encoder_window(encoder, tokenizer)), pad_id=tokenizer.pad_token_id or 0)


def length_batches(lengths: Sequence[int], batch_tokens: int, *, step: int = 1) -> Iterator[tuple[list[int], int]]:
    """(row numbers, width), longest rows first, in batches of at most `batch_tokens` tokens, padded to a multiple of `step`.

    The last rows, too few for a batch, are split into powers of two: a CPU keeps the kernels of every shape it has seen.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        width = -(-lengths[order[start]] // step) * step
        size, left = max(1, batch_tokens // width), len(order) - start
        size = size if left >= size else 1 << left.bit_length() - 1
        yield order[start : start + size], width
        start += size


def encode_texts(
    encoder: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    pooling: str,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Float[Tensor, "chunk enc"]:
    """The vector of each text, float32, on the encoder's device, in the order given, without gradient.

    Batches are sorted by length and hold at most `batch_tokens` tokens (None: 1,280 on a CPU, 32,768 elsewhere);
    `progress` is called with the number of texts done after each. Texts longer than the encoder's window are cut and reported.
    """
    device, window = next(encoder.parameters()).device, encoder_window(encoder, tokenizer)
    batch_tokens = batch_tokens or (1280 if device.type == "cpu" else 32768)
    vectors = torch.empty(len(texts), encoder.config.hidden_size, device=device)  # outside inference_mode: training may use it
    with torch.inference_mode():
        for start in range(0, len(texts), WINDOW_TEXTS):
            rows = tokenize_texts(tokenizer, texts[start : start + WINDOW_TEXTS], window=window)
            for batch, _ in length_batches([len(row) for row in rows], batch_tokens):
                ids, mask = pad_rows([rows[number] for number in batch], pad_id=tokenizer.pad_token_id or 0)
                # without padding no mask: the encoder then skips it, and need not ask the device whether it is full
                mask = None if len(rows[batch[-1]]) == ids.shape[1] else mask.to(device, non_blocking=True)
                pooled = encode_batch(encoder, ids.to(device, non_blocking=True), mask, pooling)
                vectors[torch.tensor(batch, device=device) + start] = pooled.float()
                if progress:
                    progress(len(batch))
    return vectors
