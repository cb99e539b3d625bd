"""Which passages a run of `PassageIndex.add` has read: 16 bytes each, so that a corpus of any size fits."""

from array import array
from collections.abc import Iterable
from functools import cached_property

import numpy as np


class Seen:
    """Hashes of the ids that were read, and of what was read under them. Ask only when all were added."""

    def __init__(self) -> None:
        self._ids, self._contents = array("q"), array("q")

    def add(self, identity: str, content_hash: str) -> None:
        """Another passage was read."""
        self._ids.append(hash(identity))
        self._contents.append(hash(content_hash))

    @property
    def num_replaced(self) -> int:
        """Number of passages that another one with the same id and other content replaced."""
        return len(self._replaced)

    def replaced(self, ids: Iterable[str]) -> list[str]:
        """Those of `ids` that were read with more than one content."""
        return [identity for identity in ids if _holds(self._replaced, hash(identity))]

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Those of `ids` that were not read."""
        return [identity for identity in ids if not _holds(self._sorted[0], hash(identity))]

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        ids, contents = np.asarray(self._ids), np.asarray(self._contents)
        order = np.lexsort((contents, ids))
        return ids[order], contents[order]

    @cached_property
    def _replaced(self) -> np.ndarray:
        ids, contents = self._sorted
        return ids[1:][(ids[1:] == ids[:-1]) & (contents[1:] != contents[:-1])]


def _holds(ordered: np.ndarray, value: int) -> bool:
    place = np.searchsorted(ordered, value)
    return bool(place < len(ordered) and ordered[place] == value)
