"""The almanac: a seeded generator of a closed invented world, so that an answer can only come from the passages.

A `Case` is a context of passages and the questions it answers. Distractors compete: the passages of a context come from a
few entities of one kind, two passages each, so that beside the passage that holds the answer others state the same
relation of other entities, and one states other relations of the same entity. Names are split by hash into a training
and a held-out world; each is far larger than what a run can see, and facts are drawn afresh for every case.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ..text import Passage
from . import forms

Split = Literal["train", "held-out", "held-out-forms"]
"""`held-out`: new names; `held-out-forms`: new names, and sentence and question forms that training never showed."""

UNKNOWN = "unknown"
"""The answer to a question whose passage is not there."""

Kind = Literal["one-hop", "two-hop", "unanswerable"]

Length = Literal["brief", "usual", "long"]
LENGTHS: dict[Length, dict[int, int]] = {"brief": {0: 1}, "usual": {40: 70, 55: 20, 75: 8, 110: 2}, "long": {90: 1, 110: 1, 130: 1}}
"""Least words of a passage: weight. Usual passages have 40 to 150 words, long ones 90 to 150; brief ones hold nothing but facts."""


@dataclass(frozen=True)
class Question:
    """A question about a case, with the passage (by position) and characters that hold the answer."""

    text: str
    answer: str
    kind: Kind
    relation: str
    gold: tuple[int, ...] = ()
    """Positions of the passages that hold the answer; two for a two-hop question (bridge first), none if unanswerable."""
    span: tuple[int, int] | None = None
    """Characters of the answer in the last gold passage."""
    bridge: str = ""
    """The answer of the first of two hops: the name that leads to the last gold passage."""
    bridge_span: tuple[int, int] | None = None
    """Characters of the bridge in the first gold passage."""

    @property
    def hops(self) -> tuple[tuple[int, int, int], ...]:
        """(passage, start, end) of the words that each hop finds, in order; empty if unanswerable."""
        spans = [span for span in (self.bridge_span, self.span) if span is not None]
        return tuple((passage, *span) for passage, span in zip(self.gold, spans, strict=True))


@dataclass(frozen=True)
class Case:
    """Passages in the order of the context, and the questions that can be asked about them."""

    passages: tuple[Passage, ...]
    questions: tuple[Question, ...]


@dataclass
class _Draft:
    """A passage being written: its subject, the facts it states, and later its text with the answers' characters."""

    kind: str
    subject: str
    facts: dict[str, str]
    text: str = ""
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)


def _is_held_out(word: str) -> bool:
    return hashlib.sha256(word.encode()).digest()[0] % 5 == 0


@cache
def name_words(kind: str, held_out: bool) -> tuple[str, ...]:
    """All invented words of a kind (town, river, person, given, company, ship) on one side of the split."""
    ends = forms.NAME_ENDS[kind]
    words = [start + middle + end for start in forms.NAME_STARTS for middle in ("", *forms.NAME_MIDDLES) for end in ends]
    return tuple(word for word in words if _is_held_out(word) == held_out)


class _Writer:
    """Draws names, facts and sentences for one case."""

    def __init__(self, rng: random.Random, split: Split, *, lengths: dict[int, int]) -> None:
        self.rng, self.lengths = rng, lengths
        self.held_out_names = split != "train"
        self.held_out_forms = split == "held-out-forms"
        self.used: set[str] = set()

    def name(self, kind: str) -> str:
        """A name not yet used in this case; a person has a given name too."""
        while True:
            words = (["given"] if kind == "person" else []) + [kind]
            name = " ".join(self.rng.choice(name_words(word, self.held_out_names)) for word in words)
            if name not in self.used:
                self.used.add(name)
                return name

    def answer(self, what: str) -> str:
        """A fresh answer of a relation's type."""
        if what == "year":
            return str(self.rng.randrange(1400, 2000))
        if what == "number":
            return str(self.rng.randrange(100, 1400))
        if what in forms.WORDS:
            return self.rng.choice(forms.WORDS[what])
        return self.name(what)

    def form(self, options: tuple[str, ...], *, held_out: int = forms.NUM_HELD_OUT_FORMS) -> str:
        cut = len(options) - held_out
        return self.rng.choice(options[cut:] if self.held_out_forms else options[:cut])

    def facts(self, kind: str) -> dict[str, str]:
        return {name: self.answer(relation.answer) for name, relation in forms.RELATIONS[kind].items()}

    def filler(self, draft: _Draft) -> str:
        sentence = self.rng.choice(forms.FILLERS[draft.kind]).replace("{s}", draft.subject)
        for slot, words in (("{adj}", forms.ADJECTIVES), ("{place}", forms.PLACES), ("{season}", forms.SEASONS)):
            while slot in sentence:
                sentence = sentence.replace(slot, self.rng.choice(words), 1)
        return sentence

    def write(self, draft: _Draft) -> None:
        """Turn the draft's facts into at least as many words as are drawn, remembering where each answer stands."""
        sentences: list[tuple[str | None, str]] = []
        for relation, answer in draft.facts.items():
            statement = self.form(forms.RELATIONS[draft.kind][relation].statements)
            subject = draft.subject if self.rng.random() < 0.75 else forms.NOUN_PHRASES[draft.kind]
            sentences.append((relation, statement.replace("{s}", subject).replace("{a}", answer)))
        goal = self.rng.choices(tuple(self.lengths), weights=tuple(self.lengths.values()))[0]
        while sum(len(sentence.split()) for _, sentence in sentences) < goal:
            filler = self.filler(draft)
            if all(filler != sentence for _, sentence in sentences):
                sentences.append((None, filler))
        self.rng.shuffle(sentences)
        for relation, sentence in sentences:
            sentence = sentence[0].upper() + sentence[1:]
            if relation is not None:
                answer = draft.facts[relation]
                start = len(draft.text) + (1 if draft.text else 0) + sentence.index(answer)
                draft.spans[relation] = (start, start + len(answer))
            draft.text += (" " if draft.text else "") + sentence

    def shares(self, kind: str) -> tuple[list[str], list[str]]:
        """The relations of a kind, two for one passage and three for the other."""
        relations = self.rng.sample(list(forms.RELATIONS[kind]), k=len(forms.RELATIONS[kind]))
        cut = self.rng.choice((2, 3))
        return relations[:cut], relations[cut:]

    def drafts(self, kind: str, subject: str | None = None, *, shares: tuple[list[str], list[str]] | None = None) -> list[_Draft]:
        """The two passages of one entity: its relations shared out, as given or at random."""
        subject = subject or self.name(kind)
        facts = self.facts(kind)
        pair = [_Draft(kind, subject, {relation: facts[relation] for relation in share}) for share in shares or self.shares(kind)]
        for draft in pair:
            self.write(draft)
        return pair


def _questions(writer: _Writer, drafts: list[_Draft], absent: list[_Draft]) -> list[Question]:
    """Every one-hop question that the drafts answer, and those of the absent drafts as unanswerable ones."""
    questions = []
    for position, draft in enumerate(drafts):
        for relation, answer in draft.facts.items():
            text = writer.form(forms.RELATIONS[draft.kind][relation].questions).replace("{s}", draft.subject)
            questions.append(Question(text, answer, "one-hop", relation, (position,), draft.spans[relation]))
    for draft in absent:
        for relation in draft.facts:
            text = writer.form(forms.RELATIONS[draft.kind][relation].questions).replace("{s}", draft.subject)
            questions.append(Question(text, UNKNOWN, "unanswerable", relation))
    return questions


def _chain(writer: _Writer, kind: str, first: str, bridge_kind: str, second: str) -> list[_Draft]:
    """A passage that states `first` of an entity, the one that states `second` of the entity found there, and their other passages."""
    start = writer.drafts(kind)
    gold_first = next(draft for draft in start if first in draft.facts)
    bridge = writer.drafts(bridge_kind, subject=gold_first.facts[first])
    gold_second = next(draft for draft in bridge if second in draft.facts)
    return [gold_first, gold_second, *(draft for draft in (*start, *bridge) if draft is not gold_first and draft is not gold_second)]


def _two_hop_case(writer: _Writer, num_passages: int, *, chains: bool) -> tuple[list[_Draft], list[Question]]:
    """A case around one chain of two facts: both its passages, and rivals for the second relation and the first.

    With `chains` it holds as many chains of the same two relations as there is room for.
    """
    kind, first, bridge_kind, second, question_forms = writer.rng.choice(forms.TWO_HOP)
    drafts = _chain(writer, kind, first, bridge_kind, second)
    golds = [drafts[:2]]
    if chains:
        golds += [_chain(writer, kind, first, bridge_kind, second)[:2] for _ in range(num_passages // 2 - 1)]
        drafts = [draft for pair in golds for draft in pair]
    while len(drafts) < num_passages:
        rival_kind, relation = (kind, first) if len(drafts) % 4 == 1 else (bridge_kind, second)
        drafts.append(next(draft for draft in writer.drafts(rival_kind) if relation in draft.facts))
    drafts = drafts[:num_passages]
    writer.rng.shuffle(drafts)
    questions = []
    for pair in golds:
        where = tuple(next(i for i, draft in enumerate(drafts) if draft is gold) for gold in pair)
        text = writer.form(question_forms, held_out=1).replace("{s}", pair[0].subject)
        hops = (pair[1].spans[second], pair[0].facts[first], pair[0].spans[first])
        questions.append(Question(text, pair[1].facts[second], "two-hop", f"{first}.{second}", where, *hops))
    return drafts, [*questions, *_questions(writer, drafts, [])]


def _one_kind_case(writer: _Writer, num_passages: int, *, absent: int, rivals: bool) -> tuple[list[_Draft], list[Question]]:
    """Passages of entities of one kind, two an entity; of the first `absent` entities one passage is left out, and asked about.

    With `rivals` there is one passage an entity, and all of them state the same relations: only the name tells them apart.
    """
    kind = writer.rng.choice(tuple(forms.RELATIONS))
    shares, side = writer.shares(kind), writer.rng.randrange(2)
    drafts: list[_Draft] = []
    while len(drafts) < num_passages + absent:
        drafts += [writer.drafts(kind, shares=shares)[side]] if rivals else writer.drafts(kind)
    missing = [drafts.pop(place) for place in range(absent)]
    drafts = drafts[:num_passages]
    writer.rng.shuffle(drafts)
    return drafts, _questions(writer, drafts, missing)


def make_case(
    seed: int | str,
    *,
    split: Split = "train",
    num_passages: int = 8,
    kind: Kind = "one-hop",
    length: Length = "usual",
    rivals: bool = False,
    chains: bool = False,
    absent: int = 1,
) -> Case:
    """One context and its questions, a pure function of the arguments. Questions of `kind` come first, shuffled.

    No answer of a question of `kind` stands in a title; a case in which one would is drawn again. For training only:
    `rivals` takes one passage an entity, all with the same relations; the length `brief` leaves out all sentences without a fact;
    `chains` fills a two-hop case with chains; an unanswerable case leaves out a passage of each of `absent` entities.
    """
    for attempt in range(100):
        rng = random.Random(f"{seed}/{split}/{num_passages}/{kind}/{attempt}")
        writer = _Writer(rng, split, lengths=LENGTHS[length])
        if kind == "two-hop":
            drafts, questions = _two_hop_case(writer, max(num_passages, 2), chains=chains)
        else:
            drafts, questions = _one_kind_case(writer, num_passages, absent=absent if kind == "unanswerable" else 0, rivals=rivals)
        rng.shuffle(questions)
        questions.sort(key=lambda question: question.kind != kind)
        titles = {draft.subject for draft in drafts}
        if any(question.answer in titles for question in questions if question.kind == kind):
            continue
        passages = tuple(Passage(id=f"{_digest(seed, split, kind)}-{i}", text=draft.text, title=draft.subject) for i, draft in enumerate(drafts))
        return Case(passages, tuple(questions))
    raise AssertionError("no case without an answer in a title in 100 draws")


def _digest(*parts: object) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:10]


def evaluation_cases(num_questions: int, *, split: Split = "held-out", num_passages: int = 8, length: Length = "usual", seed: int = 0) -> Iterator[tuple[Case, Question]]:
    """`num_questions` pairs of a case and its first question: of every ten, eight one-hop, one two-hop, one unanswerable."""
    kinds: tuple[Kind, ...] = ("one-hop",) * 8 + ("two-hop", "unanswerable")
    for i in range(num_questions):
        case = make_case(f"evaluation-{seed}-{i}", split=split, num_passages=num_passages, kind=kinds[i % 10], length=length)
        yield case, case.questions[0]


def cited(question: Question) -> str:
    """The answer as the model is to give it: for each hop the number of its passage, then the words found there; or `unknown`."""
    if not question.gold:
        return f" {question.answer}"
    return " ".join(f"[{position + 1}] {words}" for position, words in zip(question.gold, findings(question), strict=True))


def findings(question: Question) -> list[str]:
    """What each hop finds."""
    return [*filter(None, (question.bridge,)), question.answer]


def evaluation_rows(num_questions: int, *, cite: bool = False, **how: Any) -> Iterator[dict[str, Any]]:
    """The same questions as rows `{id, question, answers, kind, passages: [{id, title, text, is_gold}]}`.

    With `cite` the first answer is the one the bundled model is to give, citations before the words: for training.
    """
    for i, (case, question) in enumerate(evaluation_cases(num_questions, **how)):
        passages = [{"id": p.id, "title": p.title, "text": p.text, "is_gold": j in question.gold} for j, p in enumerate(case.passages)]
        answers = [cited(question).strip(), question.answer] if cite else [question.answer]
        yield {"id": str(i), "question": question.text, "answers": answers, "kind": question.kind, "passages": passages}


def write_dataset(path: Path, num_questions: int, **how: Any) -> None:
    """`evaluation_rows` as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in evaluation_rows(num_questions, **how))
