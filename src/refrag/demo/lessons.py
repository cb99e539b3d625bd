"""What the bundled model is trained on: batches of almanac cases, each a pure function of (seed, step).

A curriculum is data: phases, and in each what cases look like. Exact resume follows.
"""

import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from ..layout import IGNORED
from ..model import RefragModel
from ..text import Chunk, Passage, Prompt, PromptBuilder
from ..training.batches import ROUND, layout_batch, place_completions
from .almanac import Case, Kind, Length, Question, cited, findings, make_case

WHOLE_NUMBERS = 8
"""The almanac's tokenizer keeps the numbers [1] to [8] whole; passages with higher ones are not guided."""

CONTEXT_WEIGHT = 0.1
"""Loss weight of a token of the passages, against 1 for a token of an answer."""



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
    long: float = 0.0
    """Share of the other batches with long passages."""
    kinds: tuple[float, float, float] = (2, 2, 1)
    """Weights of one-hop, two-hop and unanswerable cases."""
    chains: float = 0.0
    """Share of the two-hop cases that are full of chains."""
    absent: int = 1
    """Most passages left out of an unanswerable case."""


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

POLISH = (
    Phase(300, {2: 0.3, 4: 0.5, 8: 0.2}, rivals=0.1, kinds=(1, 2, 1), chains=0.7, absent=2),
    Phase(10**9, {2: 0.05, 4: 0.25, 8: 0.7}, rivals=0.1, kinds=(2, 2, 1.2), chains=0.6, absent=3),
)
"""Further training, once single facts are found: chains of two facts, whose first answer is said too, and more that is not there."""

STRETCH = (Phase(10**9, {2: 0.05, 4: 0.2, 8: 0.6, 16: 0.15}, rivals=0.1, long=0.45, kinds=(2, 2, 1.2), chains=0.6, absent=3),)
"""Once eight usual passages are read well: long ones, and sixteen."""

ANSWER_WEIGHTS = {"one-hop": 1.0, "two-hop": 2.0, "unanswerable": 1.5}
"""Loss weight of an answer's tokens by kind of question: there are about ten single facts to each of the others."""


@dataclass(frozen=True)
class Lesson:
    """A prompt and what follows it: answers, each ended by EOS, and further questions about the same passages."""

    prompt: Prompt
    completion: list[int]
    answers: list[int]
    """One entry a token of the completion: 0 for a question's token, n for a token of the n-th answer."""
    segments: list[int]
    """One entry a token of prompt (every chunk expanded) and completion: 0 for the context, n for the n-th question and its answer."""
    weights: list[float]
    """Loss weight of each answer, the first at 0."""
    pointers: list[tuple[int, int, int]]
    """For each token of an answer that stands in a passage: its place in the completion, the chunk and the place in the chunk that it is copied from.

    A citation points where the first of the words that follow it does.
    """
    titles: list[int]
    """For each number of a passage, from [0] on: which title it has; 0 where there is none."""


class Lessons:
    """Turns cases into lessons with one tokenizer."""

    def __init__(self, tokenizer: Any, chunk_size: int) -> None:
        self.builder = PromptBuilder(tokenizer, chunk_size=chunk_size)
        self.tokenizer, self.chunk_size = tokenizer, chunk_size

    def lesson(self, case: Case, max_questions: int = 20) -> Lesson:
        """All questions of a case in one row: the passages are read once and asked about many times."""
        questions = case.questions[:max_questions]
        prompt = self.builder.build(questions[0].text, case.passages)
        texts = [f"Question: {question.text}\nAnswer:" for question in questions] + [cited(question) for question in questions]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"][len(questions) :]
        asked, answered = ids[: len(questions)], ids[len(questions) :]
        sources = _Sources(self.tokenizer, prompt)
        segments = [0] * (len(prompt.token_ids()) - len(asked[0])) + [1] * len(asked[0])
        completion, answers, pointers = [], [], []
        for number, (question, answer_ids) in enumerate(zip(questions, answered, strict=True), start=1):
            question_ids = asked[number - 1] if number > 1 else []
            start = len(completion) + len(question_ids)
            pointers += [(start + at, *source) for at, source in sources.of(question, offsets[number - 1])]
            completion += [*question_ids, *answer_ids, self.tokenizer.eos_token_id]
            answers += [0] * len(question_ids) + [number] * (len(answer_ids) + 1)
            segments += [number] * (len(question_ids) + len(answer_ids) + 1)
        return Lesson(prompt, completion, answers, segments, [ANSWER_WEIGHTS[question.kind] for question in questions], pointers, titles_of(case))


def titles_of(case: Case) -> list[int]:
    """`Lesson.titles` of a case."""
    known = list(dict.fromkeys(passage.title for passage in case.passages))
    titles = [known.index(passage.title) + 1 for passage in case.passages[:WHOLE_NUMBERS]]
    return [0, *titles] + [0] * (WHOLE_NUMBERS - len(titles))


class _Sources:
    """Finds where in the passages the tokens of an answer stand."""

    def __init__(self, tokenizer: Any, prompt: Prompt) -> None:
        encoded = tokenizer([passage.text for passage in prompt.passages], add_special_tokens=False, return_offsets_mapping=True)
        self.starts = [[start for start, _ in offsets] for offsets in encoded["offset_mapping"]]
        self.first = [next((chunk.index for chunk in prompt.chunks if chunk.passage == number), 0) for number in range(len(prompt.passages))]
        self.chunk_size = len(prompt.chunks[0].token_ids)

    def of(self, question: Question, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, tuple[int, int]]]:
        """(token of the answer, (chunk, place in it)); `offsets` are the characters of the answer's tokens."""
        found, end, text = [], 0, cited(question)
        for words, (passage, start, _) in zip(findings(question), question.hops, strict=bool(question.hops)):
            begin = text.index(f"] {words}", end) + 2
            end = begin + len(words)
            for at, (left, right) in enumerate(offsets):
                if left < end and right > begin:
                    token = bisect_right(self.starts[passage], start + max(left, begin) - begin) - 1
                    source = (self.first[passage] + token // self.chunk_size, token % self.chunk_size)
                    found += [(at - 1, source), (at, source)] if left <= begin else [(at, source)]
        return found


def pointer_slots(lesson: Lesson, mask: Sequence[bool], *, row: int) -> list[tuple[int, int, int]]:
    """(row, slot that predicts a token of an answer, slot that holds it: the token itself or the vector of its chunk), right-padded."""
    begins, slot = {}, 0
    for piece in lesson.prompt.pieces:
        if isinstance(piece, Chunk):
            begins[piece.index] = slot
            slot += len(piece.token_ids) if mask[piece.index] else 1
        else:
            slot += len(piece)
    return [(row, slot + at - 1, begins[chunk] + (place if mask[chunk] else 0)) for at, chunk, place in lesson.pointers]


def draw_cases(seed: int, step: int, *, phases: Sequence[Phase], batch_passages: int) -> list[Case]:
    """The cases of one step: as many of one size as together have about `batch_passages` passages, twice that if brief, half if long."""
    rng = random.Random(f"lesson-{seed}-{step}")
    phase = next(phase for phase in phases if step < phase.until)
    size = rng.choices(list(phase.sizes), weights=list(phase.sizes.values()))[0]
    length: Length = "brief" if rng.random() < phase.brief else "long" if phase.long and rng.random() < phase.long else "usual"
    names: tuple[Kind, ...] = ("one-hop", "two-hop", "unanswerable")
    count = max(1, int(batch_passages * {"brief": 2, "usual": 1, "long": 0.5}[length]) // size)
    cases = []
    for i in range(count):
        rivals = rng.random() < phase.rivals
        weights = (1, 0, 0) if size < 2 and not rivals else (3, 0, 1) if rivals else phase.kinds
        kind = rng.choices(names, weights=weights)[0]
        chains, absent = rng.random() < phase.chains, min(rng.randint(1, phase.absent), size)
        cases.append(make_case(f"{seed}-{step}-{i}", num_passages=size, kind=kind, rivals=rivals, length=length, chains=chains, absent=absent))
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
        weights, pointers = torch.zeros(input_ids.shape), []
        for row, (ids, lesson) in enumerate(rows):
            pointers += pointer_slots(lesson, [True] * len(lesson.prompt.chunks), row=row)
            start, end = len(ids), len(ids) + len(lesson.completion)
            input_ids[row, :end] = torch.tensor(ids + lesson.completion)
            labels[row, :end] = input_ids[row, :end]
            answers[row, start:end] = torch.tensor(lesson.answers)
            segments[row, :end] = torch.tensor(lesson.segments)
            weights[row, :start] = CONTEXT_WEIGHT
            weights[row, start:end] = torch.tensor(answer_weights(lesson))
        guided = {"pointers": torch.tensor(pointers).reshape(-1, 3), "titles": torch.tensor([lesson.titles for lesson in lessons])}
        batch = {"input_ids": input_ids, "labels": labels, "loss_weights": weights, "answers": answers, "segments": segments}
        return batch | guided | {"name": f"read-{len(cases[0].passages)}"}


def answer_weights(lesson: Lesson) -> list[float]:
    """One loss weight a token of the completion; 0 for a question's."""
    return [lesson.weights[n - 1] if n else 0.0 for n in lesson.answers]


def chunk_sizes(model: RefragModel) -> list[int]:
    """The sizes that a batch draws from."""
    return model.config.chunk_sizes or [model.config.chunk_size]


class ReconstructionSteps(Dataset):
    """Reconstruction (paper section 2): L chunk vectors in, all their tokens out; L grows 1, 2, 4, 8 over training.

    Half of the single chunks are of double length: a question, which the policy compares with chunks, is as long.
    """

    sizes = (1, 2, 4, 8)

    def __init__(self, model: RefragModel, *, num_steps: int, seed: int = 0, batch_chunks: int = 128) -> None:
        self.model, self.num_steps, self.seed, self.batch_chunks = model, num_steps, seed, batch_chunks
        self.builders = [PromptBuilder(model.tokenizer, chunk_size=size) for size in chunk_sizes(model)]
        self.long_builders = [PromptBuilder(model.tokenizer, chunk_size=2 * size) for size in chunk_sizes(model)]

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        rng = random.Random(f"reconstruction-{self.seed}-{step}")
        allowed = self.sizes[: 1 + int(len(self.sizes) * step / self.num_steps)]
        size = rng.choice((allowed[-1], *allowed))
        passages = (p for n in range(1000) for p in make_case(f"reconstruction-{self.seed}-{step}-{n}").passages)
        long = size == 1 and rng.random() < 0.5
        builder = rng.choice(self.long_builders if long else self.builders)
        prompts = [self._prompt(rng, next(passages), size, builder=builder) for _ in range(self.batch_chunks // size)]
        completions = [[token for chunk in prompt.chunks for token in chunk.token_ids] for prompt in prompts]
        name = f"reconstruct-{size}" + ("-long" if long else "")
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

    def __init__(self, model: RefragModel, *, num_steps: int, seed: int = 1, batch_passages: int = 32, phases: Sequence[Phase] = MIXED, full: float = 0.25) -> None:
        self.model, self.num_steps, self.seed, self.batch_passages = model, num_steps, seed, batch_passages
        self.phases, self.full = phases, full
        self.lessons = [Lessons(model.tokenizer, size) for size in chunk_sizes(model)]
        self.reconstruction = ReconstructionSteps(model, num_steps=num_steps, seed=seed)

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        if step % 5 == 4:
            return self.reconstruction[step]
        cases = draw_cases(self.seed, step, phases=self.phases, batch_passages=self.batch_passages)
        rng = random.Random(f"mixed-{self.seed}-{step}")
        how = rng.choices(("full", "none", "some", "gold"), weights=(self.full, 0.3, 0.15, 0.3))[0]
        source = rng.choice(self.lessons)
        lessons = [source.lesson(case) for case in cases]
        masks = [self._expand(rng, how, lesson.prompt, case) for lesson, case in zip(lessons, cases, strict=True)]
        batch = self.batch(lessons, masks)
        pointers = [pair for row, (lesson, mask) in enumerate(zip(lessons, masks, strict=True)) for pair in pointer_slots(lesson, mask, row=row)]
        titles = torch.tensor([lesson.titles for lesson in lessons])
        return batch | {"pointers": torch.tensor(pointers).reshape(-1, 3), "titles": titles, "name": f"{how}-{len(cases[0].passages)}"}

    def _expand(self, rng: random.Random, how: str, prompt: Prompt, case: Case) -> list[bool]:
        share = {"full": 1.0, "none": 0.0}.get(how, rng.choice((0.05, 0.1, 0.2)))
        mask = [rng.random() < share for _ in prompt.chunks]
        if how == "gold":
            asked = rng.sample(case.questions, k=max(1, len(case.questions) // 4))
            mask = [old or gold for old, gold in zip(mask, evidence_chunks(prompt, asked), strict=True)]
        return mask

    def batch(self, lessons: list[Lesson], masks: list[list[bool]]) -> dict[str, Any]:
        """What the model's forward takes, with labels on the answers."""
        labels = [[token if n else IGNORED for token, n in zip(x.completion, x.answers, strict=True)] for x in lessons]
        batch = layout_batch(self.model, [x.prompt for x in lessons], masks, completions=[x.completion for x in lessons], labels=labels)
        answers, segments = torch.zeros_like(batch["labels"]), torch.zeros_like(batch["labels"])
        weights = place_completions(batch["layout"], [answer_weights(lesson) for lesson in lessons], width=answers.shape[1])
        for row, (lesson, slots) in enumerate(zip(lessons, batch["layout"].num_slots, strict=True)):
            answers[row, slots - len(lesson.completion) : slots] = torch.tensor(lesson.answers)
            asked = lesson.segments[lesson.segments.index(1) :]
            segments[row, slots - len(asked) : slots] = torch.tensor(asked)
        return batch | {"answers": answers, "segments": segments, "loss_weights": weights}


def overlapping(prompt: Prompt, spans: Sequence[tuple[int, int, int]]) -> list[bool]:
    """Which chunks overlap one of the (passage, start, end)."""
    return [any(chunk.passage == passage and chunk.start < end and start < chunk.end for passage, start, end in spans) for chunk in prompt.chunks]


def evidence_chunks(prompt: Prompt, questions: Sequence[Question]) -> list[bool]:
    """Which chunks hold what one of the questions needs: its answer, and the bridge of two hops."""
    return overlapping(prompt, [hop for question in questions for hop in question.hops])


class PolicySteps(Dataset):
    """Supervised start of the policy: item i holds one case's chunk vectors and, a row a question, which chunks hold its evidence."""

    def __init__(self, model: RefragModel, *, num_steps: int, seed: int = 3) -> None:
        self.model, self.num_steps, self.seed = model, num_steps, seed
        self.builders = [PromptBuilder(model.tokenizer, chunk_size=size) for size in chunk_sizes(model)]

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        rng = random.Random(f"policy-{self.seed}-{step}")
        size, length = rng.choice((16, 8, 8, 8, 4, 2)), rng.choice(("usual", "usual", "long"))
        case = make_case(f"policy-{self.seed}-{step}", num_passages=size, kind=("one-hop", "two-hop")[step % 3 == 0], length=length, chains=step % 2 == 0)
        questions = [question for question in case.questions if question.gold]
        prompt = rng.choice(self.builders).build(questions[0].text, case.passages)
        vectors = self.model.encode(prompt.chunk_texts() + [question.text for question in questions])
        chunks, asked = vectors[: len(prompt.chunks)], vectors[len(prompt.chunks) :]
        rows = len(questions)
        return {
            "chunk_embeds": chunks.expand(rows, -1, -1),
            "chunk_mask": torch.ones(rows, len(chunks), dtype=torch.bool),
            "question_embeds": asked,
            "passage_index": torch.tensor([chunk.passage for chunk in prompt.chunks]).expand(rows, -1),
            "gold": torch.tensor([evidence_chunks(prompt, [question]) for question in questions]),
        }
