"""Question → Answer: retrieve, sense, lay out, prefill, decode; in batches, streamed, timed and traced."""

from .answer import Answer, Request
from .engine import Refrag
from .stream import AnswerStream, AsyncAnswerStream
from .vllm import VllmBackend

__all__ = ["Answer", "AnswerStream", "AsyncAnswerStream", "Refrag", "Request", "VllmBackend"]
