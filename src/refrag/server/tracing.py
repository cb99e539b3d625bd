"""OpenTelemetry spans by the gen_ai conventions, or nothing at all where they were not asked for."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from .. import __version__
from ..engine import Answer, Request
from ..errors import missing_extra


class Span:
    """What a request tells its span; without a span, nobody hears it."""

    def __init__(self, span: Any = None) -> None:
        self.span = span

    def answered(self, answer: Answer) -> None:
        """Token counts, times and why it ended; no text."""
        if self.span is None:
            return
        usage, timings = answer.usage, answer.timings
        self.span.set_attributes(
            {
                "gen_ai.usage.input_tokens": int(usage["prompt_slots"]),
                "gen_ai.usage.output_tokens": int(usage["completion_tokens"]),
                "gen_ai.response.finish_reasons": [answer.finish_reason],
                "gen_ai.server.time_to_first_token": timings["ttft_s"],
                "gen_ai.server.time_per_output_token": timings["per_token_s"],
                "refrag.context_tokens": int(usage["context_tokens"]),
                "refrag.num_chunks": int(usage["num_chunks"]),
                "refrag.expanded_chunks": int(usage["expanded_chunks"]),
                "refrag.compression_rate": float(usage["compression_rate"]),
            }
        )


class Tracer:
    """Makes spans with an OpenTelemetry tracer provider; without one it makes none."""

    def __init__(self, provider: Any = None) -> None:
        self._tracer = None if provider is None else provider.get_tracer("refrag", __version__)

    @contextmanager
    def span(self, operation: str, *, model: str, request: Request, headers: Mapping[str, str]) -> Generator[Span]:
        """Around one request; `headers` may carry the caller's trace. An exception is recorded by its type alone."""
        if self._tracer is None:
            yield Span()
            return
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "refrag",
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.request.max_tokens": request.generation.max_new_tokens,
            "gen_ai.request.temperature": float(request.generation.temperature),
            "gen_ai.request.top_p": float(request.generation.top_p),
        }
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=TraceContextTextMapPropagator().extract(dict(headers)),
            kind=trace.SpanKind.SERVER,
            attributes=attributes,
        )
        try:
            yield Span(span)
        except BaseException as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(trace.StatusCode.ERROR)
            raise
        finally:
            span.end()


def otlp_tracer() -> Tracer:
    """Spans go where the standard variables OTEL_EXPORTER_OTLP_… say. Raises MissingExtraError without the extra `otel`."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise missing_extra("opentelemetry-sdk", "otel", "--otel") from error
    provider = TracerProvider(resource=Resource.create({"service.name": "refrag", "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracer(provider)
