"""Prometheus metrics: vLLM's names behind our prefix where vLLM has them, and what only compression has."""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily

from ..engine import Answer
from ..errors import RefragError

if TYPE_CHECKING:
    from .service import Service

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
RATES = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class Metrics:
    """One registry a server, so that several in one process do not meet."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"refrag:{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float | int]) -> Histogram:
            return Histogram(f"refrag:{name}", text, buckets=buckets, registry=registry)

        self.first_token = histogram("time_to_first_token_seconds", "From the request to its first token.", SECONDS)
        self.token = histogram("inter_token_latency_seconds", "Between two tokens of an answer.", SECONDS)
        self.whole = histogram("e2e_request_latency_seconds", "From the request to the end of its answer.", SECONDS)
        self.queue = histogram("request_queue_time_seconds", "From the request to the start of its being prepared: a place was free, and the group before was done.", SECONDS)
        self.prompt_tokens = counter("prompt_tokens", "Decoder slots of the prompts: what usage.prompt_tokens counts.")
        self.generation_tokens = counter("generation_tokens", "Tokens decoded.")
        self.context_tokens = counter("context_tokens", "Tokens of the passages, had they not been compressed.")
        self.compressed = counter("compressed_chunks", "Chunks read as one vector.")
        self.expanded = counter("expanded_chunks", "Chunks read as tokens.")
        self.ended = counter("request_success", "Answers, by why they ended.", "finished_reason")
        self.failed = counter("request_failure", "Accepted requests without an answer, by kind of error.", "error")
        self.refused = counter("requests_refused", "Requests and changes of the index turned away since the queue was full.")
        self.slots = histogram("prompt_slots", "Decoder slots of a prompt.", COUNTS)
        self.rate = histogram("compression_rate", "Context tokens ÷ context slots of a prompt.", RATES)

    def watch(self, service: "Service") -> None:
        """Reads what the service and its engine count themselves, whenever somebody looks."""
        for name, text in (("running", "Requests being prepared or decoded."), ("waiting", "Requests in the queue.")):
            Gauge(f"refrag:num_requests_{name}", text, registry=self.registry).set_function(lambda name=name: getattr(service, name))
        self.registry.register(_Vectors(service.engine.vectors))  # type: ignore[arg-type]

    @contextmanager
    def request(self) -> Generator["Record"]:
        """Around one accepted request: counts how it ended."""
        record = Record(self)
        try:
            yield record
        except BaseException as error:
            user = isinstance(error, RefragError | TimeoutError)
            self.failed.labels(type(error).__name__ if user else "cancelled" if not isinstance(error, Exception) else "bug").inc()
            raise

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class Record:
    """What one request adds to the metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.start = time.perf_counter()
        self.last: float | None = None
        """When the last token came."""

    def begun(self) -> None:
        """It waits no longer."""
        self.metrics.queue.observe(time.perf_counter() - self.start)

    def prepared(self, usage: Any) -> None:
        """The prompt is ready; `usage` as in Answer."""
        metrics = self.metrics
        metrics.prompt_tokens.inc(usage["prompt_slots"])
        metrics.context_tokens.inc(usage["context_tokens"])
        metrics.expanded.inc(usage["expanded_chunks"])
        metrics.compressed.inc(usage["num_chunks"] - usage["expanded_chunks"])
        metrics.slots.observe(usage["prompt_slots"])
        if usage["context_slots"]:
            metrics.rate.observe(usage["compression_rate"])

    def token(self, now: float) -> None:
        """A token came, at `time.perf_counter()`: also of answers that will not be finished."""
        self.metrics.generation_tokens.inc()
        if self.last is None:
            self.metrics.first_token.observe(now - self.start)
        else:
            self.metrics.token.observe(now - self.last)
        self.last = now

    def answered(self, answer: Answer) -> None:
        """The answer is whole."""
        self.metrics.ended.labels(answer.finish_reason).inc()
        self.metrics.whole.observe(answer.timings["total_s"])


class _Vectors:
    """Where chunk vectors came from, counted by the engine's VectorSource."""

    def __init__(self, vectors: Any) -> None:
        self.vectors = vectors

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily("refrag:chunk_vectors", "Chunk vectors used, by where they came from.", labels=["source"])
        for source, count in self.vectors.counts.items():
            family.add_metric([source], count)
        yield family
