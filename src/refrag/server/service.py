"""From a Request to its pieces and its Answer: places and the queue, preparing in groups, decoding by a Backend, writing to the index."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from ..engine import Answer, Refrag, Request
from ..engine.backend import Backend
from ..engine.batching import InProcessBackend
from ..engine.limits import PromptTooLongError
from ..engine.prepared import Prepared
from ..errors import BackendError, InputError, NotFoundError, RefragError
from ..text import Passage, Turn
from .metrics import Metrics, Record
from .settings import ServerSettings

log = logging.getLogger(__name__)

T = TypeVar("T")
Future = asyncio.Future[Prepared]


class BusyError(RefragError):
    """All places are taken and the queue is full."""


class StoppingError(BackendError):
    """The server is going down."""

    def __init__(self) -> None:
        super().__init__("The server is shutting down: send the request again, to another one.")


class Service:
    """The engine, shared by the requests of one event loop."""

    def __init__(self, engine: Refrag, settings: ServerSettings, *, metrics: Metrics, backend: Backend | None = None) -> None:
        """`backend`: whoever decodes; None: this process. The next requests are prepared in one thread while others are decoded."""
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self._worker = ThreadPoolExecutor(1, "refrag-worker")
        self.backend: Backend = backend or InProcessBackend(engine, max_rows=settings.max_running, max_slots=settings.max_batch_slots)
        self.running = self.waiting = 0
        self.stopping = False
        """No new requests: those that were accepted are finished."""
        self._places = asyncio.Semaphore(settings.max_running)
        self._to_prepare: list[tuple[Request, Future, Record]] = []
        self._preparing: asyncio.Task[None] | None = None
        self._prepare_s = 0.0
        """What the last group took to prepare, in seconds."""
        self._changed = asyncio.Event()
        """A request has come or ended."""
        self._asking: set[asyncio.Task[Any]] = set()
        """Accepted requests that are not over."""
        self._cut_off = False
        self._writing = asyncio.Lock()
        self._changes: dict[asyncio.Task[Any], asyncio.Future[None]] = {}
        """Changes of the index that wait or run, those whose client has gone included; what tells their readers that the server ends."""

    # ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def pieces(self, request: Request) -> AsyncGenerator[str | Answer]:
        """The pieces of the text as they come, then the Answer. Closing it stops the decoding.

        Raises BusyError when the queue is full, TimeoutError after `request_timeout_s`, BackendError when decoding fails,
        and what `Refrag.answer` raises.
        """
        self._admit()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        task = self._task(self._answer(request, pieces.put_nowait))
        task.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield self._result(task)
        finally:
            task.cancel()  # nothing happens to one that is done

    async def answer(self, request: Request) -> Answer:
        """The Answer at once; see `pieces`."""
        self._admit()
        return await self._finished(self._task(self._answer(request, lambda piece: None)))

    def _task(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # else asyncio logs what nobody was left to read
        return task

    async def _finished(self, task: asyncio.Task[T]) -> T:
        """The result of a task that ends with its reader."""
        try:
            await asyncio.wait({task})
            return self._result(task)
        finally:
            task.cancel()

    def _result(self, task: asyncio.Task[T]) -> T:
        if task.cancelled() and self._cut_off:
            raise StoppingError
        return task.result()

    def _check_room(self) -> None:
        if self.stopping:
            raise StoppingError
        places = self.settings.max_running
        if len(self._asking) >= places + self.settings.max_waiting:
            raise BusyError(f"All {places} places are taken and {len(self._asking) - places} requests wait: try again in a moment.")

    def _admit(self) -> None:
        """As `_check_room`; counts what is turned away."""
        try:
            self._check_room()
        except BusyError:
            self.metrics.refused.inc()
            raise

    async def _answer(self, request: Request, sink: Callable[[str], object]) -> Answer:
        """One accepted request, from its place in the queue to its Answer."""
        start = time.perf_counter()
        with self.metrics.request() as record:

            async def decoded() -> tuple[Prepared, list[float]]:
                prepared = await self._prepared(request, record)
                record.prepared(prepared.usage)
                return prepared, await self._decoded(prepared, request, record, sink)

            prepared, stamps = await self._in_place(decoded)
            answer = prepared.answer(start=start, stamps=stamps)
            record.answered(answer)
            return answer

    async def _in_place(self, work: Callable[[], Awaitable[T]]) -> T:
        """Waits for a place, and does the work there. Raises TimeoutError when all that takes too long."""
        async with asyncio.timeout(self.settings.request_timeout_s):
            self.waiting += 1
            try:
                await self._places.acquire()
            finally:
                self.waiting -= 1
            self.running += 1
            try:
                return await work()
            finally:
                self.running -= 1
                self._places.release()
                self._changed.set()

    async def _prepared(self, request: Request, record: Record) -> Prepared:
        """The request, prepared together with all that wait for it at the moment."""
        future: Future = asyncio.get_running_loop().create_future()
        self._to_prepare.append((request, future, record))
        self._changed.set()
        if self._preparing is None or self._preparing.done():
            self._preparing = asyncio.create_task(self._prepare_all(), name="refrag-preparing")
        prepared = await future
        slots, most = prepared.usage["prompt_slots"], self.settings.max_prompt_slots
        if most is not None and slots > most:
            raise PromptTooLongError(f"The prompt takes {slots} slots, {slots - most} more than this server allows: give fewer documents or a smaller budget.")
        return prepared

    async def _prepare_all(self) -> None:
        while self._to_prepare:
            await self._gather()
            group = [own for own in self._to_prepare if not own[1].done()]
            self._to_prepare.clear()
            for _, _, record in group:
                record.begun()
            begin = time.perf_counter()
            results = await self.compute(lambda group=group: self._prepare([request for request, _, _ in group]))
            self._prepare_s = time.perf_counter() - begin
            for (_, future, _), result in zip(group, results, strict=True):
                if future.done():  # its reader has gone
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    async def _gather(self) -> None:
        """Waits while more requests are being decoded than wait to be prepared, at most as long as the last group took to prepare.

        So requests are prepared, and prefilled, in groups about as large as what is being decoded meanwhile, instead of one by one.
        """
        until = time.perf_counter() + self._prepare_s
        while len(self._to_prepare) < self.running - len(self._to_prepare) and (left := until - time.perf_counter()) > 0:
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)

    def _prepare(self, requests: Sequence[Request]) -> list[Prepared | Exception]:
        """In the worker. One request that cannot be answered does not harm the others."""
        try:
            return [*self.engine.prepare(requests)] if requests else []
        except Exception as error:
            if len(requests) == 1:
                return [error]
            return [result for request in requests for result in self._prepare([request])]

    async def _decoded(self, prepared: Prepared, request: Request, record: Record, sink: Callable[[str], object]) -> list[float]:
        """Feeds the tokens of the backend to the answer's text; returns when each came."""
        feed, stamps = prepared.feed, []
        feed.sink = sink
        async with aclosing(self.backend.decode(prepared.prompt_embeds, request.generation)) as tokens:
            async for token_ids in tokens:
                now = time.perf_counter()
                for token_id in token_ids:
                    if not feed.finished:
                        stamps.append(now)
                        feed.push(token_id)
                        record.token(now)
                if feed.finished:
                    break
        feed.close()
        return stamps

    async def compute(self, work: Callable[[], T]) -> T:
        """Runs `work` in the one thread that prepares and searches."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    # ── the index ────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def index(self) -> Any:
        """The PassageIndex. Raises NotFoundError without one."""
        if self.engine.index is None:
            raise NotFoundError("This server has no index: start it with --index.")
        return self.engine.index

    async def search(self, question: str, **options: Any) -> list[Any]:
        """Hits of the index; counts as a request while it runs."""
        self._admit()
        search = partial(self.index.search, question, **options)
        return await self._finished(self._task(self._in_place(lambda: self.compute(search))))

    async def stored(self, ids: Sequence[str]) -> dict[str, Passage]:
        """Passages of the index by id; unknown ids are left out."""
        return await asyncio.to_thread(self.index.passages, list(dict.fromkeys(ids)))

    async def change(self, work: Callable[[Any], T]) -> T:
        """Runs a change of the index, one at a time, in a thread of its own: answers go on meanwhile.

        A change that waits ends with its reader; one that has begun goes on to its end. Raises BusyError when too many wait,
        TimeoutError after `request_timeout_s`.
        """
        index, most = self.index, self.settings.max_changes
        if self.stopping:
            raise StoppingError
        if len(self._changes) >= most:
            self.metrics.refused.inc()
            raise BusyError(f"{most} changes of the index wait or run already: try again in a moment.")
        has_begun = False

        async def changed() -> T:
            nonlocal has_begun
            async with self._writing:
                has_begun = True
                return await asyncio.to_thread(work, index)

        task = asyncio.create_task(changed(), name="refrag-change")
        self._changes[task] = ending = asyncio.get_running_loop().create_future()
        task.add_done_callback(self._changes.pop)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # else asyncio logs what nobody was left to read
        try:
            await asyncio.wait({task, ending}, timeout=self.settings.request_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if ending.done():
                raise StoppingError
            raise TimeoutError("The change takes longer than this server waits" + (": it goes on, look for the passages later." if has_begun else ": try again later."))
        finally:
            if not has_begun:
                task.cancel()

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def check(self) -> None:
        """Returns when requests can be answered now; raises BackendError or BusyError when not."""
        self._check_room()
        await self.backend.check()

    def cut_off(self) -> None:
        """Ends the requests that are still there with StoppingError."""
        self.stopping = self._cut_off = True
        for task in self._asking:
            task.cancel()
        for ending in self._changes.values():
            if not ending.done():
                ending.set_result(None)

    async def aclose(self) -> None:
        """Waits for nothing but the running forward; call it when the requests have ended."""
        self.cut_off()
        await self.backend.aclose()
        self._worker.shutdown()


def allowed(request: Request, settings: ServerSettings, *, own_policy: str) -> Request:
    """The request as this server answers it: where `own_policy`, the model's, is not allowed, the first allowed one takes its place.

    Raises InputError for what a request may not ask of this server.
    """
    if request.generation.max_new_tokens > settings.max_new_tokens:
        raise InputError(f"max_tokens may be at most {settings.max_new_tokens} here, was {request.generation.max_new_tokens}.")
    if request.policy is not None and request.policy not in settings.policies:
        raise InputError(f"The policy may be one of {', '.join(settings.policies)} here, was {request.policy!r}.")
    given = len(request.passages or ()) + sum(len(turn.passages) for turn in request.history if isinstance(turn, Turn))
    wanted = request.top_k if request.passages is None else 0
    if given + wanted > settings.max_documents:
        raise InputError(f"A request may read at most {settings.max_documents} passages here, this one would read {given + wanted}: give fewer documents or lower top_k.")
    return replace(request, policy=settings.policies[0]) if request.policy is None and own_policy not in settings.policies else request
