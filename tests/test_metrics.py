"""Answer metrics on cases that other scorers get wrong, citations, retrieval, and the bootstrap intervals."""

import sys

import pytest

from refrag.errors import MissingExtraError
from refrag.evaluation import metrics
from refrag.evaluation.metrics import (
    abstains,
    bergen_match,
    exact_match,
    f1,
    match,
    normalize,
    precision_recall,
    recall_at,
    reciprocal_rank,
    rouge,
    rouge_l,
    score_answer,
    scored_text,
    without_citations,
)
from refrag.evaluation.statistics import mean_interval, paired_difference

GOLDEN = [  # prediction, gold, exact match, F1 (SQuAD's definition), match (contiguous tokens), BERGEN's M (characters)
    ("The Beatles", "Beatles", 1, 1.0, 1, 1),
    ("The answer is Paris, France.", "Paris", 0, 0.4, 1, 1),
    ("Washingtonian", "Washington", 0, 0.0, 0, 1),
    ("1900", "19", 0, 0.0, 0, 1),
    ("New cars in old York", "New York", 0, 0.571, 0, 0),
    ("War of the Worlds", "War of Worlds", 1, 1.0, 1, 1),
    ("yes it is", "yes", 0, 0.5, 1, 1),
    ("", "", 1, 1.0, 1, 1),
    ("São Paulo", "Sao Paulo", 0, 0.5, 0, 0),
]


@pytest.mark.parametrize(("prediction", "gold", "exact", "overlap", "contiguous", "characters"), GOLDEN)
def test_golden_vectors(prediction, gold, exact, overlap, contiguous, characters):
    assert exact_match(prediction, [gold]) == exact
    assert f1(prediction, [gold]) == pytest.approx(overlap, abs=1e-3)
    assert match(prediction, [gold]) == contiguous
    assert bergen_match(prediction, [gold]) == characters


def test_the_best_of_several_answers_counts_and_an_empty_answer_never_does():
    for metric in (exact_match, f1, match, bergen_match):
        assert metric("paris", ["London", "Paris"]) == 1 and metric("", ["Paris"]) == 0 and metric("paris", []) == 0
    assert match("Paris", [""]) == 0  # a substring test would take the empty text for an answer


def test_normalize_deletes_punctuation_before_articles():
    assert normalize(" Spider-Man,  the A-Team!") == "spiderman ateam"


@pytest.mark.parametrize(
    ("text", "bare"), [("[2] 1795", "1795"), ("[1][3] Oslo", "Oslo"), ("Oslo [1, 2]", "Oslo"), ("[x] 5", "[x] 5"), ("unknown", "unknown")]
)
def test_citations_are_taken_off(text, bare):
    assert without_citations(text) == scored_text(text) == bare


def test_what_follows_the_last_citation_is_scored():
    assert scored_text("[2] Ann Torrel [3] 1742") == scored_text(" [2] Ann Torrel [3] 1742") == "1742"


@pytest.mark.parametrize("text", ["Oslo [1].", "Oslo [1][2].", 'Oslo [1]"', "Oslo [1], [2]", "[1] Oslo", "[1] Oslo [2].", "Oslo."])
def test_an_answer_that_cites_behind_is_scored_whole(text):
    assert exact_match(scored_text(text), ["Oslo"]) == 1


def test_text_before_a_citation_is_not_dropped_and_a_year_is_none():
    assert scored_text("Oslo is the capital [1] and it is large.") == "Oslo is the capital  and it is large."
    assert scored_text("It ended in [1945] or so") == "It ended in [1945] or so"


def test_a_question_without_an_answer_is_scored_by_whether_the_answer_says_so():
    assert set(score_answer("I don't know.", ["unknown"], answerable=False).values()) == {1.0}
    assert set(score_answer("keine", ["keine"], answerable=False).values()) == {1.0}
    assert set(score_answer("1742", ["unknown"], answerable=False).values()) == {0.0}
    assert score_answer("unknown", ["1742"])["exact_match"] == 0 and abstains("Unknown.") and not abstains("1742")


def test_rouge_is_rouge_score_with_its_stemmer():
    pytest.importorskip("rouge_score")
    assert rouge_l("the cat sat", ["cats sitting", "the dog sat"]) == pytest.approx(2 / 3)
    assert rouge("cats", ["cat"]) == {"rouge1": 1.0, "rouge2": 0.0, "rougeL": 1.0}  # without the stemmer 0
    assert rouge_l("", ["cat"]) == 0.0


def test_rouge_names_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    metrics._rouge_scorer.cache_clear()
    with pytest.raises(MissingExtraError, match=r"ROUGE needs the package 'rouge-score': install it with  pip install 'refrag\[eval\]'"):
        rouge_l("a", ["a"])


def test_precision_and_recall_by_hand():
    assert precision_recall(["a", "b", "a"], ["a", "c", "d"]) == (1 / 2, 1 / 3)
    assert precision_recall([], ["a"]) == (None, 0.0) and precision_recall(["a"], []) == (0.0, None)


def test_ranks_by_hand():
    ranking = ["d", "a", "c", "b"]
    assert [recall_at(ranking, ["a", "b"], k) for k in (1, 2, 4)] == [0.0, 0.5, 1.0]
    assert reciprocal_rank(ranking, ["b", "c"]) == 1 / 3 and reciprocal_rank(ranking, ["x"]) == 0.0


def test_interval_holds_the_mean_and_is_repeatable():
    values = [1.0] * 80 + [0.0] * 20
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(0.8) and 0.7 < low < 0.8 < high < 0.9 and mean_interval(values) == (mean, low, high)
    assert mean_interval([1.0, 1.0]) == (1.0, 1.0, 1.0)


def test_the_bootstrap_interval_is_about_two_standard_errors():
    values = [1.0] * 800 + [0.0] * 200
    _, low, high = mean_interval(values)
    standard_error = (0.8 * 0.2 / 1000) ** 0.5
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error, rel=0.1)


def test_a_paired_difference_is_narrower_than_two_intervals():
    one = [float(number % 2) for number in range(200)]
    other = [*one[:-10], *[0.0] * 10]  # the same but for five questions
    difference, low, high = paired_difference(one, other)
    assert difference == pytest.approx(5 / 200) and 0 < low < difference < high < 0.06
    assert paired_difference(one, one) == (0.0, 0.0, 0.0)
