"""Stage 3, fine-tuning on questions with passages: gold ones and distractors, shuffled or in their order; random budgets; loss on the answer only."""

import logging
import random
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ..data.rows import answer_spans
from ..errors import InputError
from ..layout import num_slots
from ..model import RefragModel
from ..text import Passage, Prompt, PromptBuilder
from .batches import check_positions, layout_batch
from .data import Question, load
from .documents import items_per_step, steps_of
from .fit import StageData, fit, freeze
from .settings import SftSettings

logger = logging.getLogger(__name__)


def answer_ids(tokenizer: Any, builder: PromptBuilder, answer: str, *, max_tokens: int) -> list[int]:
    """Token ids of an answer and of the end: after a chat template as it is, after the plain template with a space before.

    An answer that begins with a citation (`[2] …`) follows the plain template without one. One that is cut has no end.
    """
    text = answer if tokenizer.chat_template or answer.startswith("[") else f" {answer}"
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return (builder.encode(text) + end)[:max_tokens]


def choose_passages(question: Question, *, num_passages: int, rng: random.Random, keep_order: bool = False) -> tuple[list[Passage], list[bool] | None]:
    """The gold passages and distractors up to `num_passages`, shuffled unless `keep_order`, and which of them are gold (None: not marked).

    First come gold ones that hold an answer (any that do, where no gold one does), then gold ones; where none is marked, the rest keeps its order.
    """
    places = list(range(len(question.passages)))
    if question.gold is not None:
        places = rng.sample(places, k=len(places))
    if len(places) > num_passages:
        holds = [bool(answer_spans(passage.text, question.answers)) for passage in question.passages]
        gold = question.gold or [False] * len(holds)
        unmarked = not any(own and held for own, held in zip(gold, holds, strict=True))  # then whatever holds an answer
        places.sort(key=lambda place: (not (holds[place] and (gold[place] or unmarked)), not gold[place]))
    chosen = places[:num_passages]
    if keep_order:
        chosen.sort()
    else:
        rng.shuffle(chosen)
    marked = None if question.gold is None else [question.gold[place] for place in chosen]
    return [question.passages[place] for place in chosen], marked


def renumbered(answer: str, question: Question, passages: Sequence[Passage]) -> str:
    """The answer with its citations (`[2]`: the second passage of the row) turned into the numbers that the passages got.

    `passages` are those of the prompt's last turn; earlier turns have the numbers before.
    """
    earlier = sum(len(turn.passages) for turn in question.history)
    number_of = {id(passage): number for number, passage in enumerate(passages, start=earlier + 1)}

    def turned(found: re.Match[str]) -> str:
        place = int(found[1]) - 1
        return f"[{number_of.get(id(question.passages[place]), found[1])}]" if 0 <= place < len(question.passages) else found[0]

    return re.sub(r"\[(\d+)\]", turned, answer)


def answer_chunks(prompt: Prompt, answers: Sequence[str], gold: Sequence[bool] | None = None) -> list[bool]:
    """Which chunks overlap a place where one of the answers stands, upper or lower case, in the gold passages (all, if none is marked).

    `gold` has one entry a passage of the last turn; they are the last of the prompt's passages.
    """
    first = 0 if gold is None else len(prompt.passages) - len(gold)
    spans = []
    for number, passage in enumerate(prompt.passages):
        if gold is None or (number >= first and gold[number - first]):
            spans += [(number, *span) for span in answer_spans(passage.text, answers)]
    return [any(chunk.passage == number and chunk.start < end and start < chunk.end for number, start, end in spans) for chunk in prompt.chunks]


class QuestionBatches(Dataset):
    """Item i is micro-batch i: `batch_size` questions, pass after pass over all, each pass in another order."""

    def __init__(self, model: RefragModel, questions: Sequence[Question], settings: SftSettings, *, num_items: int, num_rows: int | None = None) -> None:
        """The last micro-batch is smaller where there are only `num_rows`."""
        self.num_rows = num_items * settings.batch_size if num_rows is None else num_rows
        self.model, self.questions, self.settings, self.num_items = model, questions, settings, num_items
        self.builder = PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size)
        self._order = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng((settings.seed, epoch)).permutation(len(questions)))

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, item: int) -> dict[str, Any]:
        rows = [self._row(row) for row in range(item * self.settings.batch_size, min((item + 1) * self.settings.batch_size, self.num_rows))]
        prompts, masks, completions, names, ids = (list(column) for column in zip(*rows, strict=True))
        batch = layout_batch(self.model, prompts, masks, encode_all=True, completions=completions)
        return batch | {"name": list(dict.fromkeys(names)), "rows": ids}

    def _row(self, row: int) -> tuple[Prompt, list[bool], list[int], str, str]:
        """(prompt, expand mask, completion, how it is expanded, id) of one row."""
        epoch, place = divmod(row, len(self.questions))
        question = self.questions[int(self._order(epoch)[place])]
        rng = random.Random(f"sft-{self.settings.seed}-{row}")
        passages, gold = choose_passages(question, num_passages=self.settings.num_passages, rng=rng, keep_order=self.settings.keep_order)
        prompt = self.builder.build(question.question, passages, system=question.system, history=question.history)
        mask, how = self._mask(prompt, question, gold, rng)
        answer = renumbered(question.answers[0], question, passages)
        completion = answer_ids(self.model.tokenizer, self.builder, answer, max_tokens=self.settings.max_answer_tokens)
        return prompt, mask, completion, how, question.id

    def most_slots(self, question: Question) -> int:
        """Slots of a row of this question as it may be drawn: whole, where rows are expanded in full, else with the largest share."""
        passages, _ = choose_passages(question, num_passages=self.settings.num_passages, rng=random.Random(0))
        prompt = self.builder.build(question.question, passages, system=question.system, history=question.history)
        share = 1.0 if self.settings.full_share else self.settings.expand_range[1]
        count = int(share * len(prompt.chunks) + 1e-9)
        return num_slots(prompt, [place < count for place in range(len(prompt.chunks))]) + len(answer_ids(self.model.tokenizer, self.builder, question.answers[0], max_tokens=self.settings.max_answer_tokens))

    def _mask(self, prompt: Prompt, question: Question, gold: list[bool] | None, rng: random.Random) -> tuple[list[bool], str]:
        shares = self.settings
        how = rng.choices(
            ("full", "none", "gold", "some"),
            weights=(shares.full_share, shares.none_share, shares.gold_share, 1 - shares.full_share - shares.none_share - shares.gold_share),
        )[0]
        if how in ("full", "none"):
            return [how == "full"] * len(prompt.chunks), how
        if how == "gold":
            return answer_chunks(prompt, question.answers, gold), how
        count = int(rng.uniform(*shares.expand_range) * len(prompt.chunks) + 1e-9)
        expanded = set(rng.sample(range(len(prompt.chunks)), k=count))
        return [place in expanded for place in range(len(prompt.chunks))], how


def run(settings: SftSettings) -> dict[str, Any]:
    """Train, or go on, and write `model/`; returns the result that result.json holds.

    Raises InputError for settings and data that cannot be trained with, NonFiniteLossError when the loss stops being a number.
    """
    return fit(settings, "sft", prepare)


def prepare(model: RefragModel, settings: SftSettings) -> StageData:
    """Everything but the policy is trained; returns the data."""
    freeze(model.policy)
    if settings.streaming:
        raise InputError("Fine-tuning reads its questions whole, --streaming is for documents: leave it out.")
    loaded = load(settings, "questions")
    num_steps = steps_of(settings, len(loaded.train))
    train = QuestionBatches(model, loaded.train, settings, num_items=num_steps * items_per_step(settings))
    evaluation = None
    if len(loaded.evaluation) and settings.eval_rows:
        held_out, num_rows = replace(settings, seed=settings.seed + 1), min(settings.eval_rows, len(loaded.evaluation))
        evaluation = QuestionBatches(model, loaded.evaluation, held_out, num_items=-(-num_rows // settings.batch_size), num_rows=num_rows)
    counts = loaded.counts | count_losses(train.questions, model.tokenizer, train.builder, num_passages=settings.num_passages, max_answer_tokens=settings.max_answer_tokens)
    longest = max(train.questions, key=lambda question: sum(len(passage.text) for passage in question.passages))
    check_positions(model, train.most_slots(longest), f"--num-passages (row {longest.id})")
    logger.info("data: %s", ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in counts.items()))
    return StageData(train, evaluation, num_steps, counts, loaded.fingerprint)


def count_losses(questions: Sequence[Question], tokenizer: Any, builder: PromptBuilder, *, num_passages: int, max_answer_tokens: int) -> dict[str, int]:
    """Questions to train on that lose something: gold passages beyond `num_passages`, the end of the answer; and those that have no passage."""
    counts = {"fewer_gold_passages": 0, "cut_answers": 0, "without_passages": 0}
    for question in questions:
        counts["fewer_gold_passages"] += sum(question.gold or ()) > num_passages
        counts["cut_answers"] += len(answer_ids(tokenizer, builder, question.answers[0], max_tokens=max_answer_tokens + 1)) > max_answer_tokens
        counts["without_passages"] += not (question.passages or any(turn.passages for turn in question.history))
    return counts
