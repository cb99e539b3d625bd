"""The questions of a measurement, and the passages that every system reads: a row's own, or retrieved, by a strong or a weak retriever."""

import logging
import random
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from ..config import IndexSettings
from ..data.rows import Question, answer_spans, content_of, question_of
from ..data.sources import find_sources
from ..errors import InputError
from ..index import Hit, PassageIndex, SentenceEncoder
from ..text import Passage
from .tasks import Progress, QaSettings, QuestionSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """A question with the passages that every system reads, best first."""

    question: Question
    passages: tuple[Passage, ...]
    gold: frozenset[str]
    """Ids of the passages read that hold the answer: by the row's marks, else because an answer stands in them, as of those of earlier turns."""

    @property
    def read(self) -> tuple[Passage, ...]:
        """All passages of the prompt: those that earlier turns brought stand before."""
        return (*_earlier(self.question), *self.passages)


def read_questions(settings: QuestionSettings) -> tuple[list[Question], dict[str, int]]:
    """The questions of `settings.data`, at most `limit`, and the numbers of `rows` read and `bad` ones left out.

    Raises NotFoundError for data that is not there, InputError for a row that cannot be used and for no rows at all.
    """
    sources = find_sources(settings.data, "questions", streaming=False)
    rows = (pair for source in sources for pair in source.read())
    return take_questions(rows, settings)


def take_questions(rows: Iterable[tuple[str, Any]], settings: QuestionSettings) -> tuple[list[Question], dict[str, int]]:
    """As `read_questions`, of (place, row) pairs that are at hand."""
    questions, problems = [], []
    for place, row in rows:
        try:
            if isinstance(row, InputError):
                raise row
            question = question_of(row, place, bare=True)
            content_of(question, place)  # refuses half characters, which no tokenizer takes
            questions.append(question)
        except InputError as error:
            if not settings.skip_bad:
                raise
            problems.append(str(error))
    if not questions:
        why = f", all {len(problems)} rows are bad, the first: {problems[0]}" if problems else f", {', '.join(settings.data[:3])} has none: check --data."
        raise InputError(f"The data must have one question or more{why}")
    if problems:
        logger.warning("%d of %d rows are left out, the first: %s", len(problems), len(questions) + len(problems), problems[0])
    counts = {"rows": len(questions) + len(problems), "bad": len(problems)}
    if settings.limit is not None and settings.limit < len(questions):
        chosen = sorted(random.Random(settings.seed).sample(range(len(questions)), settings.limit))
        questions = [questions[place] for place in chosen]
    return questions, counts | {"questions": len(questions), "unanswerable": sum(not question.answerable for question in questions)}


# ── what is searched ─────────────────────────────────────────────────────────────────────────────────────────────────


def content_id(passage: Passage) -> str:
    """An id made of title and text: equal for equal passages of different rows, different for ids that only count within a row."""
    return sha256(f"{passage.title}\0{passage.text}".encode(errors="surrogatepass")).hexdigest()[:16]


@contextmanager
def searched_index(model: Any, questions: Sequence[Question], settings: QuestionSettings) -> Generator[PassageIndex | None]:
    """The index that passages are retrieved from: of `--index`, one made of all rows' passages for `--pool`, else none."""
    if settings.index is not None:
        yield PassageIndex.open(settings.index, model=model)
        return
    if not settings.pool:
        yield None
        return
    passages = {content_id(own): replace(own, id=content_id(own)) for question in questions for own in question.passages if own.text.strip()}
    if not passages:
        raise InputError("The rows have no passages to put in a pool: give data with passages, or an --index.")
    with tempfile.TemporaryDirectory(prefix="refrag-eval-") as folder:
        index = PassageIndex.create(Path(folder) / "index", model, IndexSettings(retriever=settings.sentence_encoder))
        logger.info("indexing the %d passages of %d questions", len(passages), len(questions))
        index.add(passages.values())
        yield index


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────────────────────


def draw_passages(questions: Sequence[Question], settings: QaSettings, index: PassageIndex | None, *, progress: Progress | None = None) -> list[Asked]:
    """Each question with its passages. Raises InputError where no row has any and nothing is searched."""
    if index is None and not any(question.passages for question in questions):
        raise InputError("The rows have no passages to answer from: give --index FOLDER to retrieve them.")
    asked = []
    encoder = SentenceEncoder(settings.sentence_encoder) if settings.rank else None
    for number, question in enumerate(questions):
        rng = random.Random(f"passages-{settings.seed}-{number}")
        passages = own_passages(question, settings, rng) if index is None else retrieved_passages(question, settings, index, rng)
        passages = passages if encoder is None else ranked(passages, question, encoder)
        gold = {own.id for own in passages if is_gold(own, question)}
        gold |= {own.id for own in _earlier(question) if question.answerable and answer_spans(own.text, question.answers)}
        asked.append(Asked(question, tuple(passages), frozenset(gold)))
        if progress is not None and (index is not None or encoder is not None):
            progress("retrieving", number + 1, len(questions))
    return asked


def _earlier(question: Question) -> list[Passage]:
    return [own for turn in question.history for own in turn.passages if isinstance(own, Passage)]


def own_passages(question: Question, settings: QaSettings, rng: random.Random) -> list[Passage]:
    """At most `num_passages` of the row's passages, in the row's order: gold ones before others (strong), or any (weak)."""
    places = range(len(question.passages))
    if settings.retriever == "weak":
        chosen = rng.sample(places, min(settings.num_passages, len(places)))
    else:
        chosen = sorted(places, key=lambda place: question.gold is not None and not question.gold[place])[: settings.num_passages]
    return _distinct(question.passages[place] for place in sorted(chosen))


def ranked(passages: Sequence[Passage], question: Question, encoder: SentenceEncoder) -> list[Passage]:
    """The passages by similarity to the question, the most similar first; equal ones keep their order."""
    if not passages:
        return []
    scores = encoder.encode_passages(passages) @ encoder.encode_question(question.question)
    return [passages[place] for place in np.argsort(-scores, kind="stable")]


def _distinct(passages: Iterable[Passage]) -> list[Passage]:
    """Passages whose ids differ: citations and traces are told apart by them."""
    seen: set[str] = set()
    kept = []
    for passage in passages:
        kept.append(replace(passage, id=f"{passage.id} ({len(kept) + 1})") if passage.id in seen else passage)
        seen.add(kept[-1].id)
    return kept


def retrieved_passages(question: Question, settings: QaSettings, index: PassageIndex, rng: random.Random) -> list[Passage]:
    """The best `num_passages`, or as many drawn from the best `weak_depth`, in the order of their ranks."""
    if settings.retriever == "strong":
        return [hit.passage for hit in search(index, question, settings.num_passages, settings.mode)]
    hits = search(index, question, settings.weak_depth, settings.mode)
    places = sorted(rng.sample(range(len(hits)), min(settings.num_passages, len(hits))))
    return [hits[place].passage for place in places]


def search(index: PassageIndex, question: Question, top_k: int, mode: str) -> list[Hit]:
    """The index's search; what it refuses, such as a question beyond its encoder's window, is said with the row."""
    try:
        return index.search(question.question, top_k=top_k, mode=mode)
    except InputError as error:
        raise InputError(f"The row {question.id!r} cannot be searched for: {error}") from error


def gold_passages(question: Question) -> list[Passage] | None:
    """The row's passages that are marked gold; None where it has no marks."""
    if question.gold is None or not any(question.gold):
        return None
    return [passage for passage, gold in zip(question.passages, question.gold, strict=True) if gold]


def gold_number(passage: Passage, question: Question) -> int | None:
    """Which of the row's gold passages this is, or is a piece of; without marks 0 where an answer stands in it; else None."""
    if not question.answerable:
        return None
    marked = gold_passages(question)
    if marked is None:
        return 0 if answer_spans(passage.text, question.answers) else None
    text = passage.text.strip()
    return next((number for number, own in enumerate(marked) if text and (text in own.text or (own.text.strip() and own.text in passage.text))), None)


def is_gold(passage: Passage, question: Question) -> bool:
    """Whether a passage holds the answer."""
    return gold_number(passage, question) is not None


def evidence(entries: Sequence[dict[str, Any]], asked: Asked) -> Iterator[dict[str, Any]]:
    """The trace's entries whose chunk overlaps a place where an answer stands in a gold passage."""
    spans = {passage.id: answer_spans(passage.text, asked.question.answers) for passage in asked.read if passage.id in asked.gold}
    for entry in entries:
        if any(entry["start"] < end and start < entry["end"] for start, end in spans.get(entry["passage_id"], ())):
            yield entry
