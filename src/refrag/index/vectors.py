"""Chunk vectors as bytes and back: half precision, or 8 bits with one scale a vector.

A row is one vector. The rows of a passage lie one after the other in one binary cell, so a passage and its vectors are
written together or not at all, and the cells of many passages are read as one block.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import InputError

_HALF_MAX = 65504.0


def row_type(storage: str, width: int) -> np.dtype:
    """The numpy type of one stored vector: `width` halves, or a float32 scale before `width` signed bytes."""
    if storage == "int8":
        return np.dtype([("scale", "<f4"), ("values", "i1", (width,))])
    return np.dtype(("<f2", (width,)))


def pack(embeds: Float[np.ndarray, "chunk enc"], counts: Sequence[int], storage: str) -> pa.LargeBinaryArray:
    """One binary cell per passage; `counts` says how many of the rows belong to each.

    Raises InputError when a vector is not finite, or does not fit into half precision.
    """
    assert sum(counts) == len(embeds)
    largest = float(np.abs(embeds).max(initial=0.0))
    if not np.isfinite(largest):
        raise InputError("The encoder produced a vector that is not finite: use float32 weights (--dtype float32) or another model.")
    if storage == "int8":
        rows = _quantized(embeds)
    elif largest > _HALF_MAX:
        raise InputError(f"Chunk vectors must stay below {_HALF_MAX:.0f} to be stored as float16, one holds {largest:.0f}: use --storage int8.")
    else:
        rows = np.ascontiguousarray(embeds, dtype="<f2")
    row_bytes = row_type(storage, embeds.shape[1]).itemsize
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64) * row_bytes
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(counts), [None, pa.py_buffer(offsets), pa.py_buffer(rows)])


def _quantized(embeds: Float[np.ndarray, "chunk enc"]) -> np.ndarray:
    rows = np.empty(len(embeds), row_type("int8", embeds.shape[1]))
    scale = np.abs(embeds).max(axis=1, initial=0.0) / 127
    rows["scale"] = np.where(scale > 0, scale, 1)
    rows["values"] = np.rint(embeds / rows["scale"][:, None])
    return rows


def unpack(cells: pa.Array | pa.ChunkedArray, storage: str, width: int) -> list[Float[Tensor, "chunk enc"]]:
    """The vectors of each cell, float32: views of one tensor, decoded at once."""
    array = cells.combine_chunks() if isinstance(cells, pa.ChunkedArray) else cells
    array = array.cast(pa.large_binary())
    if len(array) == 0:
        return []
    _, offset_buffer, data = array.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[array.offset : array.offset + len(array) + 1]
    kind = row_type(storage, width)
    block = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]] if data else np.empty(0, np.uint8)
    if storage == "int8":
        rows = block.view(kind)
        values = rows["values"].astype(np.float32) * rows["scale"][:, None]
    else:
        values = block.view("<f2").reshape(-1, width).astype(np.float32)
    return list(torch.from_numpy(values).split((np.diff(offsets) // kind.itemsize).tolist()))
