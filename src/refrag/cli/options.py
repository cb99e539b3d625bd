"""Options that several commands share, and how they show things."""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import UseAppendAction, arg

from ..config import BUNDLED_MODEL, IndexSettings, VllmSettings
from ..errors import InputError

Device = Literal["auto", "cpu", "cuda", "mps"]
AsJson = Annotated[bool, arg(name="json")]
Folder = Annotated[str, arg(metavar="FOLDER")]


@dataclass(frozen=True)
class Messages:
    """What is said on stderr."""

    quiet: bool = False
    """Say nothing but errors: no progress, no tables."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """debug shows lengths and shapes; training logs its losses at any level below error."""

    def console(self) -> Console:
        """Sets up logging; all that is not data goes through this console."""
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s", level=logging.ERROR, force=True)
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        logging.getLogger("refrag").setLevel("ERROR" if self.quiet else self.log_level.upper())
        return Console(stderr=True, quiet=self.quiet, highlight=False)


@dataclass(frozen=True)
class ModelOptions:
    """The model that reads."""

    model: str = BUNDLED_MODEL
    """A folder, a name on the Hugging Face hub, or `bundled`: the tiny model that comes with refrag."""
    device: Device = "auto"
    """Where to compute."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision; auto: float32 for small models, else what is fastest on the device."""
    chunk_size: int | None = None
    """Tokens per chunk, of the sizes that the model was trained with; by default its first. An index belongs to one."""

    def load(self, *, for_backend: bool = False) -> Any:
        """The RefragModel; without its decoder's layers `for_backend`. Raises MismatchError for a chunk size that it was not trained with."""
        from transformers.utils.logging import disable_progress_bar

        from ..engine.reader import load_reader
        from ..model import load_model

        disable_progress_bar()
        chunks: dict[str, Any] = {} if self.chunk_size is None else {"chunk_size": self.chunk_size}
        return (load_reader if for_backend else load_model)(self.model, device=self.device, dtype=self.dtype, **chunks)


@dataclass(frozen=True)
class EngineOptions:
    """Who decodes."""

    engine: Literal["in-process", "vllm"] = "in-process"
    """The model in this process, or a vLLM server, started with --enable-prompt-embeds on what `refrag export decoder` wrote."""
    vllm_url: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="URL")] = ()
    """Address of a vLLM server; may be given several times. Its key, if it wants one, is read from VLLM_API_KEY."""
    vllm_model: str | None = None
    """Name that the decoder is served under; by default the server's only one."""
    first_token_timeout_s: float = VllmSettings.first_token_timeout_s
    """Longest wait for vLLM's first token, in seconds."""
    token_timeout_s: float = VllmSettings.token_timeout_s
    """Longest wait for each further token of vLLM, in seconds."""

    def backend(self) -> Any:
        """The backend, None for this process. Raises InputError for a half-given choice, BackendError where no server answers."""
        if self.engine != "vllm":
            if self.vllm_url or self.vllm_model:
                raise InputError(f"{'An address' if self.vllm_url else 'A model'} of vLLM was given, but this process decodes: add --engine vllm.")
            return None
        settings = VllmSettings(
            self.vllm_url, model=self.vllm_model, first_token_timeout_s=self.first_token_timeout_s, token_timeout_s=self.token_timeout_s
        )
        from ..engine import VllmBackend

        async def check() -> None:
            backend = VllmBackend(settings)  # of its own: a backend belongs to one event loop
            try:
                await backend.check()
            finally:
                await backend.aclose()

        asyncio.run(check())
        return VllmBackend(settings)


@dataclass(frozen=True)
class Owner:
    """The model that an index belongs to."""

    model: str | None = None
    """Also check that the index belongs to this model."""
    device: Device = "auto"
    """Where to load it."""

    def __post_init__(self) -> None:
        """Raises InputError for a device without a model."""
        if self.device != "auto" and self.model is None:
            raise InputError(f"--device says where --model is loaded, and there is none: leave --device {self.device} out, or give --model.")

    def open(self, index: str) -> Any:
        """The PassageIndex, checked against the model if there is one."""
        from ..index import PassageIndex

        return PassageIndex.open(index, model=ModelOptions(self.model, self.device).load() if self.model else None)


@dataclass(frozen=True)
class Reading:
    """How input files are read."""

    skip_bad: bool = False
    """Leave out rows and files that cannot be read, and say how many, instead of stopping at the first."""
    encoding: str = "utf-8"
    """Encoding of text files."""
    text_column: str = "text"
    """Key or column of JSON, CSV, Parquet and dataset rows that holds the text."""
    subset: str | None = None
    """Subset (configuration) of datasets on the hub."""

    def passages(self, paths: Sequence[Path], model: Any, settings: IndexSettings, sources: set[str] | None = None) -> Iterator[Any]:
        """The passages of files and folders, one at a time, cut for this model; `sources` receives the files that were read whole."""
        from ..index import read_passages
        from ..text import PromptBuilder

        builder = PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size)
        return read_passages(paths, builder=builder, settings=settings, sources=sources, **asdict(self))


def check_paths(paths: Sequence[Path]) -> None:
    """Before a model is loaded."""
    if missing := [path for path in paths if not path.exists()]:
        from ..index.ingest import check_path

        for path in missing:
            check_path(path)
    if not paths:
        raise InputError("Nothing was named to read: give files or folders before --index.")


def show(values: dict[str, Any], *, as_json: bool) -> None:
    """Data on stdout: one JSON object, or a line per value."""
    if as_json:
        print(json.dumps(values, ensure_ascii=False, default=str))
        return
    width = max(map(len, values), default=0)
    for name, value in values.items():
        shown = ", ".join(f"{key} {own}" for key, own in value.items()) if isinstance(value, dict) else value
        print(f"{name:<{width}}  {shown}")
