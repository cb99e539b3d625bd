"""Metrics of answers and of retrieval: plain functions from texts and ids to a number between 0 and 1. See docs/evaluation.md."""

import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from ..errors import missing_extra

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CITATIONS = re.compile(r"\[\s*\d{1,3}(\s*[,;]\s*\d{1,3})*\s*\]")
"""Numbers of passages; `[1945]` is a year."""

ABSTENTIONS = frozenset(
    ("", "unknown", "unanswerable", "not answerable", "no answer", "noanswer", "i dont know", "i do not know", "not known", "none", "not enough information", "cannot answer")
)
"""Normalised answers that say that there is none."""


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def normalize(text: str) -> str:
    """Lower case, punctuation deleted, articles and extra white space removed, in SQuAD's order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def without_citations(text: str) -> str:
    """The answer without its `[2]`: what is scored when a model cites."""
    return _CITATIONS.sub("", text).strip()


def after_citations(text: str) -> str:
    """What follows the last `[2]` in the answer: what is scored when a model cites before each finding."""
    return _CITATIONS.sub("\0", text).rpartition("\0")[2].strip()


def scored_text(text: str) -> str:
    """The part of an answer that is scored: what follows its last citation where it begins with one, else all of it but its citations.

    So `[2] Ann Torrel [3] 1742`, cited before each finding, is 1742, and `Oslo is the capital [1], in Norway.` is the whole sentence.
    """
    is_cited_first = _CITATIONS.match(text.lstrip()) is not None
    last = after_citations(text) if is_cited_first else ""
    return last if normalize(last) else without_citations(text)


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals a normalised answer, else 0.0."""
    return float(any(normalize(prediction) == normalize(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Best token-multiset F1 over the answers; 1.0 iff both sides are empty where one is."""
    return max((_f1(normalize(prediction).split(), normalize(answer).split()) for answer in answers), default=0.0)


def _f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold))


def match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the tokens of a normalised answer stand next to one another in the normalised prediction, else 0.0.

    An answer that normalises to nothing is matched by such a prediction only.
    """
    predicted = normalize(prediction).split()
    return float(any(_stands_in(normalize(answer).split(), predicted) for answer in answers))


def _stands_in(tokens: list[str], text: list[str]) -> bool:
    if not tokens or not text:
        return tokens == text
    return any(text[start : start + len(tokens)] == tokens for start in range(len(text) - len(tokens) + 1))


def bergen_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the characters of a normalised answer stand in the normalised prediction: BERGEN's `M`, FlashRAG's `acc`.

    For comparison with published numbers only: it takes `1900` for the answer `19`.
    """
    return float(any(normalize(answer) in normalize(prediction) for answer in answers))


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """Best ROUGE-L F-measure over the answers, by rouge-score with its stemmer. Raises MissingExtraError without that package."""
    return rouge(prediction, answers, ("rougeL",))["rougeL"]


def rouge(prediction: str, answers: Sequence[str], kinds: Sequence[str] = ("rouge1", "rouge2", "rougeL")) -> dict[str, float]:
    """The best F-measure of each kind over the answers."""
    scorer = _rouge_scorer(tuple(kinds))
    scores = [scorer.score(answer, prediction) for answer in answers]
    return {kind: max((float(score[kind].fmeasure) for score in scores), default=0.0) for kind in kinds}


@cache
def _rouge_scorer(kinds: tuple[str, ...]) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise missing_extra("rouge-score", "eval", "ROUGE") from error
    return RougeScorer(list(kinds), use_stemmer=True)


ANSWER_METRICS: Mapping[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "f1": f1,
    "match": match,
    "bergen_match": bergen_match,
}


def abstains(prediction: str) -> bool:
    """Whether an answer says that there is none."""
    return normalize(prediction) in ABSTENTIONS


def abstention_score(prediction: str, answers: Sequence[str]) -> float:
    """What every metric gives for a question without an answer."""
    return float(abstains(prediction) or bool(exact_match(prediction, answers)))


def score_answer(prediction: str, answers: Sequence[str], *, answerable: bool = True) -> dict[str, float]:
    """All ANSWER_METRICS of one answer.

    As in SQuAD 2 a question without an answer scores 1 in all of them where the prediction abstains, or is the answer given for such a row.
    """
    if not answerable:
        return dict.fromkeys(ANSWER_METRICS, abstention_score(prediction, answers))
    return {name: metric(prediction, answers) for name, metric in ANSWER_METRICS.items()}


# ── citations and evidence ───────────────────────────────────────────────────────────────────────────────────────────


def precision_recall(found: Iterable[Any], gold: Collection[Any]) -> tuple[float | None, float | None]:
    """(share of what was found that is gold, share of the gold that was found); None where there is nothing to take a share of."""
    found, wanted = set(found), set(gold)
    hits = len(found & wanted)
    return (hits / len(found) if found else None), (hits / len(wanted) if wanted else None)


# ── retrieval ────────────────────────────────────────────────────────────────────────────────────────────────────────


def recall_at(ranking: Sequence[Any], gold: Collection[Any], k: int) -> float:
    """Share of the gold passages among the first k. With one gold passage this is 1.0 or 0.0."""
    wanted = set(gold)
    return len(wanted & set(ranking[:k])) / len(wanted)


def reciprocal_rank(ranking: Sequence[Any], gold: Collection[Any]) -> float:
    """1 / rank of the first gold passage; 0.0 where there is none. Its mean over questions is the MRR."""
    wanted = set(gold)
    return next((1 / rank for rank, identity in enumerate(ranking, 1) if identity in wanted), 0.0)
