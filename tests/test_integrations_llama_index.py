"""The LlamaIndex adapter: the synthesizer reads nodes as passages, whole, streamed and async; retriever and LLM."""

import asyncio
import threading

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore, TextNode

from refrag.errors import InputError, NotFoundError
from refrag.integrations.llama_index import RefragLLM, RefragRetriever, RefragSynthesizer

OPTIONS = {"policy": "similarity", "expand_fraction": 0.2, "max_new_tokens": 12}


def nodes_of(case):
    return [NodeWithScore(node=TextNode(id_=passage.id, text=passage.text, metadata={"title": passage.title})) for passage in case.passages]


def test_nodes_are_read_as_passages(almanac):
    engine, cases = almanac
    case, question = cases[0]
    nodes = nodes_of(case)
    response = RefragSynthesizer(engine, **OPTIONS).synthesize(question.text, nodes)
    answer = engine.answer(question.text, case.passages, **OPTIONS)
    assert response.response == answer.text and response.source_nodes == nodes
    said = response.metadata["refrag"]
    assert said["trace"] == answer.trace and said["usage"] == answer.usage and said["citations"] == list(answer.citations)
    assert response.metadata[nodes[0].node.node_id] == {"title": case.passages[0].title}


def test_streamed_and_async_responses_are_the_same(almanac):
    engine, cases = almanac
    case, question = cases[0]
    whole = RefragSynthesizer(engine, **OPTIONS).synthesize(question.text, nodes_of(case))
    streaming = RefragSynthesizer(engine, streaming=True, **OPTIONS)
    response = streaming.synthesize(question.text, nodes_of(case))
    assert response.metadata["refrag"] == {}
    pieces = list(response.response_gen)
    assert len(pieces) > 2 and "".join(pieces) == whole.response
    assert response.metadata["refrag"]["usage"] == whole.metadata["refrag"]["usage"]

    async def both():
        plain = await RefragSynthesizer(engine, **OPTIONS).asynthesize(question.text, nodes_of(case))
        streamed = await streaming.asynthesize(question.text, nodes_of(case))
        return plain.response, "".join([piece async for piece in streamed.async_response_gen()])

    assert asyncio.run(both()) == (whole.response,) * 2


def test_texts_alone_can_be_read_too(almanac):
    engine, cases = almanac
    case, question = cases[0]
    texts = [passage.text for passage in case.passages]
    assert RefragSynthesizer(engine, **OPTIONS).get_response(question.text, texts) == engine.answer(question.text, texts, **OPTIONS).text


def test_a_stream_that_is_left_stops_decoding(almanac):
    engine, cases = almanac
    case, question = cases[0]
    running = threading.active_count()
    pieces = RefragSynthesizer(engine, streaming=True).get_response(question.text, [passage.text for passage in case.passages])
    next(pieces)
    pieces.close()
    assert threading.active_count() == running


def test_a_query_engine_over_the_index(almanac):
    engine, cases = almanac
    question = cases[1][1].text
    query_engine = RetrieverQueryEngine(RefragRetriever(engine.index.path, top_k=4), RefragSynthesizer(engine, **OPTIONS))
    response = query_engine.query(question)
    hits = engine.index.search(question, top_k=4)
    assert [(own.node.node_id, own.node.text, own.score) for own in response.source_nodes] == [(hit.passage.id, hit.passage.text, hit.score) for hit in hits]
    assert str(response) == engine.answer(question, top_k=4, **OPTIONS).text


def test_the_llm_completes_without_passages(almanac):
    engine, _ = almanac
    llm = RefragLLM(engine=engine, max_new_tokens=6)
    answer = engine.answer("Who built the ship?", [], max_new_tokens=6)
    assert llm.complete("Who built the ship?").text == answer.text
    *_, last = llm.stream_complete("Who built the ship?")
    assert last.text == answer.text
    assert llm.metadata.context_window == engine.model.decoder.config.max_position_embeddings


def test_bad_input(almanac):
    with pytest.raises(InputError, match="There is no option 'top_kk'"):
        RefragSynthesizer(almanac[0], top_kk=3)
    with pytest.raises(NotFoundError, match="There is no index"):
        RefragRetriever("no/such/index")
