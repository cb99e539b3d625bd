"""What the speed benchmarks read: a model by name or of a shape, passages of equal length on disk, and a question."""

import logging
import random
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import Budget, GenerationSettings, IndexSettings
from ..encoder import resolve_device
from ..engine import Request
from ..errors import InputError
from ..index import Hit, PassageIndex
from ..model import RefragModel, load_model
from ..text import Passage, PromptBuilder
from .settings import Reading
from .shapes import random_refrag, vocabulary

logger = logging.getLogger(__name__)

Draw = list[Passage]
"""The passages of one request."""


def build_model(settings: Reading) -> RefragModel:
    """The model named in the settings, or one of the shape with random weights. No token ends its answers: equal numbers are compared."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model = _named_model(settings)
    model.decoder.config.eos_token_id = model.decoder.generation_config.eos_token_id = model.tokenizer.eos_token = None
    return model


def _named_model(settings: Reading) -> RefragModel:
    if settings.model is not None:
        return load_model(settings.model, device=settings.device, dtype=settings.dtype)
    device = resolve_device(settings.device)
    dtype = torch.bfloat16 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    logger.info("building %s with random weights", settings.shape)
    return random_refrag(
        settings.shape, settings.encoder_shape, chunk_size=settings.chunk_size, question_aware=settings.question_aware, dtype=dtype, device=device, seed=settings.seed
    )


@dataclass(frozen=True)
class Workload:
    """Passages of equal length and a question, in tokens of the model's own tokenizer."""

    passages: list[Passage]
    question: str

    @classmethod
    def make(cls, model: RefragModel, settings: Reading) -> "Workload":
        """Text of random words: each passage has context_tokens / num_passages tokens, a prompt question_tokens besides.

        Raises InputError when the question tokens cannot hold the template.
        """
        builder = PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size)
        rng = random.Random(settings.seed)
        words = vocabulary(settings.seed)
        size = settings.context_tokens // settings.num_passages

        def length(text: str) -> int:
            return len(builder.chunk(text).token_ids)

        texts = [compose(words, size, rng, length) for _ in range(settings.index_passages)]
        passages = [Passage(id=f"p{number}", text=text) for number, text in enumerate(texts)]
        request = passages[: settings.num_passages]

        def uncompressed(question: str) -> int:
            prompt = builder.build(question, request)
            return len(prompt.token_ids()) - sum(len(chunk.token_ids) for chunk in prompt.chunks)

        if (least := uncompressed("?")) > settings.question_tokens:
            raise InputError(
                f"question_tokens must hold the template and the numbers of {settings.num_passages} passages, {least} tokens, "
                f"was {settings.question_tokens}: try {least + 32}, or fewer passages."
            )
        return cls(passages, compose(words, settings.question_tokens, rng, uncompressed))

    def draws(self, settings: Reading) -> Iterator[Draw]:
        """Endless draws of num_passages different passages."""
        rng = random.Random(settings.seed + 1)
        while True:
            yield rng.sample(self.passages, settings.num_passages)

    def request(self, settings: Reading, *, new_tokens: int) -> Request:
        """The question with the policy and budget of the settings, without passages."""
        return Request(
            self.question,
            top_k=settings.num_passages,
            policy=settings.policy,
            budget=Budget() if settings.policy in ("none", "all") else Budget(expand_fraction=settings.expand_fraction),
            generation=GenerationSettings(max_new_tokens=new_tokens, seed=settings.seed),
        )


def compose(words: Sequence[str], num_tokens: int, rng: random.Random, length: Callable[[str], int]) -> str:
    """Random words up to `length(text)` of num_tokens, or the nearest below that whole words reach."""
    chosen = [rng.choice(words)]
    while (missing := num_tokens - length(" ".join(chosen))) > 0:
        chosen += rng.choices(words, k=max(1, missing // 4))
    while len(chosen) > 1 and length(" ".join(chosen)) > num_tokens:
        chosen.pop()
    return " ".join(chosen)


class IdsInHand:
    """An index whose search is done: a request holds passage ids; texts and vectors are read from disk by the request."""

    def __init__(self, index: PassageIndex) -> None:
        self.index, self.model = index, index.model
        self.ids: list[str] = []
        self.ids_read = 0

    def search_batch(self, questions: Sequence[str], **how: Any) -> list[list[Hit]]:
        """The passages of the ids, read by id, for each question."""
        found = self.index.passages(self.ids)
        return [[Hit(found[identity], 1.0) for identity in self.ids]] * len(questions)

    def stored(self, ids: Sequence[str]) -> dict[str, Any]:
        """Their texts and vectors, read by id."""
        self.ids_read += len(ids)
        return self.index.stored(ids)


@contextmanager
def make_index(model: RefragModel, workload: Workload, folder: Path | None) -> Generator[PassageIndex]:
    """The workload's passages in an index on disk: in the folder given, or in a temporary one that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="refrag-bench-") as temporary:
        index = PassageIndex.create(folder or Path(temporary) / "index", model, IndexSettings())
        logger.info("indexing %d passages", len(workload.passages))
        index.add(workload.passages)
        yield index
