"""Answer quality: every system answers the same questions over the same passages with one decoder, in one run.

    questions ─▶ passages, the same for all ─▶ each system: answers, scores ─▶ one table, paired differences, fronts

A system that fails (out of memory, a prompt too long for the decoder) is marked, what it did answer is kept, and the others go on.
"""

import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..engine import Answer, Refrag, Request
from ..errors import BackendError, InputError
from ..text import Chunk
from .child import is_out_of_memory
from .metrics import ANSWER_METRICS, abstention_score, precision_recall, rouge, score_answer, scored_text
from .provenance import result, write_result
from .questions import Asked, draw_passages, evidence
from .statistics import mean_interval, median_interval, paired_difference
from .systems import request_of
from .tasks import Progress, QaSettings, System, portable_name, resolve_systems

logger = logging.getLogger(__name__)

TOLERANCE = 0.02
"""Systems count as equal in slots or in time within this share."""


@dataclass
class Outcome:
    """What one system answered: an entry a question, None where it failed."""

    system: System
    answers: list[Answer | None] = field(default_factory=list)
    scores: list[dict[str, float] | None] = field(default_factory=list)
    """Per question the ANSWER_METRICS, and rouge1, rouge2, rougeL where asked for."""
    cited: list[tuple[float | None, float | None]] = field(default_factory=list)
    """Precision and recall of the citations."""
    evidence: list[float | None] = field(default_factory=list)
    """Share of the evidence chunks that was expanded; None for questions whose evidence is not in the passages."""
    problem: str = ""
    ttft_s: list[float] = field(default_factory=list)


def run(engine: Refrag, questions: Sequence[Any], settings: QaSettings, *, counts: dict[str, int] | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Ask every system every question; the content of a results file, also written to `settings.out` after each system.

    `questions` are `data.rows.Question`s. Passages are retrieved from the engine's index where it has one, else they are the
    rows' own. Raises InputError for systems that do not exist, and where no question has passages.
    """
    systems = resolve_systems(settings, has_trained_policy=engine.model.has_trained_policy)
    asked = draw_passages(questions, settings, engine.index, progress=progress)
    values = {"complete": False, "data": describe_data(asked) | (counts or {}), **describe(engine), "systems": {}}
    if settings.prompts_out is not None:
        write_rows(settings.prompts_out, (prompt_row(one, engine) for one in asked))
    outcomes: list[Outcome] = []
    for system in systems:
        requests = [request_of(system, one, engine, settings, seed=settings.seed + number) for number, one in enumerate(asked)]
        outcomes.append(ask(engine, system, requests, settings.batch_size, progress=progress))
        score(outcomes[-1], asked, with_rouge=settings.rouge)
        values["systems"][system.name] = summarise(outcomes[-1], outcomes[0], asked, settings.seed)
        _written(values, settings)
    try:
        time_systems(engine, asked, outcomes, settings, progress=progress)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("Out of memory while the systems were timed: the times are those taken before.")
    for outcome in outcomes:
        values["systems"][outcome.system.name]["ttft_s"] = _times(outcome.ttft_s)
    if settings.answers_out is not None:
        write_rows(settings.answers_out, answer_rows(asked, outcomes))
    values |= {"points": points(values["systems"]), "comparisons": comparisons(outcomes, values["systems"], settings.seed)}
    return _written(values | {"complete": True, "examples": examples(asked, outcomes, settings.num_examples)}, settings)


def _written(values: dict[str, Any], settings: QaSettings) -> dict[str, Any]:
    """The content of the results file, written where it is wanted."""
    content = result("qa", settings=settings.portable(), values=values, seed=settings.seed)
    if settings.out is not None:
        write_result(settings.out, content)
    return content


# ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def ask(engine: Refrag, system: System, requests: Sequence[Request], batch_size: int, *, progress: Progress | None = None) -> Outcome:
    """All questions to one system. A question that cannot be asked is left out; when memory is out the system ends there."""
    outcome = Outcome(system)
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        try:
            outcome.answers += engine.answer_batch(batch)
        except (BackendError, InputError, RuntimeError, MemoryError):
            for request in batch:  # one by one, to keep what can be answered
                outcome.answers.append(_alone(engine, request, outcome))
        if outcome.problem and outcome.answers[-1] is None and outcome.problem.startswith(OUT_OF_MEMORY):
            break
        if progress is not None:
            progress(system.name, len(outcome.answers), len(requests))
    outcome.answers += [None] * (len(requests) - len(outcome.answers))
    if outcome.problem:
        failed = outcome.answers.count(None)
        logger.warning("%s: %d of %d questions were not answered, the first since: %s", system.name, failed, len(requests), outcome.problem)
    return outcome


OUT_OF_MEMORY = "Out of memory"


def _alone(engine: Refrag, request: Request, outcome: Outcome) -> Answer | None:
    if outcome.problem.startswith(OUT_OF_MEMORY):
        return None
    try:
        return engine.answer(request)
    except (BackendError, InputError, RuntimeError, MemoryError) as error:
        if not isinstance(error, InputError) and not is_out_of_memory(error):
            raise
        problem = str(error) if isinstance(error, InputError) else f"{OUT_OF_MEMORY}: {str(error).strip() or type(error).__name__}"
        outcome.problem = problem if problem.startswith(OUT_OF_MEMORY) else outcome.problem or problem
        return None


def score(outcome: Outcome, asked: Sequence[Asked], *, with_rouge: bool) -> None:
    """Fill in what the answers are worth."""
    for one, answer in zip(asked, outcome.answers, strict=True):
        if answer is None:
            outcome.scores.append(None)
            outcome.cited.append((None, None))
            outcome.evidence.append(None)
            continue
        text, question = scored_text(answer.text), one.question
        scores = score_answer(text, question.answers, answerable=question.answerable)
        if with_rouge:
            overlaps = rouge(text, question.answers)
            scores |= overlaps if question.answerable else dict.fromkeys(overlaps, abstention_score(text, question.answers))
        outcome.scores.append(scores)
        outcome.cited.append(precision_recall(answer.citations, one.gold & {passage["id"] for passage in answer.passages}))
        found = [entry["expanded"] for entry in evidence(answer.trace, one)] if outcome.system.kind == "policy" else []
        outcome.evidence.append(sum(found) / len(found) if found else None)


def time_systems(engine: Refrag, asked: Sequence[Asked], outcomes: Sequence[Outcome], settings: QaSettings, *, progress: Progress | None = None) -> None:
    """Time to first token, one request at a time, the systems in a new order each round; each is warmed up by its first request."""
    able = [outcome for outcome in outcomes if not outcome.problem]
    chosen = random.Random(settings.seed).sample(range(len(asked)), min(settings.timed_requests, len(asked)))
    order = random.Random(settings.seed + 1)

    def first_token_s(outcome: Outcome, place: int) -> float:
        request = request_of(outcome.system, asked[place], engine, settings, seed=settings.seed + place)
        return engine.answer(replace(request, generation=replace(request.generation, max_new_tokens=1))).timings["ttft_s"]

    encoding = [outcome for outcome in able if not outcome.system.is_baseline][:1]
    for done, place in enumerate(chosen):
        for outcome in encoding if done else able:  # vectors that are no longer in memory are computed before anybody is timed
            first_token_s(outcome, place)
        for outcome in order.sample(able, len(able)):
            outcome.ttft_s.append(first_token_s(outcome, place))
        if progress is not None:
            progress("timing", done + 1, len(chosen))


# ── the result ───────────────────────────────────────────────────────────────────────────────────────────────────────


def describe_data(asked: Sequence[Asked]) -> dict[str, Any]:
    """What was asked, in numbers."""
    return {
        "questions": len(asked),
        "passages_per_question": sum(len(one.passages) for one in asked) / len(asked),
        "with_gold_passage": sum(bool(one.gold) for one in asked),
        "gold_by": "marks" if any(any(one.question.gold or ()) for one in asked) else "answer strings",
    }


def describe(engine: Refrag) -> dict[str, Any]:
    """Who answered, and what its times count."""
    model, where = engine.model, "memory" if engine.index is None else "the index"
    return {
        "model": {
            "name": portable_name(str(model.name_or_path)),
            "fingerprint": model.fingerprint(),
            "chunk_size": model.config.chunk_size,
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": engine.device.type,
        },
        "ttft_counts": f"prompt, chunk vectors read from {where}, policy, prefill; not retrieval, which is the same for all systems",
    }


def summarise(outcome: Outcome, plain: Outcome, asked: Sequence[Asked], seed: int) -> dict[str, Any]:
    """One row of the table. Means have 95 % bootstrap intervals over questions; times in seconds."""
    scores = [own for own in outcome.scores if own is not None]
    answers = [answer for answer in outcome.answers if answer is not None]
    unanswerable = [own["exact_match"] for one, own in zip(asked, outcome.scores, strict=True) if own is not None and not one.question.answerable]
    tokens, slots = (sum(answer.usage[key] for answer in answers) for key in ("context_tokens", "context_slots"))
    chunks, expanded = (sum(answer.usage[key] for answer in answers) for key in ("num_chunks", "expanded_chunks"))
    return {
        "kind": outcome.system.kind,
        "policy": outcome.system.policy if outcome.system.kind == "policy" else None,
        "expand_fraction": outcome.system.expand_fraction,
        "num_questions": len(scores),
        "num_failed": len(outcome.scores) - len(scores),
        "problem": outcome.problem or None,
        "metrics": {name: interval([own[name] for own in scores], seed) for name in _measured(outcome)},
        "unanswerable_accuracy": interval(unanswerable, seed),
        "citation_precision": interval([precision for precision, _ in outcome.cited], seed),
        "citation_recall": interval([recall for _, recall in outcome.cited], seed) if any(answer.citations for answer in answers) else interval([], seed),
        "evidence_recall": interval(outcome.evidence, seed),
        "by_kind": _by_kind(outcome, asked),
        "prompt_slots": _mean([answer.usage["prompt_slots"] for answer in answers]),
        "context_tokens": _mean([answer.usage["context_tokens"] for answer in answers]),
        "context_slots": _mean([answer.usage["context_slots"] for answer in answers]),
        "compression_rate": tokens / slots if slots else 1.0,
        "expanded_share": expanded / chunks if chunks else 0.0,
        "kv_bytes": _mean([answer.usage["kv_bytes"] for answer in answers]),
        "ttft_s": None,
        "against_plain": {} if outcome is plain else {name: difference(outcome, plain, name, seed) for name in _measured(outcome)},
    }


def interval(values: Sequence[float | None], seed: int) -> dict[str, Any] | None:
    """Mean, bounds of its 95 % interval, and how many values there were; None for none."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    mean, low, high = mean_interval(present, seed=seed)
    return {"mean": mean, "low": low, "high": high, "n": len(present)}


def _measured(outcome: Outcome) -> Iterable[str]:
    """Names of the metrics of this run."""
    return next((own for own in outcome.scores if own is not None), ANSWER_METRICS)


def difference(outcome: Outcome, other: Outcome, metric: str, seed: int) -> dict[str, Any] | None:
    """Mean of `outcome` less that of `other` over the questions that both answered, with its paired interval."""
    pairs = [(own[metric], theirs[metric]) for own, theirs in zip(outcome.scores, other.scores, strict=True) if own is not None and theirs is not None]
    if not pairs:
        return None
    mean, low, high = paired_difference(*zip(*pairs, strict=True), seed=seed)
    return {"mean": mean, "low": low, "high": high, "n": len(pairs)}


def _by_kind(outcome: Outcome, asked: Sequence[Asked]) -> dict[str, dict[str, Any]]:
    kinds = sorted({one.question.kind for one in asked} - {""})
    found = {}
    for kind in kinds:
        own = [scores for one, scores in zip(asked, outcome.scores, strict=True) if scores is not None and one.question.kind == kind]
        found[kind] = {"num_questions": len(own), **{name: _mean([scores[name] for scores in own]) for name in ANSWER_METRICS}}
    return found


def _mean(values: Sequence[int | float]) -> float | None:
    return sum(values) / len(values) if values else None


def _times(values: Sequence[float]) -> dict[str, Any] | None:
    if not values:
        return None
    middle = median_interval(values)
    return {"median": middle.median, "low": middle.low, "high": middle.high, "n": len(values)}


def points(systems: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Quality against cost, a point a system: F1 against slots and against the median time to first token, and whether it lies on the front."""
    found = [
        {
            "system": name,
            "baseline": own["kind"] != "policy",
            "slots": own["prompt_slots"],
            "ttft_s": own["ttft_s"]["median"] if own["ttft_s"] else None,
            **{metric: own["metrics"][metric]["mean"] for metric in ("exact_match", "f1", "match")},
        }
        for name, own in systems.items()
        if own["num_questions"]
    ]
    for cost in ("slots", "ttft_s"):
        for point in found:
            point[f"on_{cost}_front"] = point[cost] is not None and not any(_beats(other, point, cost) for other in found)
    return found


def _beats(other: dict[str, Any], point: dict[str, Any], cost: str) -> bool:
    """No dearer and no worse, and one of the two strictly."""
    if other[cost] is None or other[cost] > point[cost] or other["f1"] < point["f1"]:
        return False
    return other[cost] < point[cost] or other["f1"] > point["f1"]


def comparisons(outcomes: Sequence[Outcome], systems: dict[str, dict[str, Any]], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Each policy against the best way without compression that costs no more: `equal_slots` and `equal_ttft`.

    The best is the one of the highest F1 among those that cost at most TOLERANCE more; so chance favours it, not the policy. Both
    costs are told (slots, seconds), since the best one measured may cost clearly less: then a system between the two is missing.
    """
    costs: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "equal_slots": lambda own: own["prompt_slots"],
        "equal_ttft": lambda own: own["ttft_s"] and own["ttft_s"]["median"],
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in costs}
    for name, cost in costs.items():
        for outcome in outcomes:
            mine = cost(systems[outcome.system.name])
            if outcome.system.is_baseline or mine is None:
                continue
            rivals = [other for other in outcomes if other.system.is_baseline and (theirs := cost(systems[other.system.name])) is not None and theirs <= mine * (1 + TOLERANCE)]
            if rivals:
                best = max(rivals, key=lambda other: systems[other.system.name]["metrics"]["f1"]["mean"])
                gaps = {metric: difference(outcome, best, metric, seed) for metric in _measured(outcome)}
                costs_of = {"cost": mine, "cost_of_other": cost(systems[best.system.name])}
                found[name].append({"system": outcome.system.name, "against": best.system.name, **costs_of, **gaps})
    return found


def examples(asked: Sequence[Asked], outcomes: Sequence[Outcome], count: int) -> list[dict[str, Any]]:
    """The first questions with the passages, and each system's answer, its scores and which chunks it expanded."""
    return [
        {
            "question": one.question.question,
            "answers": list(one.question.answers),
            "gold": sorted(one.gold),
            "passages": [{"id": passage.id, "title": passage.title, "text": passage.text} for passage in one.passages],
            "systems": {outcome.system.name: _example(outcome, number) for outcome in outcomes if outcome.answers[number] is not None},
        }
        for number, one in enumerate(asked[:count])
    ]


def _example(outcome: Outcome, number: int) -> dict[str, Any]:
    answer = outcome.answers[number]
    assert answer is not None
    trace = [{key: entry[key] for key in ("passage_id", "start", "end", "score", "expanded")} for entry in answer.trace] if outcome.system.kind == "policy" else None
    return {"text": answer.text, "citations": list(answer.citations), "scores": outcome.scores[number], "usage": answer.usage, "trace": trace}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def prompt_row(asked: Asked, engine: Refrag) -> dict[str, Any]:
    """Plain RAG's prompt in token ids, for peers that run elsewhere: what ends with the last passage, and the rest."""
    question = asked.question
    prompt = engine.builder.build(question.question, asked.passages, system=question.system, history=question.history)
    last = max((place for place, piece in enumerate(prompt.pieces, 1) if isinstance(piece, Chunk)), default=0)
    context, rest = ([token for piece in part for token in (piece.token_ids if isinstance(piece, Chunk) else piece)] for part in (prompt.pieces[:last], prompt.pieces[last:]))
    given = {"id": question.id, "question": question.question, "answers": list(question.answers), "answerable": question.answerable}
    return given | {"context_ids": context, "question_ids": rest}


def answer_rows(asked: Sequence[Asked], outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """A row a question and system."""
    for number, one in enumerate(asked):
        for outcome in outcomes:
            answer = outcome.answers[number]
            yield {
                "id": one.question.id,
                "question": one.question.question,
                "answers": list(one.question.answers),
                "system": outcome.system.name,
                "text": None if answer is None else answer.text,
                "scores": outcome.scores[number],
                "citations": None if answer is None else list(answer.citations),
            }
