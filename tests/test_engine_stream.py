"""Streams of an answer: pieces, errors, leaving early, cancelling, asyncio."""

import asyncio
import threading

import pytest
import torch

from refrag.engine import Refrag
from refrag.engine.answer import Answer
from refrag.errors import InputError

QUESTION = "Who founded the harbour of Velmoor?"
PASSAGES = ["The harbour of Velmoor was founded in 1742 by the shipwright Anna Torrel.", "3,412 people live on the northern coast. 東京 😀"]
SHORT = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def engine(tiny_model) -> Refrag:
    return Refrag(tiny_model)


@pytest.mark.parametrize("options", [{}, {"stop": ("a", "K")}, {"temperature": 2.0, "seed": 3}])
def test_a_stream_is_the_answer(engine: Refrag, options: dict) -> None:
    whole = engine.answer(QUESTION, PASSAGES, max_new_tokens=24, **options)
    stream = engine.stream(QUESTION, PASSAGES, max_new_tokens=24, **options)
    pieces = list(stream)
    assert "".join(pieces) == stream.answer.text == whole.text
    assert len(pieces) > 1 or "stop" in options
    assert (stream.answer.usage, stream.answer.trace) == (whole.usage, whole.trace)


def test_a_stop_string_ends_the_answer(engine: Refrag) -> None:
    whole = engine.answer(QUESTION, PASSAGES, max_new_tokens=24)
    stop = next(char for char in whole.text[3:] if char != "\ufffd" and char not in whole.text[:3])
    answer = engine.answer(QUESTION, PASSAGES, max_new_tokens=24, stop=stop)
    assert answer.text == whole.text.split(stop)[0].strip()
    assert answer.finish_reason == "stop"
    assert answer.usage["completion_tokens"] < 24


def test_the_models_end_token_ends_the_answer(make_model) -> None:
    model = make_model()
    whole = Refrag(model).answer(QUESTION, PASSAGES, **SHORT)
    prompt = Refrag(model).builder.build(QUESTION, PASSAGES)
    ids = torch.tensor([prompt.token_ids()])
    third = int(model.decoder.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0, ids.shape[1] + 2])
    model.decoder.generation_config.eos_token_id = [2, third]
    answer = Refrag(model).answer(QUESTION, PASSAGES, policy="all", **SHORT)
    assert (answer.finish_reason, answer.usage["completion_tokens"]) == ("stop", 3)
    assert whole.finish_reason == "length"


def test_errors_of_a_stream_reach_its_reader(engine: Refrag) -> None:
    with pytest.raises(InputError, match="more than the decoder's 512 positions"):
        list(engine.stream(QUESTION, ["word " * 900], policy="all"))
    with pytest.raises(InputError, match="The question must hold some text"):
        engine.stream(" ", [])


def test_leaving_a_stream_stops_it(engine: Refrag) -> None:
    with engine.stream(QUESTION, PASSAGES, max_new_tokens=300) as stream:
        next(stream)
    assert not stream._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed before its answer"):
        stream.answer
    dropped = engine.stream(QUESTION, PASSAGES, max_new_tokens=300)
    thread = dropped._thread
    del dropped
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_cancel_keeps_what_was_written(engine: Refrag) -> None:
    cancel = threading.Event()
    stream = engine.stream(QUESTION, PASSAGES, max_new_tokens=300, cancel=cancel)
    first = next(stream)
    cancel.set()
    answer = stream.answer
    assert answer.text.startswith(first)
    assert answer.finish_reason == "cancelled"
    assert answer.usage["completion_tokens"] < 300
    assert engine.answer(QUESTION, PASSAGES, cancel=cancel, max_new_tokens=300).usage["completion_tokens"] == 1


def test_async_answers_and_streams(engine: Refrag) -> None:
    async def both() -> tuple[Answer, str, Answer]:
        answer = await engine.aanswer(QUESTION, PASSAGES, **SHORT)
        stream = engine.astream(QUESTION, PASSAGES, **SHORT)
        return answer, "".join([piece async for piece in stream]), stream.answer

    answer, text, streamed = asyncio.run(both())
    assert answer.text == text == streamed.text == engine.answer(QUESTION, PASSAGES, **SHORT).text


def test_cancelling_a_task_stops_the_decoding(engine: Refrag) -> None:
    async def leave() -> threading.Thread:
        stream = engine.astream(QUESTION, PASSAGES, max_new_tokens=400)

        async def read() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return stream._stream._thread

    thread = asyncio.run(leave())
    thread.join(timeout=10)
    assert not thread.is_alive()
