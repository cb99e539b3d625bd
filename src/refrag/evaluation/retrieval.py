"""How often retrieval finds the gold passages: recall@k and the mean reciprocal rank, by meaning, by words and by both."""

import time
from collections.abc import Sequence
from typing import Any

from ..data.rows import Question
from ..errors import InputError
from ..index import PassageIndex
from .metrics import recall_at, reciprocal_rank
from .provenance import result, write_result
from .qa import interval
from .questions import gold_number, gold_passages, search
from .statistics import percentile
from .tasks import Progress, RetrievalSettings


def run(index: PassageIndex, questions: Sequence[Question], settings: RetrievalSettings, *, counts: dict[str, int] | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """The content of a `retrieval` results file, also written to `settings.out`.

    A hit is gold if it is a gold passage of the question, or a piece of one; for rows without marks, if an answer stands in it.
    Unanswerable questions are left out. Raises InputError where no question is left.
    """
    asked = [question for question in questions if question.answerable]
    if not asked:
        raise InputError("Retrieval is measured on questions with an answer, the data has none: check --data.")
    values = {
        "data": {**(counts or {}), "questions": len(asked), "gold_by": "marks" if any(gold_passages(question) for question in asked) else "answer strings"},
        "passages": index.count,
        "retriever": dict(index.manifest.retriever),
        "modes": {mode: measure(index, asked, mode, settings, progress=progress) for mode in settings.modes},
    }
    content = result("retrieval", settings=settings.portable(), values=values, seed=settings.seed)
    if settings.out is not None:
        write_result(settings.out, content)
    return content


def measure(index: PassageIndex, questions: Sequence[Question], mode: str, settings: RetrievalSettings, *, progress: Progress | None = None) -> dict[str, Any]:
    """recall@k for each cutoff, MRR and seconds a search of one mode; means with 95 % bootstrap intervals over questions."""
    depth = max(settings.cutoffs)
    recalls: dict[int, list[float]] = {cutoff: [] for cutoff in settings.cutoffs}
    ranks, seconds = [], []
    for done, question in enumerate(questions, 1):
        begin = time.perf_counter()
        hits = search(index, question, depth, mode)
        seconds.append(time.perf_counter() - begin)
        ranking = [gold_number(hit.passage, question) for hit in hits]
        gold = range(len(gold_passages(question) or (0,)))
        for cutoff, values in recalls.items():
            values.append(recall_at(ranking, gold, cutoff))
        ranks.append(reciprocal_rank(ranking, gold))
        if progress is not None:
            progress(mode, done, len(questions))
    named = {f"recall@{cutoff}": interval(values, settings.seed) for cutoff, values in recalls.items()}
    return named | {"mrr": interval(ranks, settings.seed), "search_s": {"p50": percentile(seconds, 0.5), "p95": percentile(seconds, 0.95)}}
