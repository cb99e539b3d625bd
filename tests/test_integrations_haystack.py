"""The Haystack component: run, streamed, in a pipeline, and as a pipeline file."""

import asyncio
import os

import pytest

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
pytest.importorskip("haystack")

from haystack import Document, Pipeline

from refrag.errors import InputError
from refrag.integrations.haystack import RefragGenerator

OPTIONS = {"policy": "similarity", "expand_fraction": 0.2, "max_new_tokens": 12}


def print_chunk(chunk):
    """A callback that a pipeline file can name."""


@pytest.fixture
def generator(almanac):
    generator = RefragGenerator(options=OPTIONS)
    generator.engine = almanac[0]
    return generator


def documents_of(case):
    return [Document(id=passage.id, content=passage.text, meta={"title": passage.title}) for passage in case.passages]


def test_documents_are_read_as_passages(generator, almanac):
    engine, cases = almanac
    case, question = cases[0]
    (reply,) = generator.run(question.text, documents_of(case))["replies"]
    answer = engine.answer(question.text, case.passages, **OPTIONS)
    assert reply.text == answer.text
    assert reply.meta["usage"] == answer.usage | {"prompt_tokens": answer.usage["prompt_slots"]}
    assert reply.meta["trace"] == answer.trace and reply.meta["citations"] == list(answer.citations) and reply.meta["model"] == "bundled"


def test_pieces_go_to_the_callback(generator, almanac):
    case, question = almanac[1][0]
    chunks = []
    (reply,) = generator.run(question.text, documents_of(case), streaming_callback=chunks.append)["replies"]
    assert len(chunks) > 2 and "".join(chunk.content for chunk in chunks) == reply.text
    assert [chunk.start for chunk in chunks] == [True] + [False] * (len(chunks) - 1)


def test_the_asynchronous_run_awaits_the_callback(generator, almanac):
    case, question = almanac[1][0]
    chunks = []

    async def keep(chunk):
        await asyncio.sleep(0)
        chunks.append(chunk.content)

    (reply,) = asyncio.run(generator.run_async(question.text, documents_of(case), streaming_callback=keep))["replies"]
    (same,) = generator.run(question.text, documents_of(case))["replies"]
    assert reply.text == same.text == "".join(chunks) and reply.meta["trace"] == same.meta["trace"]
    with pytest.raises(ValueError, match="cannot be a coroutine"):
        generator.run(question.text, documents_of(case), streaming_callback=keep)


def test_without_documents_the_index_is_searched(generator, almanac):
    engine, cases = almanac
    question = cases[1][1].text
    (reply,) = generator.run(question)["replies"]
    assert [own["id"] for own in reply.meta["passages"]] == [hit.passage.id for hit in engine.index.search(question)]
    assert generator.run(question, [])["replies"][0].meta["passages"] == []


def test_a_pipeline_survives_its_file():
    pipeline = Pipeline()
    pipeline.add_component("reader", RefragGenerator(options={"expand_fraction": 0.5, "max_new_tokens": 4}, device="cpu", streaming_callback=print_chunk))
    again = Pipeline.loads(pipeline.dumps(), allowed_modules=["refrag.integrations.haystack", __name__])
    reader = again.get_component("reader")
    assert (reader.model, reader.index, reader.options, reader.device) == ("bundled", None, {"expand_fraction": 0.5, "max_new_tokens": 4}, "cpu")
    assert reader.streaming_callback is print_chunk
    result = again.run({"reader": {"query": "What does Dorelux make?", "documents": [Document(content="Dorelux makes lamps.")]}})
    assert result["reader"]["replies"][0].meta["usage"]["expanded_chunks"] <= 1


def test_bad_input(generator):
    with pytest.raises(InputError, match="There is no option 'top_kk'"):
        RefragGenerator(options={"top_kk": 3})
    with pytest.raises(InputError, match="Document 1 must hold a text, was a NoneType"):
        generator.run("What?", [Document(content=None)])
