"""Prompts and expand masks become a `Layout` of integers; one indexed lookup then builds the decoder's mixed inputs.

A slot is one position of the decoder's input. Masks, positions, labels and all counts follow from the integers alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .errors import InputError
from .text import Prompt

PADDING = -1
IGNORED = -100
"""Label of a slot without loss, as in transformers."""

ExpandMask = Sequence[bool] | np.ndarray | Bool[Tensor, "_"]
"""One entry a chunk of one prompt; True: the chunk's tokens stand in the prompt, False: its vector does."""
PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class Layout:
    """What each slot of a batch holds.

    `source` is PADDING, or a row of the token table (`0 … T-1`, T = `len(token_ids)`), or `T + c` for chunk c of the chunk table.
    """

    source: Int[Tensor, "batch slot"]
    token_ids: Int[Tensor, "token"]
    """The token table: every token that occupies a slot, all rows in order."""
    num_chunks: int
    """Rows of the chunk table: the chunks of all prompts in order, expanded ones too."""
    labels: Int[Tensor, "batch slot"]
    """Not shifted, as in transformers; IGNORED where there is no loss."""
    has_labels: bool
    """Some slot has a loss."""
    num_slots: tuple[int, ...]
    """Per row: occupied slots."""
    context_tokens: tuple[int, ...]
    """Per row: tokens of the context with every chunk expanded, numbering, titles and separators included."""
    context_slots: tuple[int, ...]
    """Per row: slots the context occupies, numbering, titles and separators included."""

    @property
    def attention_mask(self) -> Int[Tensor, "batch slot"]:
        """1 where a slot is occupied."""
        return (self.source != PADDING).long()

    @property
    def position_ids(self) -> Int[Tensor, "batch slot"]:
        """Positions that count occupied slots only, so that a padded row equals the row alone."""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp(min=0)

    @property
    def compression_rate(self) -> list[float]:
        """Measured rate of each row: context tokens ÷ context slots; 1.0 without context."""
        return [tokens / slots if slots else 1.0 for tokens, slots in zip(self.context_tokens, self.context_slots, strict=True)]

    def to(self, device: torch.device | str) -> "Layout":
        """The same layout with its tensors on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("source", "token_ids", "labels")}
        return replace(self, **moved)

    def kv_bytes(self, config: Any, dtype: torch.dtype) -> list[int]:
        """Bytes of the key-value cache of each row for a decoder of this `config` (a PretrainedConfig) and cache `dtype`."""
        config = config.get_text_config(decoder=True)
        num_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        slot_bytes = 2 * config.num_hidden_layers * num_kv_heads * head_dim * dtype.itemsize
        return [slots * slot_bytes for slots in self.num_slots]


@dataclass
class MixedInputs:
    """Input of the decoder: token embeddings and projected chunk embeddings, in slot order."""

    inputs_embeds: Float[Tensor, "batch slot hidden"]
    attention_mask: Int[Tensor, "batch slot"]
    position_ids: Int[Tensor, "batch slot"]
    labels: Int[Tensor, "batch slot"]


def lay_out(
    prompts: Sequence[Prompt],
    expand_masks: Sequence[ExpandMask],
    *,
    completions: Sequence[Sequence[int]] | None = None,
    labels: Sequence[Sequence[int]] | None = None,
    padding_side: PaddingSide = "left",
) -> Layout:
    """The layout of a batch: prompt b with its chunks expanded where `expand_masks[b]` is True.

    `completions[b]` are token ids that follow prompt b (training targets); `labels[b]` are theirs, by default the ids
    themselves. Raises InputError when the numbers of prompts, masks, chunks, completions and labels do not agree.
    """
    _check_lengths(prompts, expand_masks=expand_masks, completions=completions, labels=labels)
    if padding_side not in ("left", "right"):
        raise InputError(f"padding_side must be 'left' or 'right', was {padding_side!r}.")
    endings = [np.asarray(ids, dtype=np.int64) for ids in completions or [()] * len(prompts)]
    targets = endings if labels is None else [np.asarray(ids, dtype=np.int64) for ids in labels]
    masks = [_as_array(mask, prompt) for prompt, mask in zip(prompts, expand_masks, strict=True)]
    rows = [_row(prompt, mask, ending) for prompt, mask, ending in zip(prompts, masks, endings, strict=True)]
    slot_labels = _labels(rows, endings, targets)
    return Layout(
        source=_pad(_sources(rows, [len(mask) for mask in masks]), PADDING, padding_side),
        token_ids=torch.from_numpy(np.concatenate([tokens for tokens, _ in rows])),
        num_chunks=sum(map(len, masks)),
        labels=_pad(slot_labels, IGNORED, padding_side),
        has_labels=any((target != IGNORED).any() for target in targets),
        num_slots=tuple(map(len, slot_labels)),
        context_tokens=tuple(prompt.num_context_tokens for prompt in prompts),
        context_slots=tuple(_context_slots(prompt, mask) for prompt, mask in zip(prompts, masks, strict=True)),
    )


def num_slots(prompt: Prompt, expand_mask: ExpandMask) -> int:
    """Slots the prompt occupies under a mask, without any tensor."""
    lengths, chunk = prompt.piece_table
    return int(lengths[chunk < 0].sum()) + _context_slots(prompt, _as_array(expand_mask, prompt)) - prompt.num_context_overhead


def mix(layout: Layout, token_embedding: nn.Module, projected_embeds: Float[Tensor, "chunk hidden"]) -> MixedInputs:
    """The decoder's inputs: one indexed lookup into the token and chunk tables, differentiable in both.

    Token vectors come from calling `token_embedding` (Gemma scales inside it); chunk vectors take their dtype. Padding
    slots are zeros.
    """
    if len(projected_embeds) != layout.num_chunks:
        raise InputError(f"The layout has {layout.num_chunks} chunks, but {len(projected_embeds)} vectors were given: pass one vector a chunk, expanded ones too.")
    tokens = token_embedding(layout.token_ids)
    table = torch.cat([tokens, projected_embeds.to(tokens), tokens.new_zeros(1, tokens.shape[-1])])
    return MixedInputs(table[layout.source], layout.attention_mask, layout.position_ids, layout.labels)  # PADDING is the last row


_Row = tuple[np.ndarray, np.ndarray]
"""Token ids of the occupied slots, and per slot its chunk (PADDING: a token)."""


def _row(prompt: Prompt, expand_mask: np.ndarray, completion: np.ndarray) -> _Row:
    lengths, chunk = prompt.piece_table
    as_tokens = (chunk < 0) | np.append(expand_mask, False)[chunk]
    tokens = prompt.token_table[np.repeat(as_tokens, lengths)]
    slot_chunk = np.repeat(np.where(as_tokens, PADDING, chunk), np.where(as_tokens, lengths, 1))
    return np.concatenate([tokens, completion]), np.concatenate([slot_chunk, np.full(len(completion), PADDING)])


def _sources(rows: list[_Row], num_chunks: list[int]) -> list[np.ndarray]:
    """`Layout.source` of each row, unpadded."""
    next_token, next_chunk = 0, sum(len(tokens) for tokens, _ in rows)
    sources = []
    for (tokens, slot_chunk), count in zip(rows, num_chunks, strict=True):
        source = slot_chunk + next_chunk
        source[slot_chunk < 0] = np.arange(next_token, next_token + len(tokens))
        sources.append(source)
        next_token += len(tokens)
        next_chunk += count
    return sources


def _labels(rows: list[_Row], completions: list[np.ndarray], targets: list[np.ndarray]) -> list[np.ndarray]:
    for number, (completion, target) in enumerate(zip(completions, targets, strict=True)):
        if len(completion) != len(target):
            raise InputError(f"Row {number} has a completion of {len(completion)} tokens, but {len(target)} labels: give one label a token.")
    fronts = [len(slots) - len(target) for (_, slots), target in zip(rows, targets, strict=True)]
    return [np.concatenate([np.full(front, IGNORED), target]) for front, target in zip(fronts, targets, strict=True)]


def _pad(rows: list[np.ndarray], value: int, side: PaddingSide) -> Int[Tensor, "batch slot"]:
    width = max(map(len, rows))
    padded = np.full((len(rows), width), value, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        start = width - len(row) if side == "left" else 0
        target[start : start + len(row)] = row
    return torch.from_numpy(padded)


def _context_slots(prompt: Prompt, expand_mask: np.ndarray) -> int:
    lengths, chunk = prompt.piece_table
    return prompt.num_context_overhead + int(np.where(expand_mask, lengths[chunk >= 0], 1).sum())


def _as_array(expand_mask: ExpandMask, prompt: Prompt) -> np.ndarray:
    mask = np.asarray(expand_mask.numpy(force=True) if isinstance(expand_mask, Tensor) else expand_mask, dtype=bool)
    if mask.shape != (len(prompt.chunks),):
        raise InputError(f"An expand mask must have one entry a chunk ({len(prompt.chunks)}), had shape {mask.shape}.")
    return mask


def _check_lengths(prompts: Sequence[Prompt], **others: Sequence[Any] | None) -> None:
    if not prompts:
        raise InputError("A layout needs at least one prompt, none was given.")
    for name, values in others.items():
        if values is not None and len(values) != len(prompts):
            raise InputError(f"{name} must have one entry a prompt ({len(prompts)}), had {len(values)}.")
