"""`refrag ask`, `demo` and `info`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from .. import __version__
from ..config import BUNDLED_MODEL, Budget, GenerationSettings, IndexSettings, check_whole
from ..errors import InputError
from .options import AsJson, Device, EngineOptions, Messages, ModelOptions, Reading, check_paths, show


@dataclass(frozen=True)
class Decoding(GenerationSettings):
    """How the answer is decoded."""

    top_k: Annotated[int, arg(name="sample-top-k")] = 0
    """Sample among the k most probable tokens; 0: among all."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """The answer ends before this string; may be given several times."""


@dataclass(frozen=True)
class Ask:
    """Answer a question from passages: the answer streams to stdout, then a short table to stderr.

    The time to first token is that of a first question, which warms everything up; `refrag bench latency` measures a warm engine.
    """

    question: Positional[str]
    """The question, between quotes."""
    budget: Budget
    decoding: Decoding
    reading: Reading
    model: ModelOptions
    engine: EngineOptions
    messages: Messages
    index: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Folder of the index to retrieve from."""
    passages: Path | None = None
    """File or folder of passages to read, all of them, instead of an index."""
    top_k: int | None = None
    """Passages to retrieve; 8 if not given."""
    mode: Literal["dense", "text", "hybrid"] = "dense"
    """Retrieval by meaning, by words (BM25), or by both."""
    where: str | None = None
    """Only passages for which this SQL filter on the index's columns holds."""
    reranker: str | None = None
    """Cross-encoder that reorders the passages found: folder or name."""
    faiss: Annotated[str | None, arg(metavar="FACTORY")] = None
    """Retrieve by a FAISS index over the same vectors, made in memory from this `index_factory` string, such as Flat or HNSW32."""
    policy: Annotated[str | None, arg(metavar="NAME")] = None
    """Who decides which chunks are expanded: none, all, random, first, similarity, perplexity, perplexity-low or learned. By default the learned policy if the model has one, else similarity."""
    system: str | None = None
    """System text."""
    trace: bool = False
    """Show the passages with the expanded parts highlighted."""
    as_json: AsJson = False
    """Print the whole answer, with usage, timings and trace, as one JSON object."""

    def run(self) -> int:
        """Stream the text, or print one object; then the table."""
        if (self.index is None) == (self.passages is None):
            raise InputError("Passages must come from one place: give either --index FOLDER or --passages FILE.")
        if self.passages is not None:
            given = [f"--{name.replace('_', '-')}" for name in ("where", "reranker", "top_k") if getattr(self, name) is not None] + ["--mode"] * (self.mode != "dense")
            if given:
                raise InputError(f"All passages of --passages are read, nothing is retrieved: leave {' and '.join(given)} out, or make an index and give --index.")
            check_paths([self.passages])
        elif self.reading != Reading():
            raise InputError("How files are read belongs to --passages: leave --skip-bad, --encoding, --text-column and --subset out.")
        if self.top_k is not None:
            check_whole("--top-k", self.top_k, minimum=1)
        if self.faiss is not None and (self.index is None or self.mode != "dense" or self.where is not None):
            raise InputError("--faiss searches the vectors of an index by meaning: give --index, and leave --mode and --where out.")
        console = self.messages.console()
        from ..engine.answer import Request, render_summary, render_trace

        names = "policy", "budget", "system", "mode", "where"
        options: dict[str, Any] = {name: getattr(self, name) for name in names} | ({} if self.top_k is None else {"top_k": self.top_k})
        request = Request(self.question, generation=self.decoding, **options)
        from ..engine import Refrag
        from ..index import PassageIndex

        if self.index is not None:  # what can be refused is refused before the model is loaded
            PassageIndex.open(self.index)
        backend = self.engine.backend()
        model = self.model.load(for_backend=backend is not None)
        engine = Refrag(model, index=self.index, reranker=self.reranker, backend=backend)
        if self.faiss is not None:
            engine.retriever = self._retriever(engine, self.faiss, request.top_k)
        answer = self._answer(engine, request)
        if self.trace:
            console.print(render_trace(answer))
        console.print(render_summary(answer))
        return 0

    def _retriever(self, engine: Any, factory: str, top_k: int) -> Any:
        """FAISS over the index's vectors, as deep as the engine looks."""
        from ..engine.rerank import CANDIDATES
        from ..index import FaissRetriever

        return FaissRetriever(engine.index, index_factory=factory, top_k=top_k * (CANDIDATES if self.reranker else 1))

    def _answer(self, engine: Any, request: Any) -> Any:
        if self.passages is not None:
            read = self.reading.passages([self.passages], engine.model, IndexSettings())
            request = replace(request, passages=list(read))
        if self.as_json:
            answer = engine.answer(request)
            show(answer.to_dict(), as_json=True)
            return answer
        with engine.stream(request) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
            print(flush=True)
            return pieces.answer


@dataclass(frozen=True)
class Demo:
    """Ask a model about an invented world: plain RAG against compressed passages, in one table."""

    messages: Messages
    model: str = BUNDLED_MODEL
    """A folder, a name on the Hugging Face hub, or `bundled`: the tiny model that comes with refrag."""
    num_questions: int = 40
    """Questions to ask."""
    seed: int = 0
    """Which questions of which world."""
    device: Device = "auto"
    """Where to compute."""
    as_json: AsJson = False
    """Print the table as one JSON object."""

    def run(self) -> int:
        """Everything happens in refrag.demo.run."""
        check_whole("num_questions", self.num_questions, minimum=1)
        console = self.messages.console()
        from transformers.utils.logging import disable_progress_bar

        from ..demo.run import run_demo

        disable_progress_bar()
        run_demo(self.model, num_questions=self.num_questions, seed=self.seed, device=self.device, as_json=self.as_json, console=console)
        return 0


@dataclass(frozen=True)
class Info:
    """Show versions, device and model, and what an index holds."""

    model: ModelOptions
    messages: Messages
    index: Annotated[str | None, arg(metavar="FOLDER")] = None
    """Index to show too, checked against the model."""
    as_json: AsJson = False
    """Print one JSON object."""

    def run(self) -> int:
        """Prints one value a line."""
        self.messages.console()
        from importlib.metadata import version

        model = self.model.load()
        parts = {
            name: f"{getattr(model, name).config.model_type}, {getattr(model, name).num_parameters():,} parameters"
            for name in ("encoder", "decoder")
        }
        config = model.config
        values = {
            "refrag": __version__,
            **{package: version(package) for package in ("torch", "transformers", "lancedb")},
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "model": self.model.model,
            **parts,
            "chunk_size": config.chunk_size,
            "chunk_sizes": config.chunk_sizes or [config.chunk_size],
            "pooling": config.pooling,
            "policy": f"{config.policy['kind']}, {'trained' if model.has_trained_policy else 'not trained'}",
            "expand_fraction": config.expand_fraction,
        }
        if self.index is not None:
            from ..index import PassageIndex

            values["index"] = PassageIndex.open(self.index, model=model).info()
        show(values, as_json=self.as_json)
        return 0
