"""formats.py: a row of each public set, cut to what is read, and what it becomes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refrag.data.formats import question_rows
from refrag.data.rows import answer_spans, question_of
from refrag.errors import InputError

PLACE = "a.jsonl, line 1"
SQUAD = {"id": "s1", "title": "Oslo", "context": "Oslo lies in Norway.", "question": "Where is Oslo?", "answers": {"text": ["Norway", "Norway"], "answer_start": [13, 13]}}
HOTPOT = {
    "_id": "h1", "question": "Which?", "answer": "yes", "type": "comparison", "level": "hard",
    "supporting_facts": [["A", 0], ["B", 1]],
    "context": [["A", ["One.", " Two."]], ["B", ["Three."]], ["C", ["Four."]]],
}  # fmt: skip
COLUMNS = {"title": ["A", "B", "C"], "sentences": [["One.", " Two."], ["Three."], ["Four."]]}
HOTPOT_ON_HUB = HOTPOT | {"supporting_facts": {"title": ["A", "B"], "sent_id": [0, 1]}, "context": COLUMNS}
TWO_WIKI = HOTPOT | {"context": json.dumps([["A", ["One.", "Two."]], ["B", ["Three."]], ["C", ["Four."]]]), "supporting_facts": '[["A", 0], ["B", 0]]'}
MUSIQUE = {
    "id": "2hop__1_2", "question": "Who?", "answer": "Ann", "answer_aliases": ["Ann Lee"], "answerable": True, "question_decomposition": [{}, {}],
    "paragraphs": [{"idx": 0, "title": "A", "paragraph_text": "Ann.", "is_supporting": True}, {"idx": 1, "title": "B", "paragraph_text": "Bob.", "is_supporting": False}],
}  # fmt: skip
TRIVIA = {
    "question_id": "t1", "question": "Where?", "answer": {"value": "Oslo", "aliases": ["Oslo", "Christiania"], "normalized_value": "oslo"},
    "entity_pages": {"title": ["Norway"], "wiki_context": ["Its capital is Oslo."]}, "search_results": {"title": ["x"], "search_context": [""]},
}  # fmt: skip
POPQA = {"id": 4222362, "subj": "George Rankin", "obj": "politician", "question": "What is George Rankin's occupation?", "possible_answers": '["politician", "political leader"]'}
DPR = {
    "question": "Who?", "answers": ["Ann"], "positive_ctxs": [{"title": "A", "text": "Ann.", "passage_id": "7"}],
    "negative_ctxs": [], "hard_negative_ctxs": [{"title": "B", "text": "Bob.", "passage_id": "8"}],
}  # fmt: skip
FID = {"id": "f", "question": "Who?", "target": "Ann", "ctxs": [{"id": "7", "title": "A", "text": "Ann.", "hasanswer": True}]}
KILT = {"id": "k", "input": "Who?", "output": [{"answer": "Ann"}, {"answer": "Ann Lee"}, {"provenance": [{"title": "A"}]}]}
NQ = {
    "example_id": 5, "question_text": "who won", "document_text": "<P> Ann won in 1990 </P> <P> Bob lost </P>",
    "annotations": [{"yes_no_answer": "NONE", "long_answer": {"start_token": 0, "end_token": 6}, "short_answers": [{"start_token": 1, "end_token": 2}]}],
}  # fmt: skip
EMPTY_NQ = NQ | {"annotations": [{"yes_no_answer": "YES", "long_answer": {"start_token": -1, "end_token": -1}, "short_answers": []}]}


def read(row):
    """(id, question, answers, passages as (title, text), gold, kind) of a row."""
    one = question_of(row, PLACE, bare=True)
    return one.id, one.question, list(one.answers), [(p.title, p.text) for p in one.passages], one.gold and list(one.gold), one.kind


HOTPOT_READ = ("h1", "Which?", ["yes"], [("A", "One. Two."), ("B", "Three."), ("C", "Four.")], [True, True, False], "comparison")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (SQUAD, ("s1", "Where is Oslo?", ["Norway"], [("Oslo", "Oslo lies in Norway.")], [True], "")),
        (HOTPOT, HOTPOT_READ),
        (HOTPOT_ON_HUB, HOTPOT_READ),
        (TWO_WIKI, HOTPOT_READ),
        (MUSIQUE, ("2hop__1_2", "Who?", ["Ann", "Ann Lee"], [("A", "Ann."), ("B", "Bob.")], [True, False], "2-hop")),
        (TRIVIA, ("t1", "Where?", ["Oslo", "Christiania"], [("Norway", "Its capital is Oslo.")], None, "")),
        (POPQA, ("4222362", POPQA["question"], ["politician", "political leader"], [], None, "")),
        (DPR, (PLACE, "Who?", ["Ann"], [("A", "Ann."), ("B", "Bob.")], [True, False], "")),
        (FID, ("f", "Who?", ["Ann"], [("A", "Ann.")], [True], "")),
        (KILT, ("k", "Who?", ["Ann", "Ann Lee"], [], None, "")),
        (NQ, ("5", "who won", ["Ann"], [("", "Ann won in 1990")], [True], "")),
        (EMPTY_NQ, ("5", "who won", ["yes"], [], None, "")),
        ({"question": "who won", "answer": ["Ann", "Lee"]}, (PLACE, "who won", ["Ann", "Lee"], [], None, "")),  # nq_open
        ({"id": "o", "question": "Q?", "answer": "[2] Oslo", "passages": ["Oslo."]}, ("o", "Q?", ["[2] Oslo"], [("", "Oslo.")], None, "")),
    ],
)
def test_public_sets_by_hand(row, expected):
    assert read(row) == expected


@pytest.mark.parametrize(
    "row",
    [
        SQUAD | {"answers": {"text": [], "answer_start": []}},
        {"id": "s2", "question": "Why?", "context": "No.", "answers": [], "is_impossible": True},
        MUSIQUE | {"answerable": False, "answer": "", "answer_aliases": []},
        MUSIQUE | {"answerable": False},  # it keeps the answer of the row it was made from
        {"question": "Why?", "passages": ["No."], "answers": [], "unanswerable": True},
    ],
)
def test_an_unanswerable_row_says_unknown(row):
    one = question_of(row, PLACE)
    assert not one.answerable and one.answers == ("unknown",) and not (one.passages[0].title == "Oslo" and any(one.gold))


def test_the_hubs_copy_of_nq_is_read_and_null_annotations_have_no_answer():
    tokens = ["<P>", "Ann", "won", "in", "1990", "</P>", "Bob", "lost"]
    long, none = {"start_token": 0, "end_token": 6}, {"start_token": -1, "end_token": -1}
    columns = {"long_answer": [long, none], "short_answers": [{"start_token": [1], "end_token": [2]}, {"start_token": [], "end_token": []}], "yes_no_answer": [-1, 1]}
    hub = {"id": "5", "question": {"text": "who won"}, "document": {"title": "T", "tokens": {"token": tokens}}, "annotations": columns}
    assert read(hub) == ("5", "who won", ["Ann", "yes"], [("", "Ann won in 1990")], [True], "")
    null = {"long_answer": [none], "short_answers": [{"start_token": [], "end_token": []}], "yes_no_answer": [-1]}
    simplified = {"example_id": 5, "question_text": "who won", "document_text": " ".join(tokens), "annotations": [{"long_answer": none, "short_answers": [], "yes_no_answer": "NONE"}]}
    for row in (hub | {"annotations": null}, simplified):
        one = question_of(row, PLACE, bare=True)
        assert not one.answerable and one.answers == ("unknown",) and one.passages == ()


def test_a_row_without_answers_is_refused_unless_it_is_marked():
    with pytest.raises(InputError, match="the field 'answers' must hold one text or more, was empty"):
        question_of({"question": "Why?", "passages": ["No."], "answers": []}, PLACE)
    with pytest.raises(InputError, match="the field 'answers' is missing"):
        question_of({"question": "Why?", "context": "No."}, PLACE)


def test_passages_may_be_missing_only_where_they_are_retrieved():
    with pytest.raises(InputError, match="the field 'passages' is missing"):
        question_of(POPQA, PLACE)


def test_an_article_file_of_squad_holds_many_rows():
    qas = [{"id": str(number), "question": "Q?", "answers": [{"text": "Norway", "answer_start": 0}]} for number in range(2)]
    file = {"version": "2.0", "data": [{"title": "Oslo", "paragraphs": [{"context": "Oslo lies in Norway.", "qas": qas}]}]}
    assert [read(row) for row in question_rows(file)] == [(str(number), "Q?", ["Norway"], [("Oslo", "Oslo lies in Norway.")], [True], "") for number in range(2)]
    assert list(question_rows(SQUAD)) == [SQUAD]
    assert list(question_rows({"Data": [{"Question": "Q?"}]})) == [{"Question": "Q?"}]


def test_answers_stand_as_words_of_their_own():
    assert answer_spans("Oslo, in oslo; Oslofjord 1900", ["Oslo", "19", ""]) == [(0, 4), (9, 13)]


FIELDS = sorted({key for row in (SQUAD, HOTPOT, MUSIQUE, TRIVIA, POPQA, DPR, FID, KILT, NQ) for key in row} | {"title", "text", "value", "unanswerable", "Answer"})
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(['["a"]', "[2]", "Oslo"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*FIELDS, "start_token", "end_token"]), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=6))
def test_any_row_is_a_question_or_is_refused_in_one_sentence(row):
    for own in question_rows(row):
        try:
            assert question_of(own, PLACE, bare=True).answers
        except InputError as error:
            assert str(error).startswith(PLACE)
