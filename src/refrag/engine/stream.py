"""An answer as it is written: text pieces from a thread of its own, then the Answer."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator

from .answer import Answer

Work = Callable[[Callable[[str], object], Callable[[], bool]], Answer]
"""(sink for pieces, "is it cancelled?") → the answer; runs in the stream's thread."""


class AnswerStream(Iterator[str]):
    """Iterate for the pieces; `answer` is there at the end. An error of the engine is raised where the pieces are read.

    Leaving it early (`close`, the end of a `with`, or dropping it) stops the decoding after the running token.
    """

    def __init__(self, work: Work, *, cancel: threading.Event | None = None) -> None:
        self._closed = closed = threading.Event()
        self._pieces: queue.SimpleQueue[str | Answer | BaseException] = queue.SimpleQueue()
        self._answer: Answer | None = None
        self._over = False

        def is_cancelled() -> bool:
            return closed.is_set() or (cancel is not None and cancel.is_set())

        self._thread = threading.Thread(target=_work, args=(work, self._pieces, is_cancelled), daemon=True, name="refrag-answer")
        self._thread.start()

    @property
    def answer(self) -> Answer:
        """The whole answer; what was not read yet is read, and lost as pieces."""
        for _ in self:
            pass
        if self._answer is None:
            raise RuntimeError("The stream was closed before its answer was complete.")
        return self._answer

    def __iter__(self) -> "AnswerStream":
        return self

    def __next__(self) -> str:
        piece = self._next()
        if piece is None:
            raise StopIteration
        return piece

    def _next(self) -> str | None:
        """The next piece, None at the end."""
        if self._over:
            return None
        item = self._pieces.get()
        if isinstance(item, str):
            return item
        self._over = True
        if isinstance(item, BaseException):
            raise item
        self._answer = item
        return None

    def close(self) -> None:
        """Stop decoding and wait for the thread; nothing happens to a finished stream."""
        self._closed.set()
        self._over = True
        self._thread.join()

    def __enter__(self) -> "AnswerStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._closed.set()


def _work(work: Work, pieces: "queue.SimpleQueue[str | Answer | BaseException]", is_cancelled: Callable[[], bool]) -> None:
    """The thread; a function, so that the thread does not keep the stream alive."""
    try:
        pieces.put(work(pieces.put, is_cancelled))
    except BaseException as error:
        pieces.put(error)


class AsyncAnswerStream(AsyncIterator[str]):
    """The same for `async for`; cancelling the reading task stops the decoding."""

    def __init__(self, stream: AnswerStream) -> None:
        self._stream = stream

    @property
    def answer(self) -> Answer:
        """The whole answer; ask for it after the last piece."""
        return self._stream.answer

    def __aiter__(self) -> "AsyncAnswerStream":
        return self

    async def __anext__(self) -> str:
        try:
            piece = await asyncio.to_thread(self._stream._next)
        except asyncio.CancelledError:
            self._stream._closed.set()
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """Stop decoding and wait for the thread."""
        await asyncio.to_thread(self._stream.close)
