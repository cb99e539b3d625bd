"""Options of a request: those of others change nothing, wrong kinds are one sentence."""
# ruff: noqa: F811  (the fixtures are those of the neighbouring file)

import pytest
from test_engine import PASSAGES, QUESTION, index, unchecked  # noqa: F401

from refrag.config import GenerationSettings
from refrag.engine import Refrag, Request
from refrag.errors import InputError
from refrag.index import PassageIndex


def test_hybrid_requests_of_different_depth_do_not_change_each_other(tiny_model, index: PassageIndex) -> None:
    engine = Refrag(tiny_model, index=index)
    requests = [Request(QUESTION, top_k=top_k, mode="hybrid", generation=GenerationSettings(max_new_tokens=1)) for top_k in (2, 60, 1)]
    for request, together in zip(requests, engine.answer_batch(requests), strict=True):
        assert together.passages == engine.answer(request).passages


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"history": 5}, "history must be a list of turns, was an int"),
        ({"budget": 0.5}, "budget must be a Budget, was a float: pass its fields by name"),
        ({"generation": {"seed": 1}}, "generation must be a GenerationSettings, was a dict"),
        ({"stop": 5}, "stop must be a text or a list of texts, was 5"),
        ({"system": 5}, "The system text must be a text, was an int"),
        ({"mode": "foo"}, "mode must be one of dense, text, hybrid, was 'foo'"),
        ({"policy": 3}, "The policy must be a name or a function of one argument, from PolicyInputs to scores, was an int: choose one of none, all"),
        ({"policy": lambda inputs, seed: inputs}, "a function of one argument, from PolicyInputs to scores, was a function: choose"),
        ({"top_k": 10**12}, "top_k must be at most 1000000, was 1000000000000: take a smaller number"),
        ({"top_k": "3"}, "top_k must be a whole number, was '3'"),
        ({"passages_first": "no"}, "passages_first must be True or False, was 'no'"),
        ({"where": "id = 'a'"}, "where filters what is retrieved, but passages were given: leave one of them out"),
        ({"policy": "none", "expand_fraction": 0.1}, "The policy 'none' expands nothing, but a budget to expand was given: leave it out, or choose another policy"),
    ],
)
def test_wrong_kinds_of_options_are_one_sentence(unchecked, options: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Request.make(QUESTION, PASSAGES, **options)


def test_a_policy_that_takes_something_else_is_told_what_it_gets(unchecked, tiny_model) -> None:
    with pytest.raises(InputError, match=r"The policy's function failed \(AttributeError: 'PolicyInputs' object has no attribute 'sum'\): it gets one PolicyInputs \(chunk_embeds, "):
        Refrag(tiny_model).answer(QUESTION, PASSAGES, policy=lambda vectors: vectors.sum(-1))
    with pytest.raises(InputError, match="retriever must be a function of one argument, from a question to passages"):
        Refrag(tiny_model, retriever=lambda question, top_k: PASSAGES)


def test_passages_of_each_question_are_requests(unchecked, tiny_model) -> None:
    with pytest.raises(InputError, match=r"Passage 1 must be a text or a mapping, was a list: .* a Request\(question, passages\)"):
        Refrag(tiny_model).answer_batch(["a?", "b?"], passages=[["x"], ["y"]])


def test_history_as_chat_messages(tiny_model) -> None:
    engine, turns = Refrag(tiny_model), (("user", "hi"), ("assistant", "yes"))
    by_text, by_content = ([{"role": role, name: said} for role, said in turns] for name in ("text", "content"))
    assert engine.answer(QUESTION, PASSAGES, history=by_content).usage == engine.answer(QUESTION, PASSAGES, history=by_text).usage
    assert Request(QUESTION, history=by_content).history == Request(QUESTION, history=by_text).history


@pytest.mark.parametrize("scores", [None, ["a", "b"], [float("nan"), 1.0], [1.0]])
def test_a_reranker_must_give_numbers(unchecked, tiny_model, scores) -> None:
    with pytest.raises(InputError, match="A reranker must give one number per passage"):
        Refrag(tiny_model, retriever=lambda _: PASSAGES[:2], reranker=lambda *_: scores).answer(QUESTION)
