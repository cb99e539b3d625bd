"""rows.py: documents, questions and conversations from rows, messages that name the field, and by what rows are the same."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refrag.data.rows import Document, Question, content_of, document_of, group_of, keys_of, normalized, question_from, question_of
from refrag.errors import InputError
from refrag.text import Passage, Turn

PLACE = "train.jsonl, line 3"
ROW = {"id": "q1", "question": "Who founded Velmoor?", "answers": ["Anna Torrel", "Torrel"], "passages": ["Velmoor was founded by Anna Torrel."]}


def asked(**changes) -> Question:
    return question_of(ROW | changes, PLACE)


def error_of(parse, row, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        parse(row, PLACE, **kwargs)
    return str(caught.value)


# ── documents ──


def test_documents_by_hand():
    assert document_of({"id": 7, "text": " A text. "}, PLACE, text_field="text") == Document("7", " A text. ")
    assert document_of({"text": "A text.", "meta": {"redpajama_set_name": "RedPajamaBook"}}, PLACE, text_field="text") == Document(PLACE, "A text.")
    assert document_of({"id": "cpt-0", "tokens": "A text."}, PLACE, text_field="tokens") == Document("cpt-0", "A text.")
    assert document_of("A text.", PLACE, text_field="body") == Document(PLACE, "A text.")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": "a", "tokens": "A text."}, "the field 'text' is missing (there are 'id', 'tokens'): name the text's field with --text-field"),
        ({}, "the field 'text' is missing (there are none): name the text's field with --text-field"),
        ({"text": ["A text."]}, "the field 'text' must be a text, was a list: mend it"),
        ({"text": 3.5}, "the field 'text' must be a text, was a number: mend it"),
        ({"text": None}, "the field 'text' must be a text, was null: mend it"),
        ({"text": " \n"}, "the field 'text' must be a text, was empty: mend it"),
        ("", "the field 'text' must be a text, was empty: mend it"),
        (["A text."], "a row must be an object with fields, was a list: mend it"),
    ],
)
def test_bad_documents_name_place_and_field(row, said):
    assert error_of(document_of, row, text_field="text") == f"{PLACE}: {said}, or leave such rows out with --skip-bad."


# ── questions ──


def test_a_question_by_hand():
    row = {
        "id": 12,
        "question": "Who founded it?",
        "answers": ["Anna Torrel"],
        "passages": [
            {"id": "p1", "title": "Velmoor", "text": "Founded by Anna Torrel.", "is_gold": True, "score": 3},
            {"text": "A lamp.", "title": None, "is_gold": False},
        ],
        "history": [{"role": "user", "text": "What is Velmoor?"}, {"role": "assistant", "content": "A town.", "passages": ["Velmoor is a town."]}],
        "system": "Be brief.",
        "level": "easy",
    }
    assert question_of(row, PLACE) == Question(
        id="12",
        question="Who founded it?",
        answers=("Anna Torrel",),
        passages=(Passage("p1", "Founded by Anna Torrel.", "Velmoor"), Passage("#9fd68447f5de", "A lamp.")),
        gold=(True, False),
        history=(Turn("user", "What is Velmoor?"), Turn("assistant", "A town.", (Passage("#990db6eccdab", "Velmoor is a town."),))),
        system="Be brief.",
    )


def test_what_may_be_left_out():
    question = question_of({"question": "Who?", "answer": "Anna", "passages": []}, PLACE)
    assert question == Question(PLACE, "Who?", ("Anna",), (), None, (), None)
    assert question_of({"question": "Who?", "answers": "Anna", "passages": [], "history": None, "system": None, "id": None}, PLACE) == question


def test_passages_may_be_texts_empty_and_partly_marked():
    question = asked(passages=["One.", {"text": ""}, {"text": "Two.", "is_gold": 1}, {"text": "Three.", "is_gold": None}])
    assert [passage.text for passage in question.passages] == ["One.", "", "Two.", "Three."]
    assert question.gold == (False, False, True, False)


def test_a_passage_without_an_id_has_the_same_one_everywhere():
    one, two = asked(passages=["One.", "Two."]).passages
    assert asked(id="q2", passages=["Two."]).passages == (two,)
    assert one.id != two.id != asked(passages=[{"text": "Two.", "title": "A"}]).passages[0].id


def without(field):
    return {name: value for name, value in ROW.items() if name != field}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (without("question"), "the field 'question' is missing (there are 'id', 'answers', 'passages')"),
        (without("answers"), "the field 'answers' is missing (there are 'id', 'question', 'passages')"),
        (without("passages"), "the field 'passages' is missing (there are 'id', 'question', 'answers')"),
        (ROW | {"question": 3}, "the field 'question' must be a text, was a number"),
        (ROW | {"answers": []}, "the field 'answers' must hold one text or more, was empty"),
        (ROW | {"answers": ["Anna", 1742]}, "the field 'answers[1]' must be a text, was a number"),
        (ROW | {"answers": {"texts": ["Anna"]}}, "the field 'answers' must be a list, was an object"),
        (ROW | {"passages": "A text."}, "the field 'passages' must be a list, was a text"),
        (ROW | {"passages": ["One.", 2]}, "the field 'passages[1]' must be an object with fields, was a number"),
        (ROW | {"passages": [{"title": "A", "body": "One."}]}, "the field 'passages[0].text' is missing (there are 'title', 'body')"),
        (ROW | {"passages": [{"text": None}]}, "the field 'passages[0].text' must be a text, was null"),
        (ROW | {"passages": [{"text": "One.", "is_gold": "no"}]}, "the field 'passages[0].is_gold' must be true or false, was a text"),
        (ROW | {"history": {"role": "user"}}, "the field 'history' must be a list, was an object"),
        (ROW | {"history": [{"role": "tool", "text": "3"}]}, "the field 'history[0].role' must be user or assistant, was 'tool'"),
        (ROW | {"history": [{"role": "user"}]}, "the field 'history[0].content' is missing (there are 'role')"),
        (ROW | {"system": 3}, "the field 'system' must be a text, was a number"),
        ("Who?", "a row must be an object with fields, was a text"),
    ],
)
def test_bad_questions_name_place_and_field(row, said):
    assert error_of(question_of, row) == f"{PLACE}: {said}: mend it, or leave such rows out with --skip-bad."


# ── conversations ──

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is Velmoor?", "passages": ["Velmoor is a town."]},
    {"role": "assistant", "content": "A town."},
    {"role": "user", "content": "Who founded it?", "passages": [{"text": "Anna Torrel founded it.", "is_gold": True}, "A lamp."]},
    {"role": "assistant", "content": "Anna Torrel."},
]


def test_a_conversation_ends_with_question_and_answer():
    question = question_of({"id": "c", "messages": CHAT}, PLACE)
    assert (question.id, question.system, question.question, question.answers) == ("c", "Be brief.", "Who founded it?", ("Anna Torrel.",))
    assert [(turn.role, turn.text, len(turn.passages)) for turn in question.history] == [("user", "What is Velmoor?", 1), ("assistant", "A town.", 0)]
    assert question.gold == (True, False)


def test_a_conversation_may_have_its_passages_beside_it_or_none():
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Anna."}]
    assert [passage.text for passage in question_of({"messages": messages, "passages": ["One."]}, PLACE).passages] == ["One."]
    assert question_of({"messages": messages}, PLACE) == Question(PLACE, "Who?", ("Anna.",), (), None)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (CHAT[:-1], "the field 'messages' must end with the roles user, assistant, ends with assistant, user"),
        (CHAT[-1:], "the field 'messages' must end with the roles user, assistant, ends with assistant"),
        ([], "the field 'messages' must end with the roles user, assistant, ends with none"),
        ([CHAT[1], {"role": "tool", "content": "3"}, *CHAT[3:]], "the field 'history[1].role' must be user or assistant, was 'tool'"),
        ([CHAT[3], {"role": "assistant", "content": None}], "the field 'messages[1].content' must be a text, was null"),
        ([CHAT[3], "Anna."], "the field 'messages[1]' must be an object with fields, was a text"),
        ("Anna.", "the field 'messages' must be a list, was a text"),
    ],
)
def test_bad_conversations_name_place_and_field(messages, said):
    assert error_of(question_of, {"messages": messages}) == f"{PLACE}: {said}: mend it, or leave such rows out with --skip-bad."


# ── kept and compared ──


def test_a_question_is_restored_as_it_was():
    for question in (asked(), question_of({"id": "c", "messages": CHAT}, PLACE), asked(passages=[{"text": "Größe 東京 😀", "is_gold": False}], system="S")):
        assert question_from(content_of(question, PLACE)) == question


@pytest.mark.parametrize("item", [Document("a", "half \ud83d"), Question("a", "half \ud83d", ("x",), (), None)])
def test_half_a_character_is_refused(item):
    with pytest.raises(InputError, match=f"^{PLACE}: a text must be valid Unicode, has half a character after .*half '"):
        content_of(item, PLACE)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A  text\nof two lines. ", "a text of TWO lines.", True),
        ("ﬁne ２", "fine 2", True),
        ("A text.", "A text", False),
        ("What is C++?", "What is C?", False),
    ],
)
def test_same_documents(one, other, same):
    assert (keys_of(Document("a", one)) == keys_of(Document("b", other))) == same
    assert (group_of(Document("a", one)) == group_of(Document("b", other))) == same


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"id": "other", "passages": ["Something else."], "system": "Be brief."}, True),
        ({"question": "who founded velmoor"}, True),
        ({"answers": ["torrel."]}, True),
        ({"answers": ["Somebody else", "Anna  Torrel"]}, True),
        ({"answers": ["Somebody else"]}, False),
        ({"question": "Who founded Velmoor++?"}, False),
        ({"history": [{"role": "user", "text": "What is Velmoor?"}, {"role": "assistant", "text": "A town."}]}, False),
    ],
)
def test_same_questions(changes, same):
    assert bool(set(keys_of(asked())) & set(keys_of(asked(**changes)))) == same


def test_answers_of_nothing_but_marks_are_told_apart():
    assert keys_of(asked(answers=["?"])) != keys_of(asked(answers=["!"]))


def test_turns_of_one_conversation_are_of_one_group():
    first = asked(question="What is Velmoor?", answers=["A town"])
    later = asked(history=[{"role": "user", "text": "what is velmoor"}, {"role": "assistant", "text": "A town."}])
    assert group_of(first) == group_of(later) != group_of(asked())
    assert not set(keys_of(first)) & set(keys_of(later))


@settings(deadline=None)
@given(st.text())
def test_white_space_changes_no_hash_and_hashes_fit_arrow(text):
    spaced = "\n" + text.replace(" ", " \t ") + " "
    assert keys_of(Document("a", text)) == keys_of(Document("b", spaced))
    assert 0 <= keys_of(Document("a", text))[0] < 2**63


def test_normalising_by_hand():
    assert normalized("  Ｇröße\u00a0of\n THE  ﬁsh ") == "grösse of the fish"
