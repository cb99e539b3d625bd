"""SQuAD's exact match and F1 on cases that other scorers get wrong, and the interval."""

import pytest

from refrag.evaluation.metrics import exact_match, f1, mean_interval, normalize, without_citations

GOLDEN = [  # prediction, gold, exact match, F1: SQuAD's definition
    ("The Beatles", "Beatles", 1, 1.0),
    ("The answer is Paris, France.", "Paris", 0, 0.4),
    ("Washingtonian", "Washington", 0, 0.0),
    ("1900", "19", 0, 0.0),
    ("New cars in old York", "New York", 0, 0.571),
    ("War of the Worlds", "War of Worlds", 1, 1.0),
    ("yes it is", "yes", 0, 0.5),
    ("", "", 1, 1.0),
    ("São Paulo", "Sao Paulo", 0, 0.5),
]


@pytest.mark.parametrize(("prediction", "gold", "match", "overlap"), GOLDEN)
def test_squad_definition(prediction, gold, match, overlap):
    assert exact_match(prediction, [gold]) == match
    assert f1(prediction, [gold]) == pytest.approx(overlap, abs=1e-3)


def test_the_best_of_several_answers_counts_and_an_empty_answer_never_does():
    assert exact_match("paris", ["London", "Paris"]) == 1 and f1("paris", ["London", "Paris"]) == 1.0
    assert exact_match("", ["Paris"]) == 0 and f1("", ["Paris"]) == 0.0


def test_normalize_deletes_punctuation_before_articles():
    assert normalize(" Spider-Man,  the A-Team!") == "spiderman ateam"


@pytest.mark.parametrize(("text", "bare"), [("[2] 1795", "1795"), ("[1][3] Oslo", "Oslo"), ("Oslo [1, 2]", "Oslo"), ("[x] 5", "[x] 5"), ("unknown", "unknown")])
def test_citations_are_taken_off(text, bare):
    assert without_citations(text) == bare


def test_interval_holds_the_mean_and_is_repeatable():
    values = [1.0] * 80 + [0.0] * 20
    mean, low, high = mean_interval(values)
    assert mean == 0.8 and 0.7 < low < 0.8 < high < 0.9 and mean_interval(values) == (mean, low, high)
    assert mean_interval([1.0, 1.0]) == (1.0, 1.0, 1.0)
