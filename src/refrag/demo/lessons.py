"""What the bundled model is trained on: batches of almanac cases, each a pure function of (seed, step).

A curriculum is data: phases, and in each what cases look like. Exact resume follows.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset

from ..encoder import encoder_inputs
from ..layout import IGNORED, PADDING, Layout, lay_out
from ..model import RefragModel
from ..text import Chunk, Passage, Prompt, PromptBuilder
from .almanac import Case, Kind, Question, make_case

CONTEXT_WEIGHT = 0.1
"""Loss weight of a token of the passages, against 1 for a token of an answer."""

ROUND = 64
"""Batches are padded to multiples of this."""



class Phase(NamedTuple):
    """A stretch of training and the cases it draws."""

    until: int
    """Last step."""
    sizes: dict[int, float]
    """Passages of a case: weight."""
    rivals: float = 0.0
    """Share of cases in which each passage is another entity's, all with the same relations."""
    brief: float = 0.0
    """Share of batches without filler sentences."""


READING = (
    Phase(540, {1: 0.5, 2: 0.5}),
    Phase(1080, {1: 0.2, 2: 0.5, 4: 0.3}),
    Phase(1750, {2: 0.3, 4: 0.4, 8: 0.3}),
    Phase(3000, {2: 0.6, 3: 0.4}, rivals=0.8, brief=1.0),
    Phase(3250, {2: 0.2, 3: 0.4, 4: 0.4}, rivals=1.0, brief=1.0),
    Phase(3700, {2: 0.2, 4: 0.6, 8: 0.2}, rivals=0.6, brief=0.6),
    Phase(10**9, {1: 0.05, 2: 0.15, 4: 0.3, 8: 0.5}, rivals=0.2),
)
"""The phases of the bundled decoder; citations, guidance and the rope base came in on the way (docs/log.md). The first three phases taught it to match the relation, and it took any entity's
answer; passages that differ in nothing but the name taught it the name."""

MIXED = (
    Phase(200, {2: 0.5, 4: 0.5}, rivals=0.3, brief=0.3),
    Phase(600, {2: 0.2, 4: 0.5, 8: 0.3}, rivals=0.3),
    Phase(10**9, {1: 0.05, 2: 0.15, 4: 0.3, 8: 0.5}, rivals=0.2),
)


@dataclass(frozen=True)
class Lesson:
    """A prompt and what follows it: answers, each ended by EOS, and further questions about the same passages."""

    prompt: Prompt
    completion: list[int]
    answers: list[int]
    """One entry a token of the completion: 0 for a question's token, n for a token of the n-th answer."""
    segments: list[int]
    """One entry a token of prompt (every chunk expanded) and completion: 0 for the context, n for the n-th question and its answer."""


def cited(question: Question) -> str:
    """The answer as the model is to give it: the numbers of the passages it rests on, in the order of the hops, then the words."""
    return "".join(f"[{position + 1}]" for position in question.gold) + f" {question.answer}"


class Lessons:
    """Turns cases into lessons with one tokenizer."""

    def __init__(self, tokenizer: Any, chunk_size: int) -> None:
        self.builder = PromptBuilder(tokenizer, chunk_size=chunk_size)
        self.tokenizer = tokenizer

    def lesson(self, case: Case, max_questions: int = 20) -> Lesson:
        """All questions of a case in one row: the passages are read once and asked about many times."""
        questions = case.questions[:max_questions]
        prompt = self.builder.build(questions[0].text, case.passages)
        texts = [f"Question: {question.text}\nAnswer:" for question in questions[1:]] + [cited(question) for question in questions]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        asked, answered = [[], *ids[: len(questions) - 1]], ids[len(questions) - 1 :]
        completion, answers = [], []
        num_asked = len(self.tokenizer(f"Question: {questions[0].text}\nAnswer:", add_special_tokens=False)["input_ids"])
        segments = [0] * (len(prompt.token_ids()) - num_asked) + [1] * num_asked
        for number, (question_ids, answer_ids) in enumerate(zip(asked, answered, strict=True), start=1):
            completion += [*question_ids, *answer_ids, self.tokenizer.eos_token_id]
            answers += [0] * len(question_ids) + [number] * (len(answer_ids) + 1)
            segments += [number] * (len(question_ids) + len(answer_ids) + 1)
        return Lesson(prompt, completion, answers, segments)


def draw_cases(seed: int, step: int, *, phases: Sequence[Phase], batch_passages: int) -> list[Case]:
    """The cases of one step: as many of one size as together have about `batch_passages` passages, twice that if brief."""
    rng = random.Random(f"lesson-{seed}-{step}")
    phase = next(phase for phase in phases if step < phase.until)
    size = rng.choices(list(phase.sizes), weights=list(phase.sizes.values()))[0]
    brief = rng.random() < phase.brief
    kinds: list[Kind] = ["one-hop"] if size < 2 else ["one-hop", "one-hop", "two-hop", "two-hop", "unanswerable"]
    count = max(1, batch_passages * (2 if brief else 1) // size)
    cases = []
    for i in range(count):
        rivals = rng.random() < phase.rivals
        kind = rng.choice(("one-hop", "one-hop", "one-hop", "unanswerable") if rivals else kinds)
        cases.append(make_case(f"{seed}-{step}-{i}", num_passages=size, kind=kind, rivals=rivals, brief=brief))
    return cases


class ReadingSteps(Dataset):
    """Decoder pre-training: item i is the batch of step i, full text, next-token loss on passages (light) and answers."""

    def __init__(self, lessons: Lessons, *, num_steps: int, seed: int = 0, batch_passages: int = 32) -> None:
        self.lessons, self.num_steps, self.seed, self.batch_passages = lessons, num_steps, seed, batch_passages

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        cases = draw_cases(self.seed, step, phases=READING, batch_passages=self.batch_passages)
        lessons = [self.lessons.lesson(case) for case in cases]
        rows = [(lesson.prompt.token_ids(), lesson) for lesson in lessons]
        width = -(-max(len(ids) + len(lesson.completion) for ids, lesson in rows) // ROUND) * ROUND
        input_ids = torch.full((len(rows), width), self.lessons.tokenizer.pad_token_id)
        labels, answers, segments = torch.full_like(input_ids, IGNORED), torch.zeros_like(input_ids), torch.zeros_like(input_ids)
        weights = torch.zeros(input_ids.shape)
        for row, (ids, lesson) in enumerate(rows):
            start, end = len(ids), len(ids) + len(lesson.completion)
            input_ids[row, :end] = torch.tensor(ids + lesson.completion)
            labels[row, :end] = input_ids[row, :end]
            answers[row, start:end] = torch.tensor(lesson.answers)
            segments[row, :end] = torch.tensor(lesson.segments)
            weights[row, :start] = CONTEXT_WEIGHT
            weights[row, start:end] = (answers[row, start:end] > 0).float()
        return {"input_ids": input_ids, "labels": labels, "loss_weights": weights, "answers": answers, "segments": segments, "name": f"read-{len(cases[0].passages)}"}


def layout_batch(model: RefragModel, prompts: list[Prompt], masks: list[list[bool]], **targets: Any) -> dict[str, Any]:
    """What `RefragModel.forward` takes for right-padded rows: the layout, and the encoder's inputs where a chunk is compressed.

    Slots and chunks are padded to round numbers: kernels are compiled once per shape.
    """
    layout = lay_out(prompts, masks, padding_side="right", **targets)
    extra = -layout.source.shape[1] % ROUND
    source, labels = nn.functional.pad(layout.source, (0, extra), value=PADDING), nn.functional.pad(layout.labels, (0, extra), value=IGNORED)
    batch: dict[str, Any] = {"layout": replace(layout, source=source, labels=labels, num_chunks=0), "labels": labels}
    if all(map(all, masks)):
        return batch
    texts = [text for prompt in prompts for text in prompt.chunk_texts()]
    ids, mask = encoder_inputs(model.encoder, model.encoder_tokenizer, texts + [""] * (-len(texts) % ROUND))
    batch["layout"] = replace(batch["layout"], num_chunks=len(ids))
    return batch | {"encoder_input_ids": ids, "encoder_attention_mask": mask}


class ReconstructionSteps(Dataset):
    """Reconstruction (paper section 2): L chunk vectors in, all their tokens out; L grows 1, 2, 4, 8 over training.

    Half of the single chunks are of double length: a question, which the policy compares with chunks, is as long.
    """

    sizes = (1, 2, 4, 8)

    def __init__(self, model: RefragModel, *, num_steps: int, seed: int = 0, batch_chunks: int = 128) -> None:
        self.model, self.num_steps, self.seed, self.batch_chunks = model, num_steps, seed, batch_chunks
        self.builder = PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size)
        self.long_builder = PromptBuilder(model.tokenizer, chunk_size=2 * model.config.chunk_size)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        rng = random.Random(f"reconstruction-{self.seed}-{step}")
        allowed = self.sizes[: 1 + int(len(self.sizes) * step / self.num_steps)]
        size = rng.choice((allowed[-1], *allowed))
        passages = (p for n in range(1000) for p in make_case(f"reconstruction-{self.seed}-{step}-{n}").passages)
        builder = self.long_builder if size == 1 and rng.random() < 0.5 else self.builder
        prompts = [self._prompt(rng, next(passages), size, builder=builder) for _ in range(self.batch_chunks // size)]
        completions = [[token for chunk in prompt.chunks for token in chunk.token_ids] for prompt in prompts]
        name = f"reconstruct-{size}" + ("-long" if builder is self.long_builder else "")
        return layout_batch(self.model, prompts, [[False] * len(p.chunks) for p in prompts], completions=completions) | {"name": name}

    def _prompt(self, rng: random.Random, passage: Passage, size: int, *, builder: PromptBuilder) -> Prompt:
        """BOS and `size` consecutive chunks of one passage."""
        text = builder.chunk(passage.text)
        first = rng.randrange(max(1, len(text.spans) - size + 1))
        chunks = tuple(
            Chunk(n, 0, *text.spans[at], text.token_ids[at * text.chunk_size : (at + 1) * text.chunk_size])
            for n, at in enumerate(range(first, min(first + size, len(text.spans))))
        )
        return Prompt(((builder.tokenizer.bos_token_id,), *chunks), chunks, (passage,))


class MixedSteps(Dataset):
    """Next-token training on mixed inputs: item i is the batch of step i; loss on answers, some chunks left as tokens.

    A batch is fed whole as tokens (a share `full`, so that reading full text is not forgotten), whole as vectors, or as
    vectors but for a random share of chunks and, in half of these batches, the chunks that hold answers. Every fifth
    batch is a reconstruction, which keeps the vectors faithful now that the decoder moves too.
    """

    def __init__(self, model: RefragModel, *, num_steps: int, seed: int = 1, batch_passages: int = 32, full: float = 0.25) -> None:
        self.model, self.num_steps, self.seed, self.batch_passages, self.full = model, num_steps, seed, batch_passages, full
        self.lessons = Lessons(model.tokenizer, model.config.chunk_size)
        self.reconstruction = ReconstructionSteps(model, num_steps=num_steps, seed=seed)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        if step % 5 == 4:
            return self.reconstruction[step]
        cases = draw_cases(self.seed, step, phases=MIXED, batch_passages=self.batch_passages)
        rng = random.Random(f"mixed-{self.seed}-{step}")
        how = rng.choices(("full", "none", "some", "gold"), weights=(self.full, 0.3, 0.15, 0.3))[0]
        lessons = [self.lessons.lesson(case) for case in cases]
        masks = [self._expand(rng, how, lesson.prompt, case) for lesson, case in zip(lessons, cases, strict=True)]
        batch = self.batch(lessons, masks)
        return batch | {"held": held_by(batch["layout"], lessons, cases), "name": f"{how}-{len(cases[0].passages)}"}

    def _expand(self, rng: random.Random, how: str, prompt: Prompt, case: Case) -> list[bool]:
        share = {"full": 1.0, "none": 0.0}.get(how, rng.choice((0.05, 0.1, 0.2)))
        mask = [rng.random() < share for _ in prompt.chunks]
        if how == "gold":
            asked = rng.sample(case.questions, k=max(1, len(case.questions) // 4))
            mask = [old or gold for old, gold in zip(mask, answer_chunks(prompt, asked), strict=True)]
        return mask

    def batch(self, lessons: list[Lesson], masks: list[list[bool]]) -> dict[str, Any]:
        """What the model's forward takes, with labels on the answers."""
        labels = [[token if n else IGNORED for token, n in zip(x.completion, x.answers, strict=True)] for x in lessons]
        batch = layout_batch(self.model, [x.prompt for x in lessons], masks, completions=[x.completion for x in lessons], labels=labels)
        answers, segments = torch.zeros_like(batch["labels"]), torch.zeros_like(batch["labels"])
        for row, (lesson, slots) in enumerate(zip(lessons, batch["layout"].num_slots, strict=True)):
            answers[row, slots - len(lesson.completion) : slots] = torch.tensor(lesson.answers)
            asked = lesson.segments[lesson.segments.index(1) :]
            segments[row, slots - len(asked) : slots] = torch.tensor(asked)
        return batch | {"answers": answers, "segments": segments}


def held_by(layout: Layout, lessons: list[Lesson], cases: list[Case]) -> torch.Tensor:
    """[pair 3]: row, number of a question, slot of a compressed chunk that holds (part of) its answer."""
    pairs, offset = [], len(layout.token_ids)
    for row, (lesson, case) in enumerate(zip(lessons, cases, strict=True)):
        slot_of = {source - offset: slot for slot, source in enumerate(layout.source[row].tolist()) if source >= offset}
        first = sum(len(other.prompt.chunks) for other in lessons[:row])
        for number in range(1, max(lesson.segments) + 1):
            marked = answer_chunks(lesson.prompt, [case.questions[number - 1]])
            pairs += [(row, number, slot_of[first + at]) for at, held in enumerate(marked) if held and first + at in slot_of]
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 3)


def answer_chunks(prompt: Prompt, questions: Sequence[Question]) -> list[bool]:
    """Which chunks overlap the answer of one of the questions."""
    spans = [(question.gold[-1], *question.span) for question in questions if question.span]
    return [any(chunk.passage == passage and chunk.start < end and start < chunk.end for passage, start, end in spans) for chunk in prompt.chunks]


class PolicySteps(Dataset):
    """Supervised start of the policy: item i holds one case's chunk vectors and, a row a question, which chunks hold its evidence."""

    def __init__(self, model: RefragModel, *, num_steps: int, seed: int = 3) -> None:
        self.model, self.num_steps, self.seed = model, num_steps, seed
        self.builder = PromptBuilder(model.tokenizer, chunk_size=model.config.chunk_size)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        case = make_case(f"policy-{self.seed}-{step}", num_passages=(8, 8, 4, 2)[step % 4], kind=("one-hop", "two-hop")[step % 3 == 0])
        questions = [question for question in case.questions if question.gold]
        prompt = self.builder.build(questions[0].text, case.passages)
        vectors = self.model.encode(prompt.chunk_texts() + [question.text for question in questions])
        chunks, asked = vectors[: len(prompt.chunks)], vectors[len(prompt.chunks) :]
        rows = len(questions)
        return {
            "chunk_embeds": chunks.expand(rows, -1, -1),
            "chunk_mask": torch.ones(rows, len(chunks), dtype=torch.bool),
            "question_embeds": asked,
            "passage_index": torch.tensor([chunk.passage for chunk in prompt.chunks]).expand(rows, -1),
            "gold": torch.tensor([answer_chunks(prompt, evidence(case, question)) for question in questions]),
        }


def evidence(case: Case, question: Question) -> list[Question]:
    """The question itself and, for two hops, the first hop: the question about the bridge passage whose answer names the second."""
    if question.kind != "two-hop":
        return [question]
    first = question.relation.split(".")[0]
    return [question, *(other for other in case.questions if other.kind == "one-hop" and other.gold == question.gold[:1] and other.relation == first)]
