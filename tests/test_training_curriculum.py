"""curriculum.py: the paper's table cell by cell, stages and mixtures as laws, the same on any number of processes."""

import inspect
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refrag.errors import InputError
from refrag.training.curriculum import PAPER_TABLE, factors, num_chunks, stages

TABLE_8 = (
    (1333, 445, 148, 49, 16, 6, 2, 1, 0),
    (333, 298, 267, 238, 213, 191, 171, 153, 137),
    (83, 102, 126, 156, 193, 238, 293, 362, 447),
    (20, 35, 61, 106, 185, 324, 565, 985, 1719),
    (5, 11, 23, 48, 103, 220, 468, 997, 2125),
    (1, 3, 7, 19, 50, 133, 353, 939, 2496),
    (1, 3, 9, 25, 73, 212, 618, 1802, 5259),
    (1, 3, 9, 25, 73, 212, 618, 1802, 5259),
    (1, 3, 9, 25, 73, 212, 618, 1802, 5259),
)
"""Literally as printed: rows are 1, 2, 4 … 256 chunks, columns the stages."""
TOTAL = 42_008

kinds = st.sampled_from(["paper", "prototype", "none"])


def schedule(kind="paper", *, num_items, max_chunks=256, seed=0):
    return [num_chunks(kind, item=item, num_items=num_items, max_chunks=max_chunks, seed=seed) for item in range(num_items)]


# ── the paper's table ──


@pytest.mark.parametrize(("row", "column"), [(row, column) for row in range(9) for column in range(9)])
def test_each_cell_of_table_8(row, column):
    assert PAPER_TABLE[row][column] == TABLE_8[row][column]


def test_the_table_has_no_other_cells():
    assert PAPER_TABLE == TABLE_8


def test_stages_last_as_long_as_the_columns_of_the_table_say():
    assert [round(stage.share * TOTAL) for stage in stages("paper", 256)] == [1778, 903, 659, 691, 979, 1748, 3706, 8843, 22701]


def test_mixtures_are_the_columns_of_the_table():
    paper = stages("paper", 256)
    assert list(paper[0].mixture) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert list(paper[8].mixture) == [2, 4, 8, 16, 32, 64, 128, 256]  # one chunk has no weight left
    assert [round(100 * share, 1) for share in list(paper[0].mixture.values())[:5]] == [75.0, 18.7, 4.7, 1.1, 0.3]
    assert [round(100 * share, 1) for share in paper[4].mixture.values()] == [1.6, 21.8, 19.7, 18.9, 10.5, 5.1, 7.5, 7.5, 7.5]
    assert [round(100 * share, 1) for share in paper[8].mixture.values()] == [0.6, 2.0, 7.6, 9.4, 11.0, 23.2, 23.2, 23.2]


def test_a_training_as_long_as_the_table_has_its_cells():
    counts = Counter(schedule(num_items=TOTAL))
    for row in range(9):
        for column in range(9):
            assert counts[column + 1, 2**row] == pytest.approx(TABLE_8[row][column], abs=3)
    assert sum(counts.values()) == TOTAL


def test_shorter_contexts_use_the_upper_rows_of_the_table():
    upper = [sum(row[column] for row in TABLE_8[:3]) for column in range(9)]
    assert factors("paper", 4) == (1, 2, 4)
    assert [stage.share for stage in stages("paper", 4)] == pytest.approx([duration / sum(upper) for duration in upper])
    assert stages("paper", 4)[1].mixture == pytest.approx({1: 445 / 845, 2: 298 / 845, 4: 102 / 845})


def test_one_chunk_leaves_out_the_stage_that_has_none():
    assert [stage.number for stage in stages("paper", 1)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {length for _, length in schedule(num_items=50, max_chunks=1)} == {1}


def test_longer_contexts_go_on_with_the_last_row():
    mixture = stages("paper", 1024)[8].mixture
    assert factors("paper", 1024)[-3:] == (256, 512, 1024)
    assert mixture[1024] == mixture[512] == mixture[256] == mixture[64] > 0


# ── lengths ──


@pytest.mark.parametrize(
    ("max_chunks", "lengths"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (5, (1, 2, 4, 5)), (8, (1, 2, 4, 8)), (24, (1, 2, 4, 8, 16, 24)), (256, (1, 2, 4, 8, 16, 32, 64, 128, 256))],
)
def test_lengths_of_the_paper_curriculum(max_chunks, lengths):
    assert factors("paper", max_chunks) == lengths


def test_a_last_length_that_is_no_power_of_two_has_the_weights_of_the_next_power():
    assert list(stages("paper", 24)[3].mixture.values()) == list(stages("paper", 32)[3].mixture.values())


@pytest.mark.parametrize(("max_chunks", "lengths"), [(256, (1, 2, 4)), (4, (1, 2, 4)), (3, (1, 2, 3)), (2, (1, 2)), (1, (1,))])
def test_lengths_of_the_prototype_curriculum(max_chunks, lengths):
    assert factors("prototype", max_chunks) == lengths


def test_prototype_by_hand():
    assert stages("prototype", 256) == [
        (1, 1 / 3, {1: 1.0}),
        (2, 1 / 3, {1: 1 / 3, 2: 2 / 3}),
        (3, 1 / 3, {1: 1 / 7, 2: 2 / 7, 4: 4 / 7}),
    ]
    numbers, lengths = zip(*schedule("prototype", num_items=2100), strict=True)
    assert numbers == (1,) * 700 + (2,) * 700 + (3,) * 700
    assert set(lengths[:700]) == {1}
    assert Counter(lengths[700:1400])[2] == pytest.approx(467, abs=2)
    assert Counter(lengths[1400:]) == {1: pytest.approx(100, abs=2), 2: pytest.approx(200, abs=2), 4: pytest.approx(400, abs=2)}


def test_none_is_the_longest_at_once():
    assert stages("none", 48) == [(1, 1.0, {48: 1.0})]
    assert schedule("none", num_items=5, max_chunks=48) == [(1, 48)] * 5


# ── laws ──


@settings(deadline=None)
@given(kinds, st.integers(1, 600), st.integers(1, 10**9), st.integers(0, 2**40), st.data())
def test_every_item_is_of_its_stage(kind, max_chunks, num_items, seed, data):
    item = data.draw(st.integers(0, num_items - 1))
    number, length = num_chunks(kind, item=item, num_items=num_items, max_chunks=max_chunks, seed=seed)
    by_number = {stage.number: stage for stage in stages(kind, max_chunks)}
    assert length in by_number[number].mixture
    before = sum(stage.share for stage in by_number.values() if stage.number < number)
    assert before - 1e-9 <= Fraction(item, num_items) < before + by_number[number].share + 1e-9


@settings(deadline=None)
@given(kinds, st.integers(1, 300), st.integers(1, 300), st.integers(0, 99))
def test_stages_never_go_back(kind, max_chunks, num_items, seed):
    numbers = [number for number, _ in schedule(kind, num_items=num_items, max_chunks=max_chunks, seed=seed)]
    assert numbers == sorted(numbers)


@settings(deadline=None)
@given(kinds, st.integers(1, 600))
def test_shares_sum_to_one(kind, max_chunks):
    assert sum(stage.share for stage in stages(kind, max_chunks)) == pytest.approx(1)
    assert all(sum(stage.mixture.values()) == pytest.approx(1) for stage in stages(kind, max_chunks))


@pytest.mark.parametrize("seed", [0, 1, 12_345_678_901])
@pytest.mark.parametrize("processes", [1, 2, 8])
def test_each_process_sees_the_mixture_of_the_stage(seed, processes):
    num_items, last = 16_000, stages("paper", 16)[8]
    of_rank_0 = [pair for pair in schedule(num_items=num_items, max_chunks=16, seed=seed)[::processes] if pair[0] == 9]
    counts = Counter(length for _, length in of_rank_0)
    assert {length: counts[length] / len(of_rank_0) for length in last.mixture} == pytest.approx(last.mixture, abs=0.01)


def test_any_hundred_items_have_nearly_the_mixture():
    lengths = [length for number, length in schedule("prototype", num_items=6_000) if number == 3]
    for start in range(0, 2_000, 100):
        assert Counter(lengths[start : start + 100])[4] == pytest.approx(100 * 4 / 7, abs=3)


def test_seeds_differ_and_repeat():
    first, again, other = (schedule(num_items=500, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert [number for number, _ in first] == [number for number, _ in other]


def test_items_by_hand():
    """Written down once: resuming an old run must give what it saw."""
    lengths = [num_chunks("paper", item=item, num_items=100_000, max_chunks=256, seed=7) for item in (0, 1, 5_000, 20_000, 50_000, 99_999)]
    assert lengths == [(1, 1), (1, 1), (2, 4), (7, 32), (9, 64), (9, 64)]


def test_another_process_gives_the_same():
    code = "from refrag.training.curriculum import num_chunks\nprint([num_chunks('paper', item=i, num_items=300, max_chunks=64, seed=5) for i in range(300)])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(schedule(num_items=300, max_chunks=64, seed=5))


def test_items_past_the_end_belong_to_the_last_stage():
    assert {num_chunks("paper", item=item, num_items=10, max_chunks=256, seed=0)[0] for item in (10, 11, 10**6)} == {9}


def test_importing_the_curriculum_imports_no_torch():
    code = "import sys, refrag.training.curriculum\nprint([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ── bad input ──


def test_errors_say_what_must_hold():
    with pytest.raises(InputError, match="max_chunks must be 1 or more, was 0: try 256"):
        factors("paper", 0)


def test_unknown_curriculum():
    with pytest.raises(InputError, match="curriculum must be paper, prototype or none, was 'easy': try paper"):
        inspect.unwrap(factors)("easy", 4)  # the tests' type checker would refuse it first
