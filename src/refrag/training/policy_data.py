"""What the policy is trained and judged on: windows of plain documents, or questions with passages whose answer is known."""

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from ..data.sources import holds_questions
from ..errors import InputError
from ..model import RefragModel
from ..text import PromptBuilder
from .batches import ChunkedDocuments, ChunkRef, Windows
from .data import Document, Loaded, Question, load
from .documents import steps_of
from .rollout import PolicyItem, num_picks
from .settings import PolicySettings, SftSettings
from .sft import answer_chunks, answer_ids, choose_passages, count_losses, renumbered

logger = logging.getLogger(__name__)


class Items(NamedTuple):
    """Training items by row, items to evaluate on, and what became of the data."""

    train: Any
    evaluation: list[PolicyItem]
    counts: dict[str, int]
    fingerprint: str | None


class QuestionItems(Dataset):
    """Row i is a question with its passages, gold ones and distractors shuffled, a pure function of (seed, i); each pass in another order."""

    def __init__(self, model: RefragModel, questions: Sequence[Question], settings: PolicySettings) -> None:
        self.questions, self.settings, self.tokenizer = questions, settings, model.tokenizer
        self.builder = PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size)
        self._order = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng((settings.seed, epoch)).permutation(len(questions)))

    def __len__(self) -> int:
        """Rows of one pass."""
        return len(self.questions)

    def __getitem__(self, row: int) -> PolicyItem:
        epoch, place = divmod(row, len(self.questions))
        question = self.questions[int(self._order(epoch)[place])]
        rng = random.Random(f"policy-{self.settings.seed}-{row}")
        passages, marked = choose_passages(question, num_passages=self.settings.num_passages, rng=rng)
        prompt = self.builder.build(question.question, passages, system=question.system, history=question.history)
        gold = answer_chunks(prompt, question.answers, marked)
        answer = renumbered(question.answers[0], question, passages)
        completion = answer_ids(self.tokenizer, self.builder, answer, max_tokens=SftSettings.max_answer_tokens)
        return PolicyItem(prompt, completion, question.question, gold if any(gold) else None, question.id)


class WindowItems(Dataset):
    """Row i is a window of a document: s tokens of context, the next o are scored; pass after pass, each in another order."""

    def __init__(self, windows: Windows, *, context_chunks: int, output_tokens: int) -> None:
        self.windows, self.context_chunks, self.output_tokens = windows, context_chunks, output_tokens

    def __len__(self) -> int:
        """Rows of one pass."""
        return len(self.windows)

    def __getitem__(self, row: int) -> PolicyItem:
        refs, chunked = self.windows.refs(row, self.windows.num_chunks), self.windows.chunked
        context, output = refs[: self.context_chunks], refs[self.context_chunks :]
        prompt = chunked.prompt(context)
        return PolicyItem(prompt, _continuation(chunked, output)[: self.output_tokens], id=chunked.documents[context[0].document].id)


def _continuation(chunked: ChunkedDocuments, refs: Sequence[ChunkRef]) -> list[int]:
    """The tokens of the chunks; where another document begins, the end token stands between, as in continual pre-training."""
    end, tokens = chunked.builder.tokenizer.eos_token_id, []
    for place, ref in enumerate(refs):
        if place and ref.document != refs[place - 1].document and end is not None:
            tokens.append(end)
        tokens += chunked.token_ids(ref)
    return tokens


def build_items(model: RefragModel, settings: PolicySettings) -> Items:
    """Items of the settings' data: questions where its rows have a question, else plain documents.

    Raises InputError for data that cannot be read, texts that are all too short, and a stream.
    """
    if settings.streaming:
        raise InputError("The policy reads its data whole, --streaming is for the stages over documents: leave it out.")
    items = _question_items(model, settings) if holds_questions(settings.data) else _window_items(model, settings)
    logger.info("data: %s", ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in items.counts.items()))
    return items


def _question_items(model: RefragModel, settings: PolicySettings) -> Items:
    loaded: Loaded[Any] = load(settings, "questions")
    train, bare = _with_passages(loaded.train, settings)
    evaluation, _ = _with_passages(loaded.evaluation, settings)
    held_out = QuestionItems(model, evaluation, replace(settings, seed=settings.seed + 1))
    items = [held_out[row] for row in range(min(settings.eval_rows, len(held_out)))]
    made = QuestionItems(model, train, settings)
    lost = count_losses(train, model.tokenizer, made.builder, num_passages=settings.num_passages, max_answer_tokens=SftSettings.max_answer_tokens)
    return Items(made, items, loaded.counts | lost | {"without_passages": bare}, loaded.fingerprint)


def _with_passages(questions: Any, settings: PolicySettings) -> tuple[Any, int]:
    """The rows that have a passage, and how many have none. Raises InputError for one that has none, but with `skip_bad`, and for no row at all."""
    bare = np.array([not (question.passages or any(turn.passages for turn in question.history)) for question in questions], dtype=bool)
    if bare.any() and (bare.all() or not settings.skip_bad):
        row = questions[int(bare.argmax())].id
        raise InputError(f"A question must have a passage to choose chunks from, row {row!r} has none: add passages{'' if bare.all() else ', or leave such rows out with --skip-bad'}.")
    return (questions.take(~bare) if bare.any() else questions), int(bare.sum())


def _window_items(model: RefragModel, settings: PolicySettings) -> Items:
    loaded: Loaded[Any] = load(settings, "documents")
    train: Any = loaded.train
    windows = _windows(model, train, settings)
    if windows is None:
        needed = settings.context_tokens + settings.output_tokens
        raise InputError(f"A window takes {needed} tokens of context and output, all texts together have fewer: lower --context-tokens or --output-tokens, or add texts.")
    held_out = _windows(model, loaded.evaluation, replace(settings, seed=settings.seed + 1)) if len(loaded.evaluation) else None
    if held_out is None and settings.eval_rows:
        logger.warning("The held-out texts are too short for a window: nothing is evaluated.")
    evaluation = [] if held_out is None else [held_out[row] for row in range(min(settings.eval_rows, len(held_out)))]
    return Items(windows, evaluation, loaded.counts | windows.windows.counts, loaded.fingerprint)


def _windows(model: RefragModel, documents: Sequence[Document], settings: PolicySettings) -> WindowItems | None:
    """Windows within documents, where one is long enough; else documents are packed, each its own passage. None: too little text."""
    size = model.config.chunk_size
    context = settings.context_tokens // size
    if not context:
        raise InputError(f"context_tokens must be a chunk ({size} tokens) or more, was {settings.context_tokens}: raise it.")
    needed = context - (-settings.output_tokens // size)
    chunked = ChunkedDocuments(documents, PromptBuilder(model.tokenizer, chunk_size=size))
    if chunked.total < needed:
        return None
    windows = Windows(chunked, needed, pack=not (chunked.num_chunks >= needed).any(), seed=settings.seed)
    return WindowItems(windows, context_chunks=context, output_tokens=settings.output_tokens)


CHECKED_ROWS = 64


def check_items(model: RefragModel, train_items: Any, settings: PolicySettings) -> None:
    """Raises InputError where the first rows show that nothing could be learned."""
    items = [train_items[row] for row in range(CHECKED_ROWS)]
    longest = max(len(item.prompt.chunks) for item in items)
    if not num_picks(max(settings.expand_fractions), longest):
        needed = math.ceil(1 / max(settings.expand_fractions) - 1e-9)
        raise InputError(
            f"A context must have {needed} chunks or more for one pick at expand_fraction {max(settings.expand_fractions):g}, the longest has {longest}: "
            "raise --expand-fractions, or take more or longer passages."
        )
    if model.config.policy["question_aware"] and any(item.question is None for item in items):
        raise InputError("This model's policy looks at the question, plain documents have none: train it on questions with passages, or build the model with a policy that is not question_aware.")
    if (settings.supervised_steps or settings.objective == "supervised") and not any(any(item.gold or ()) for item in items):
        raise InputError(
            f"A supervised start needs chunks known to hold evidence, none of the first {len(items)} rows has one: "
            "mark gold passages, give answers that stand in the passages, or leave --supervised-steps out."
        )


# ── the order of steps ───────────────────────────────────────────────────────────────────────────────────────────────


def updates_of(settings: PolicySettings) -> int:
    """Optimizer steps on each rollout: REINFORCE takes one, since its draws must be the policy's own."""
    return settings.updates_per_rollout if settings.objective == "grouped" else 1


class RolloutSteps(Dataset):
    """Micro-batches in the order they are trained on: item n holds its rows where a rollout starts, none where it is used again.

    First the supervised steps, each on rows of its own; then rollouts, each for `updates_per_rollout` steps. `items[row]` is
    a PolicyItem for any row from 0 on.
    """

    def __init__(self, items: Any, settings: PolicySettings, *, num_steps: int, micro_batches: int) -> None:
        """`micro_batches` make one optimizer step, over all processes. Raises InputError when no step is left for the objective."""
        assert num_steps > 0
        self.items, self.batch_size, self.updates = items, settings.batch_size, updates_of(settings)
        self.num_steps, self.micro_batches = num_steps, micro_batches
        self.objective = settings.objective
        self.supervised_steps = num_steps if settings.objective == "supervised" else settings.supervised_steps
        if settings.objective != "supervised" and self.supervised_steps >= num_steps:
            raise InputError(
                f"supervised_steps must be fewer than the run's {num_steps} steps, were {self.supervised_steps}: "
                "raise --num-steps, or pass --objective supervised."
            )

    def __len__(self) -> int:
        return self.num_steps * self.micro_batches

    def __getitem__(self, item: int) -> dict[str, Any]:
        step, micro = divmod(item, self.micro_batches)
        rollout, update = divmod(max(step - self.supervised_steps, 0), self.updates)
        supervised = step < self.supervised_steps
        number = (step if supervised else self.supervised_steps + rollout) * self.micro_batches + micro
        rows = range(number * self.batch_size, (number + 1) * self.batch_size) if supervised or not update else ()
        name = "supervised" if supervised else self.objective
        return {"name": name, "number": number, "micro": micro, "items": [self.items[row] for row in rows]}


def policy_steps(settings: PolicySettings, rows: int) -> int:
    """Optimizer steps of the stage: as set, or the supervised start and then `num_epochs` passes over `rows`, each rollout used as often as it is.

    Raises InputError when that is none.
    """
    if settings.num_steps is not None:
        return settings.num_steps
    start = 0 if settings.objective == "supervised" else settings.supervised_steps
    return start + steps_of(replace(settings, num_epochs=settings.num_epochs * updates_of(settings)), rows)
