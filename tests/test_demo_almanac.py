"""The almanac: a closed world in which only the passages can give the answer, and distractors compete."""

import json
import re

import pytest

from refrag.demo import forms
from refrag.demo.almanac import UNKNOWN, evaluation_cases, make_case, name_words, write_dataset

KINDS = ("one-hop", "two-hop", "unanswerable")


def cases(split="held-out", count=60):
    return [make_case(seed, split=split, kind=KINDS[seed % 3]) for seed in range(count)]


def test_a_case_is_a_function_of_its_arguments():
    assert make_case(5) == make_case(5)
    assert make_case(5) != make_case(6)
    assert make_case(5).passages != make_case(5, split="held-out").passages


def test_passages_have_40_to_150_words_and_there_are_eight():
    for case in cases():
        assert len(case.passages) == 8
        assert all(40 <= len(passage.text.split()) <= 150 for passage in case.passages)


def test_names_of_the_training_and_held_out_worlds_are_disjoint():
    for kind in forms.NAME_ENDS:
        train, held_out = set(name_words(kind, False)), set(name_words(kind, True))
        assert not train & held_out
        assert min(len(train), len(held_out)) > 500 if kind != "river" else 50
    train = {passage.title for case in cases("train") for passage in case.passages}
    held_out = {passage.title for case in cases() for passage in case.passages}
    assert train and held_out and not train & held_out


def test_no_passage_that_is_measured_is_trained_on():
    trained = {passage.text for case in cases("train", 300) for passage in case.passages}
    measured = {passage.text for case, _ in evaluation_cases(100) for passage in case.passages}
    assert not trained & measured


def test_long_passages_have_90_to_150_words_and_their_own_answers():
    lengths = []
    for case, question in evaluation_cases(40, length="long"):
        lengths += [len(passage.text.split()) for passage in case.passages]
        assert not question.gold or case.passages[question.gold[-1]].text[slice(*question.span)] == question.answer
    assert min(lengths) >= 90 and max(lengths) <= 150
    assert sum(lengths) > 2 * sum(len(passage.text.split()) for case, _ in evaluation_cases(40) for passage in case.passages)


@pytest.mark.parametrize("split", ["train", "held-out", "held-out-forms"])
def test_the_span_of_a_question_holds_its_answer(split):
    for case in cases(split):
        for question in case.questions:
            if question.kind == "unanswerable":
                assert (question.answer, question.gold, question.span) == (UNKNOWN, (), None)
            else:
                start, end = question.span
                assert case.passages[question.gold[-1]].text[start:end] == question.answer


def test_no_answer_stands_in_a_title():
    for case, question in evaluation_cases(200):
        assert question.answer not in {passage.title for passage in case.passages}


def stated(case):
    """(entity, relation) → positions of the passages that state it, from the questions that can be asked."""
    return {(case.passages[q.gold[0]].title, q.relation): q.gold[0] for q in case.questions if q.kind == "one-hop"}


def test_distractors_compete():
    for case, question in evaluation_cases(200):
        if question.kind == "unanswerable":
            continue
        facts, gold = stated(case), question.gold[-1]
        relation = question.relation.split(".")[-1]
        entity = case.passages[gold].title
        same_relation = {at for (other, name), at in facts.items() if name == relation and other != entity}
        assert len(same_relation) >= 3, "at least three other passages state the same relation of another entity"
        for needed in question.gold:  # of every entity on the way another passage states another relation
            subject = case.passages[needed].title
            assert any(other == subject and at not in question.gold for (other, _), at in facts.items())


def test_a_two_hop_question_needs_both_passages():
    for seed in range(30):
        case = make_case(seed, split="held-out", kind="two-hop")
        question = case.questions[0]
        first, second = question.gold
        bridge = case.passages[second].title
        assert first != second and bridge in case.passages[first].text and bridge not in question.text


def test_training_never_shows_the_held_out_forms():
    text = " ".join(passage.text for case in cases("train", 200) for passage in case.passages)
    asked = " ".join(question.text for case in cases("train", 200) for question in case.questions)
    for relations in forms.RELATIONS.values():
        for relation in relations.values():
            for shown, options in ((text, relation.statements), (asked, relation.questions)):
                for form in options[-forms.NUM_HELD_OUT_FORMS :]:
                    assert not matches(form, shown), form
    for *_, questions in forms.TWO_HOP:
        assert matches(questions[0], asked) and not matches(questions[-1], asked)


def matches(form, text):
    return re.search(re.escape(form).replace(r"\{s\}", r"\w+").replace(r"\{a\}", r"\w+"), text)


def test_rivals_differ_only_by_name():
    case = make_case(1, num_passages=4, rivals=True, length="brief")
    facts = stated(case)
    relations = [{name for entity, name in facts if entity == passage.title} for passage in case.passages]
    assert len({passage.title for passage in case.passages}) == 4 and all(own == relations[0] for own in relations)


def test_write_dataset_is_json_lines(tmp_path):
    write_dataset(tmp_path / "almanac.jsonl", 20)
    rows = [json.loads(line) for line in (tmp_path / "almanac.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and {row["kind"] for row in rows} == set(KINDS)
    assert all(len(row["passages"]) == 8 and sum(p["is_gold"] for p in row["passages"]) == {"one-hop": 1, "two-hop": 2, "unanswerable": 0}[row["kind"]] for row in rows)
