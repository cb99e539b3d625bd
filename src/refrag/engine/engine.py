"""The engine: one way from questions to answers, for one request or a batch, at once or streamed."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import BUNDLED_MODEL, check_whole, takes_one
from ..encoder import encoder_window, tokenize_texts
from ..errors import InputError
from ..index.retrieve import Hit
from ..layout import Layout, MixedInputs, lay_out, mix, num_slots
from ..model import RefragModel, load_model
from ..policy import PolicyInputs, decide, learned_scores
from ..text import Passage, Prompt, PromptBuilder, Turn
from .answer import TIMING_KEYS, Answer, Options, Request, passage_list
from .backend import Backend
from .bridge import Bridge
from .decoding import TextFeed, decode, end_token_ids
from .devices import backend_errors
from .limits import check_expanded, check_prompt
from .prepared import Prepared, Row, decode_timings
from .reader import load_reader
from .rerank import CANDIDATES, CrossEncoder, Reranker, rerank
from .stream import AnswerStream, AsyncAnswerStream
from .vectors import VectorSource

log = logging.getLogger(__name__)

Passages = Sequence[str | dict | Passage] | None
Retriever = Callable[[str], Sequence[str | dict | Passage | Hit]]
"""Question -> passages, best first; a Hit brings its score, which the answer then shows."""
Sink = Callable[[str], object]
Found = tuple[Any, float | None]
"""A passage, as it was given, and its retrieval score."""


class Stopwatch:
    """Seconds per stage; waits for the device, so that queued work counts where it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = time.perf_counter()
        self.seconds = dict.fromkeys(TIMING_KEYS, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Generator[None]:
        begin = time.perf_counter()
        yield
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).synchronize()
        self.seconds[stage] += time.perf_counter() - begin


class Refrag:
    """Answers questions from passages with a RefragModel. Safe to share between threads."""

    def __init__(
        self,
        model: RefragModel,
        *,
        index: Any = None,
        retriever: Retriever | None = None,
        reranker: str | Reranker | None = None,
        cache_chunks: int = 65_536,
        backend: Backend | None = None,
    ) -> None:
        """`index`: a PassageIndex or its path; `retriever`: any callable from a question to passages. With both, the retriever
        finds, and the index gives the stored vectors of passages that it holds under the same id with the same text. `reranker`: a cross-encoder's name, or a callable (question, passages) → scores; `cache_chunks`: chunk vectors kept
        in memory for passages that are not in the index. `backend`: who decodes (a VllmBackend); None: the model, in this process.

        Raises InputError for a model without tokenizers, MismatchError for an index of another model, NotFoundError where
        there is none.
        """
        if not isinstance(model, RefragModel):
            raise InputError(f"The model must be a RefragModel, was {model!r}: load one with Refrag.from_pretrained(name).")
        if reranker is not None and not isinstance(reranker, str) and not callable(reranker):
            raise InputError(f"reranker must be a name or a function (question, passages) -> scores, was {reranker!r}.")
        if retriever is not None and not (callable(retriever) and takes_one(retriever)):
            raise InputError(f"retriever must be a function of one argument, from a question to passages, was {retriever!r}.")
        check_whole("cache_chunks", cache_chunks, minimum=0)
        if model.tokenizer is None or model.encoder_tokenizer is None:
            missing = "decoder" if model.tokenizer is None else "encoder"
            raise InputError(
                f"The model has no {missing} tokenizer: pass {missing}_tokenizer=… to RefragModel.from_parts and save it again."
            )
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self.index = None if index is None else _open(index, model)
        self.retriever = retriever
        self.reranker = CrossEncoder(reranker, device=model.device) if isinstance(reranker, str) else reranker
        self.builder = PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size)
        self.vectors = VectorSource(model, index=self.index, cache_chunks=cache_chunks)
        self._decode = partial(decode, model.decoder) if backend is None else Bridge(backend).decode
        self._limit = getattr(model.decoder.config.get_text_config(), "max_position_embeddings", None)
        self.end_ids = end_token_ids(model.decoder, model.tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = BUNDLED_MODEL,
        *,
        index: Any = None,
        retriever: Retriever | None = None,
        reranker: str | Reranker | None = None,
        backend: Backend | None = None,
        **loading: Any,
    ) -> "Refrag":
        """Load a model by folder, hub name or `bundled`; `loading` goes to `load_model`: device, dtype, revision, …

        With a `backend` (a VllmBackend) the decoder's layers are not loaded, and the perplexity policies are refused.
        """
        load = load_model if backend is None else load_reader
        return cls(load(model, **loading), index=index, retriever=retriever, reranker=reranker, backend=backend)

    # ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def answer(
        self, question: str | Request, passages: Passages = None, *, cancel: threading.Event | None = None, **options: Unpack[Options]
    ) -> Answer:
        """The answer to one question, from `passages` or else from the index or retriever; `[]` answers without any.

        `options` are the fields of Request, Budget and GenerationSettings by name. Setting `cancel` stops after the running token.
        Raises InputError for bad options, for a prompt that the decoder cannot hold, and without any source of passages.
        """
        return self._run([Request.make(question, passages, **options)], is_cancelled=cancel.is_set if cancel else _never)[0]

    def answer_batch(
        self, questions: Sequence[str | Request], *, cancel: threading.Event | None = None, **options: Unpack[Options]
    ) -> list[Answer]:
        """The answers to many questions by one padded `generate`, equal to the single ones; `timings` are the batch's.

        `options` hold for the questions given as text. Raises InputError when generation settings differ other than by seed.
        """
        if isinstance(questions, str | Request) or not isinstance(questions, Iterable):
            raise InputError(f"The questions of a batch must be a list, was a {type(questions).__name__}: put them between brackets, or call answer.")
        questions = list(questions)
        if options and not any(isinstance(question, str) for question in questions):
            raise InputError("The requests of a batch hold their options already: build others with dataclasses.replace.")
        requests = [question if isinstance(question, Request) else Request.make(question, **options) for question in questions]
        if len({replace(request.generation, seed=0) for request in requests}) > 1:
            raise InputError("The requests of a batch must share their generation settings, the seed aside: make one batch for each.")
        return self._run(requests, is_cancelled=cancel.is_set if cancel else _never) if requests else []

    def stream(
        self, question: str | Request, passages: Passages = None, *, cancel: threading.Event | None = None, **options: Unpack[Options]
    ) -> AnswerStream:
        """As `answer`, piece by piece: iterate for the text, then read `.answer`. The pieces together are its text."""
        start = time.perf_counter()
        request = Request.make(question, passages, **options)
        return AnswerStream(lambda sink, is_cancelled: self._run([request], sink, is_cancelled=is_cancelled, start=start)[0], cancel=cancel)

    async def aanswer(self, question: str | Request, passages: Passages = None, **options: Unpack[Options]) -> Answer:
        """As `answer`, in a thread; cancelling the task stops the decoding."""
        cancel = threading.Event()
        try:
            return await asyncio.to_thread(self.answer, question, passages, cancel=cancel, **options)
        except asyncio.CancelledError:
            cancel.set()
            raise

    def astream(self, question: str | Request, passages: Passages = None, **options: Unpack[Options]) -> AsyncAnswerStream:
        """As `stream`, for `async for`."""
        return AsyncAnswerStream(self.stream(question, passages, **options))

    # ── the flow ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(
        self,
        requests: Sequence[Request],
        sink: Sink | None = None,
        *,
        is_cancelled: Callable[[], bool],
        start: float | None = None,
    ) -> list[Answer]:
        watch = Stopwatch(self.device)
        watch.start = watch.start if start is None else start
        with torch.inference_mode(), backend_errors(self.device):
            rows, layout, inputs = self._prepare(requests, watch)
            feeds = [self._feed(request, sink) for request in requests]
            decode_start = time.perf_counter()
            clock = self._decode(
                inputs,
                feeds,
                settings=requests[0].generation,
                seeds=[request.generation.seed for request in requests],
                is_cancelled=is_cancelled,
            )
        timings = decode_timings(watch.start, decode_start, clock.stamps)
        log.debug("decoded %s tokens, the first after %.4f s", [feed.num_tokens for feed in feeds], timings["ttft_s"])
        usages, cancelled = self._usages(layout, rows), is_cancelled()
        parts = zip(rows, feeds, usages, strict=True)
        return [row.answer(feed, usage=usage, timings=watch.seconds | timings, cancelled=cancelled) for row, feed, usage in parts]

    def prepare(self, requests: Sequence[Request]) -> list[Prepared]:
        """Everything before the decoder for several requests together: what a `Backend` decodes, and what makes an Answer of it.

        Raises what `answer` raises, for the first request that cannot be answered: prepare them one by one to know which.
        """
        watch = Stopwatch(self.device)
        with torch.inference_mode(), backend_errors(self.device):
            rows, layout, inputs = self._prepare(requests, watch)
            embeds = [row[-slots:].clone() for row, slots in zip(inputs.inputs_embeds, layout.num_slots, strict=True)]  # left padded
        ready = time.perf_counter()
        feeds = [self._feed(request) for request in requests]
        return [Prepared(*parts, seconds=watch.seconds, ready=ready) for parts in zip(rows, embeds, self._usages(layout, rows), feeds, strict=True)]

    def _usages(self, layout: Layout, rows: Sequence[Row]) -> list[dict[str, int | float]]:
        """`Answer.usage` of each row, but for the tokens that are yet to be decoded."""
        kv_bytes = layout.kv_bytes(self.model.decoder.config, self.model.decoder.dtype)
        columns = zip(rows, layout.context_tokens, layout.context_slots, layout.num_slots, layout.compression_rate, kv_bytes, strict=True)
        return [
            {
                "context_tokens": tokens,
                "context_slots": context_slots,
                "prompt_slots": slots,
                "num_chunks": len(row.expand_mask),
                "expanded_chunks": int(row.expand_mask.sum()),
                "compression_rate": rate,
                "kv_bytes": own_bytes,
            }
            for row, tokens, context_slots, slots, rate, own_bytes in columns
        ]

    def _prepare(self, requests: Sequence[Request], watch: Stopwatch) -> tuple[list[Row], Layout, MixedInputs]:
        """Everything before the decoder: passages, prompts, vectors, decisions, layout, mixed inputs."""
        with watch("retrieve_s"):
            hits = self._search(requests)
            found = [self._passages(request, own) for request, own in zip(requests, hits, strict=True)]
        with watch("prompt_s"):
            prompts = [self._prompt(request, own) for request, own in zip(requests, found, strict=True)]
            for request, prompt in zip(requests, prompts, strict=True):
                check_prompt(prompt, request, self._limit)
        with watch("vectors_s"):
            vectors = self.vectors.chunk_embeds(prompts, needed=[request.policy != "all" for request in requests])
        with watch("question_s"):
            questions = self._question_embeds(requests, prompts)
        with watch("sense_s"):
            rows = self._rows(requests, prompts, found, vectors, questions)
        with watch("layout_s"):
            layout = lay_out(prompts, [row.expand_mask for row in rows]).to(self.device)
            for slots, row in zip(layout.num_slots, rows, strict=True):
                check_expanded(slots, row.prompt, row.request, self._limit)
        with watch("project_s"):
            inputs = self._mix(layout, rows, vectors)
        log.debug(
            "context tokens %s in %s slots, prompt slots %s, inputs_embeds %s",
            layout.context_tokens,
            layout.context_slots,
            layout.num_slots,
            tuple(inputs.inputs_embeds.shape),
        )
        return rows, layout, inputs

    def _search(self, requests: Sequence[Request]) -> list[Sequence[Hit]]:
        """What the index finds for each request; those that search it in the same way are looked for together."""
        hits: list[Sequence[Hit]] = [()] * len(requests)
        if self.index is None or self.retriever is not None:
            return hits
        alike: dict[tuple[str, str | None, int], list[int]] = {}
        for number, request in enumerate(requests):
            if request.passages is None:
                depth = request.top_k if request.mode == "hybrid" else 0  # how deep the rankings go that are fused depends on it
                alike.setdefault((request.mode, request.where, depth), []).append(number)
        for (mode, where, _), numbers in alike.items():
            wanted = [self._wanted(requests[number]) for number in numbers]
            found = self.index.search_batch([requests[number].question for number in numbers], top_k=max(wanted), mode=mode, where=where)
            for number, own, count in zip(numbers, found, wanted, strict=True):
                hits[number] = own[:count]
        return hits

    def _wanted(self, request: Request) -> int:
        """How many passages to retrieve: more than are read where a reranker chooses among them."""
        return request.top_k * (CANDIDATES if self.reranker else 1)

    def _passages(self, request: Request, hits: Sequence[Hit]) -> list[Found]:
        """The passages to read with their retrieval scores, best first; `hits`: those of the index."""
        if request.passages is not None:
            return [(passage, None) for passage in request.passages]
        found: list[Found]
        if self.retriever is not None:
            if request.where is not None:
                raise InputError("The filter `where` belongs to an index, this engine has a retriever: filter in the retriever.")
            given = passage_list(self.retriever(request.question), "What a retriever returns")[: self._wanted(request)]
            found = [
                (own.passage, float(own.score)) if isinstance(own, Hit) else (Passage.from_any(own, number), None)
                for number, own in enumerate(given, 1)
            ]
        elif self.index is not None:
            found = [(hit.passage, float(hit.score)) for hit in hits]
        else:
            raise InputError("There is nothing to retrieve from: pass passages=[…], or build the engine with index=… or retriever=….")
        if not found:
            log.warning("No passage was found: the answer rests on none.")
        if self.reranker is None:
            return found
        return [*rerank(self.reranker, request.question, [own for own, _ in found], request.top_k)]

    def _prompt(self, request: Request, found: list[Found]) -> Prompt:
        return self.builder.build(
            request.question,
            [passage for passage, _ in found],
            system=request.system,
            history=cast(Sequence[Turn], request.history),  # __post_init__ made them Turns
            passages_first=request.passages_first,
        )

    def _policy(self, request: Request, prompt: Prompt) -> Any:
        """Who decides for one prompt: the policy asked for, else the learned one where it is trained, else similarity."""
        default = "learned" if self.model.has_trained_policy else "similarity"
        return (request.policy or default) if prompt.chunks else "none"

    def _rows(
        self, requests: Sequence[Request], prompts: Sequence[Prompt], found: Sequence[list[Found]], vectors: Sequence[Float[Tensor, "_ enc"]], questions: Sequence[Float[Tensor, "enc"] | None]
    ) -> list[Row]:
        """The policies' decisions; prompts that the learned policy decides are scored together."""
        inputs = [self._policy_inputs(*parts) for parts in zip(requests, prompts, vectors, questions, strict=True)]
        learned = [number for number, parts in enumerate(zip(requests, prompts, strict=True)) if self._policy(*parts) == "learned"]
        scores: dict[int, Tensor] = {}
        if len(learned) > 1 and self.model.has_trained_policy:
            scores = dict(zip(learned, learned_scores(cast(torch.nn.Module, self.model.policy), [inputs[number] for number in learned]), strict=True))
        return [self._row(*parts, scores.get(number)) for number, parts in enumerate(zip(requests, prompts, found, inputs, strict=True))]

    def _policy_inputs(self, request: Request, prompt: Prompt, vectors: Float[Tensor, "_ enc"], question: Float[Tensor, "enc"] | None) -> PolicyInputs:
        """What a policy may look at for one prompt."""
        return PolicyInputs(
            chunk_embeds=vectors,
            chunk_lengths=torch.tensor([len(chunk.token_ids) for chunk in prompt.chunks], dtype=torch.long, device=self.device),
            passage_index=torch.tensor([chunk.passage for chunk in prompt.chunks], dtype=torch.long, device=self.device),
            question_embeds=question,
            perplexity=lambda: self.model.chunk_perplexity(prompt),
            seed=request.generation.seed,
        )

    def _row(self, request: Request, prompt: Prompt, found: list[Found], inputs: PolicyInputs, known: Tensor | None) -> Row:
        """The policy's decision for one prompt; `known`: its scores, where they were computed already."""
        policy = self._policy(request, prompt)
        mask, scores = decide(
            policy if known is None else lambda _: known,
            inputs,
            budget=request.budget,
            base_slots=num_slots(prompt, [False] * len(prompt.chunks)),
            default_fraction=self.model.config.expand_fraction,
            learned=self.model.policy if self.model.has_trained_policy else None,
        )
        rule = policy if isinstance(policy, str) else getattr(policy, "__name__", type(policy).__name__)
        by_passage = {id(passage): score for passage, score in found if score is not None}
        return Row(request, prompt, by_passage, mask.cpu(), scores.float().cpu(), rule)

    def _feed(self, request: Request, sink: Sink | None = None) -> TextFeed:
        """What takes the answer's token ids."""
        num_ids = self.model.get_input_embeddings().num_embeddings
        return TextFeed(self.model.tokenizer, self.end_ids, request.generation.stop, sink, num_ids=num_ids)

    def _question_embeds(self, requests: Sequence[Request], prompts: Sequence[Prompt]) -> list[Float[Tensor, "enc"] | None]:
        """The encoder's vector of each question whose policy looks at it, encoded together and each once."""
        is_aware = bool(getattr(self.model.policy, "question_aware", False))
        wanted = [_needs_question(self._policy(request, prompt), is_aware) for request, prompt in zip(requests, prompts, strict=True)]
        questions = list(dict.fromkeys(request.question for request, is_wanted in zip(requests, wanted, strict=True) if is_wanted))
        if not questions:
            return [None] * len(requests)
        window = encoder_window(self.model.encoder, self.model.encoder_tokenizer)
        longest = max(map(len, tokenize_texts(self.model.encoder_tokenizer, questions, window=1 << 30)))
        if longest > window:
            raise InputError(
                f"The question has {longest} tokens, {longest - window} more than the encoder's window of {window}: "
                "shorten it, or choose --policy first, which does not read it."
            )
        embeds = dict(zip(questions, self.model.encode(questions), strict=True))
        return [embeds[request.question] if is_wanted else None for request, is_wanted in zip(requests, wanted, strict=True)]

    def _mix(self, layout: Layout, rows: Sequence[Row], vectors: Sequence[Float[Tensor, "_ enc"]]) -> MixedInputs:
        """Only compressed chunks are projected; the rows of expanded ones occupy no slot and stay zero."""
        decoder, device = self.model.decoder, self.device
        expanded = torch.cat([row.expand_mask for row in rows])
        compressed = (~expanded).nonzero().squeeze(1).to(device)
        width = decoder.config.get_text_config().hidden_size
        projected = torch.zeros(len(expanded), width, device=device, dtype=decoder.dtype)
        if len(compressed):
            projected[compressed] = self.model.project(torch.cat(list(vectors))[compressed])
        return mix(layout, decoder.get_input_embeddings(), projected)


def _never() -> bool:
    return False


def _open(index: Any, model: RefragModel) -> Any:
    """An index at a path is opened; either way it must belong to the model. Its retriever is loaded now, not by the first question."""
    from ..index import PassageIndex

    if isinstance(index, str | Path):
        index = PassageIndex.open(index, model=model)
    elif not hasattr(index, "model"):
        raise InputError(f"index must be a PassageIndex or its folder, was {index!r}.")
    elif index.model is not model:
        index.manifest.check_model(model.fingerprint(), index.path, chunk_sizes=model.config.chunk_sizes or ())
    if isinstance(index, PassageIndex):
        log.debug("the index was embedded by %s", index.retriever.name)
    return index


def _needs_question(policy: Any, is_aware: bool) -> bool:
    """Only fixed rules are known not to look at the question's vector, and learned policies say so (`is_aware`)."""
    if policy == "learned":
        return is_aware
    return policy == "similarity" or not isinstance(policy, str)
