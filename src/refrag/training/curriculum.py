"""How the number of chunks grows over training: data, not code. Item i of the schedule is a pure function of (seed, i)."""

from bisect import bisect_right
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from ..errors import InputError
from .settings import Curriculum

NUM_STAGES = 9
LONGEST = 256
"""Chunks of the longest row of the paper's table."""
_ROW_SUMS = (2000, 2000, 2000, 4000, 4000, 4000, 8000, 8000, 8000)
_GOLDEN, _SEED_STEP, _BITS = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 64


class Stage(NamedTuple):
    """One stage of a curriculum, for reports."""

    number: int
    """From 1."""
    share: float
    """Share of all items."""
    mixture: dict[int, float]
    """Number of chunks to its share of the stage's items; the shares sum to 1."""


def _paper_row(exponent: int) -> tuple[int, ...]:
    """Row of 2^exponent chunks: a geometric series over the stages with a first term and a sum (paper, Table 8)."""
    first = max(1, int(4000 / 3 / 4**exponent))
    total = _ROW_SUMS[min(exponent, len(_ROW_SUMS) - 1)]
    low, high = 0.0, 4.0
    for _ in range(60):
        ratio = (low + high) / 2
        low, high = (low, ratio) if sum(first * ratio**stage for stage in range(NUM_STAGES)) > total else (ratio, high)
    return tuple(round(first * low**stage) for stage in range(NUM_STAGES))


PAPER_TABLE: tuple[tuple[int, ...], ...] = tuple(_paper_row(exponent) for exponent in range(len(_ROW_SUMS)))
"""The paper's Table 8, made by its generator: row i has 2^i chunks, column j is stage j + 1. The paper does not say what is
counted; as examples they would be a thousandth of its data, so they are relative weights here."""


def factors(kind: Curriculum, max_chunks: int) -> tuple[int, ...]:
    """The numbers of chunks that a curriculum uses, ascending; the last is the longest.

    Powers of two, and `max_chunks` itself in place of the next one where it is none: 24 gives 1, 2, 4, 8, 16, 24, the last
    with the weights of 32. Above 256 the paper's table goes on with its last row, which three lengths share already.
    `prototype` ends at 4. Raises InputError for another kind and for `max_chunks` below 1.
    """
    if max_chunks < 1:
        raise InputError(f"max_chunks must be 1 or more, was {max_chunks}: try {LONGEST}.")
    if kind == "none":
        return (max_chunks,)
    if kind not in ("paper", "prototype"):
        raise InputError(f"curriculum must be paper, prototype or none, was {kind!r}: try paper.")
    longest = min(max_chunks, 4) if kind == "prototype" else max_chunks
    return (*(2**exponent for exponent in range((longest - 1).bit_length())), longest)


def num_chunks(kind: Curriculum, *, item: int, num_items: int, max_chunks: int, seed: int) -> tuple[int, int]:
    """Stage (from 1) and number of chunks L of one item of a training of `num_items` items.

    A pure function without state, in whole numbers, so the same on any machine and any number of processes. Stages follow
    each other; each takes the share of the items that its column has in the sum of the table. Within a stage the lengths
    follow its weights, spread evenly by a golden-ratio sequence that `seed` shifts: any run of items has nearly the stage's
    mixture. Items from `num_items` on belong to the last stage. With fewer items than stages some stages are left out.
    """
    assert num_items > 0 <= item
    plan = _plan(kind, max_chunks)
    stage = bisect_right(plan.ends, min(item, num_items - 1) * plan.ends[-1] // num_items)
    weights = plan.weights[stage]
    place = (item * _GOLDEN + seed * _SEED_STEP) % 2**_BITS
    return stage + 1, plan.lengths[bisect_right(weights, place * weights[-1] >> _BITS)]


def stages(kind: Curriculum, max_chunks: int) -> list[Stage]:
    """The stages of a curriculum with their shares and mixtures; stages and lengths without weight are left out."""
    plan = _plan(kind, max_chunks)
    result = []
    for number, (weights, duration) in enumerate(zip(plan.weights, _differences(plan.ends), strict=True), 1):
        mixture = {length: part / weights[-1] for length, part in zip(plan.lengths, _differences(weights), strict=True) if part}
        if mixture:
            result.append(Stage(number, duration / plan.ends[-1], mixture))
    return result


def _differences(sums: tuple[int, ...]) -> list[int]:
    return [after - before for before, after in pairwise((0, *sums))]


class _Plan(NamedTuple):
    """Lengths, per stage the running sums of their weights, and the running sums of the stages' durations."""

    lengths: tuple[int, ...]
    weights: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]


@cache
def _plan(kind: Curriculum, max_chunks: int) -> _Plan:
    lengths = factors(kind, max_chunks)
    if kind == "paper":
        table = (*PAPER_TABLE, *[PAPER_TABLE[-1]] * len(lengths))[: len(lengths)]
        columns = list(zip(*table, strict=True))
        durations = [sum(column) for column in columns]
    else:
        # Each stage of the prototype adds a length with twice the weight of the one before: 1, then 1:2, then 1:2:4.
        columns = [tuple(2**place if place <= stage else 0 for place in range(len(lengths))) for stage in range(len(lengths))]
        durations = [1] * len(columns)
    return _Plan(lengths, tuple(tuple(accumulate(column)) for column in columns), tuple(accumulate(durations)))
