"""Streams of passages: in groups that bound the memory, and one group ahead of the work."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ..errors import InputError
from ..text import Passage

BATCH_CHARACTERS = 1_000_000
"""A batch of passages ends at this size even if it holds fewer than `settings.batch_size`: long passages cannot exhaust the memory."""

T = TypeVar("T")


def groups(passages: Iterable[Passage], size: int) -> Iterator[list[Passage]]:
    """Runs of at most `size` passages and about BATCH_CHARACTERS characters. Raises InputError for what is no passage."""
    group: list[Passage] = []
    characters = 0
    if isinstance(passages, str | Passage) or not isinstance(passages, Iterable):
        raise InputError(f"The passages to add must be a list of them, was a {type(passages).__name__}: put it between brackets.")
    for passage in passages:
        if not isinstance(passage, Passage):
            raise InputError(f"What is added must be Passages, one was a {type(passage).__name__}: pass Passage(id, text, title).")
        group.append(passage)
        characters += len(passage.text)
        if len(group) == size or characters >= BATCH_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items (never None); the next one is made in a thread while the caller works on this one."""

    def following() -> T | None:
        return next(items, None)

    with ThreadPoolExecutor(1) as maker:
        future = maker.submit(following)
        while (item := future.result()) is not None:
            future = maker.submit(following)
            yield item
