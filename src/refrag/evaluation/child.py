"""Measurements in a process of their own: the peak memory is theirs alone, and one that fails takes no other with it. No torch here."""

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BackendError, RefragError
from .provenance import peak_rss_bytes, result, write_result

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Outcome:
    """What became of a function in a process of its own."""

    value: Any = None
    failed: str | None = None
    """None, or one sentence: why there is no value. It begins with OUT_OF_MEMORY where that was it."""
    peak_rss_bytes: int | None = None
    """Most resident memory of the process; None where the system does not tell."""


def in_child(function: Callable[..., Any], *args: Any) -> Outcome:
    """Call an importable function in a new Python process; arguments and value travel by pickle, messages go to stderr."""
    level = logging.getLogger("refrag").getEffectiveLevel()
    command = [sys.executable, "-m", "refrag.evaluation.child"]
    finished = subprocess.run(command, input=pickle.dumps((level, function, args)), stdout=subprocess.PIPE)
    if finished.returncode == 0:
        return pickle.loads(finished.stdout)
    if finished.returncode == -9:
        return Outcome(failed=f"{OUT_OF_MEMORY}: the system killed the process")
    return Outcome(failed=f"the process ended with exit status {finished.returncode}")


def _serve() -> None:
    """The other side: read what to call, write its Outcome."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever anybody prints, libraries in C too, must not stand among the answer's bytes
    level, function, args = pickle.load(sys.stdin.buffer)
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s", level=logging.ERROR)
    logging.getLogger("refrag").setLevel(level)
    try:
        outcome = Outcome(function(*args), peak_rss_bytes=peak_rss_bytes())
    except Exception as error:
        logger.debug("the measurement failed", exc_info=True)
        outcome = Outcome(failed=explain(error), peak_rss_bytes=peak_rss_bytes())
    with out:
        pickle.dump(outcome, out)


def explain(error: BaseException) -> str:
    """One sentence for an error; out of memory is recognised in all its forms."""
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(error, RefragError):
        return str(error)
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether a device or the machine ran out of memory, by the types and the words of CUDA and the allocators, in the error or behind it."""
    if error is None:
        return False
    words = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or any(word in str(error).lower() for word in words)
    return named or is_out_of_memory(error.__cause__)


def measure_points(kind: str, points: Iterable[tuple[Mapping[str, Any], tuple[Any, ...]]], *, settings: Any) -> dict[str, Any]:
    """A result whose `points` are measured one after another, each in a process of its own; a point that fails is marked `failed`.

    `points`: (what names it, (function, arguments …)) pairs. `settings` has portable(), seed and out, which is written anew after
    every point, so that an interruption keeps what was measured. Raises BackendError when no point could be measured.
    """
    measured: list[dict[str, Any]] = []
    content: dict[str, Any] = {}
    for label, (function, *args) in points:
        logger.info("%s: %s", kind, ", ".join(f"{name} {value}" for name, value in label.items()))
        outcome = in_child(function, *args)
        own = {"failed": outcome.failed} if outcome.failed else outcome.value
        measured.append({**label, **own, "peak_rss_bytes": outcome.peak_rss_bytes})
        if outcome.failed:
            logger.warning("%s: not measured: %s", ", ".join(f"{name} {value}" for name, value in label.items()), outcome.failed)
        content = result(kind, settings=settings.portable(), values={"points": measured}, seed=settings.seed)
        _keep(settings.out, content)
    if all("failed" in point for point in measured):
        raise BackendError(f"No point could be measured: {measured[0]['failed']}")
    return content


def _keep(path: Path | None, content: Mapping[str, Any]) -> None:
    if path is not None:
        write_result(path, content)


if __name__ == "__main__":
    from refrag.evaluation import child  # Outcome must be pickled under this module's own name, not __main__'s

    child._serve()
