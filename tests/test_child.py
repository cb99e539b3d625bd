"""Processes of their own: values come back, failures are sentences, points that were measured are kept."""

import json
import math
import operator
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from refrag.errors import BackendError, InputError
from refrag.evaluation.child import OUT_OF_MEMORY, explain, in_child, measure_points
from refrag.evaluation.settings import Rounds


def test_a_value_comes_back_with_the_peak_of_its_own_process() -> None:
    outcome = in_child(math.sqrt, 4.0)
    assert (outcome.value, outcome.failed) == (2.0, None)
    assert outcome.peak_rss_bytes is None or outcome.peak_rss_bytes < 100 * 2**20  # this test's own process has torch in it


def test_what_a_function_prints_does_not_stand_among_its_answer(capfd: pytest.CaptureFixture[str]) -> None:
    assert in_child(print, "hello").failed is None
    assert in_child(os.system, "echo from another program").value == 0
    assert capfd.readouterr() == ("", "hello\nfrom another program\n")


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        (operator.mul, ([0], 1 << 60), OUT_OF_MEMORY),
        (signal.raise_signal, (9,), f"{OUT_OF_MEMORY}: the system killed the process"),
        (os._exit, (3,), "the process ended with exit status 3"),
        (int, ("x",), "ValueError: invalid literal for int() with base 10: 'x'"),
    ],
)
def test_what_fails_is_one_sentence(function: Any, arguments: tuple, reason: str) -> None:
    assert in_child(function, *arguments).failed == reason


def test_out_of_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert explain(caught.value) == OUT_OF_MEMORY  # the CPU's allocator
    wrapped = BackendError("The device cuda ran out of memory: …")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert explain(wrapped) == OUT_OF_MEMORY
    assert explain(InputError("k must be 1.")) == "k must be 1."
    assert explain(RuntimeError()) == "RuntimeError: no message"


def test_points_are_kept_when_one_fails_and_when_it_is_interrupted(tmp_path: Path) -> None:
    out = tmp_path / "results" / "points.json"

    def points() -> Iterator[tuple[dict, tuple]]:
        yield {"size": 1}, (dict, {"value": 7})
        yield {"size": 2}, (operator.mul, [0], 1 << 60)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_points("kind", points(), settings=Rounds(out=out))
    content = json.loads(out.read_text("utf-8"))
    assert (content["kind"], content["settings"]["min_repeats"]) == ("kind", 7)
    assert [{name: value for name, value in point.items() if name != "peak_rss_bytes"} for point in content["points"]] == [
        {"size": 1, "value": 7},
        {"size": 2, "failed": "out of memory"},
    ]


def test_no_point_at_all_is_an_error() -> None:
    with pytest.raises(BackendError, match="No point could be measured: out of memory"):
        measure_points("kind", [({"size": 2}, (operator.mul, [0], 1 << 60))], settings=Rounds())
