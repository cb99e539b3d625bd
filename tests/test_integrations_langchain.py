"""The LangChain adapter: LangChain's own standard suites where they are installed, and what is ours."""

import asyncio
import threading

import pytest

pytest.importorskip("langchain_core")

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate

from refrag.engine import Refrag
from refrag.errors import InputError, NotFoundError
from refrag.integrations.langchain import ChatRefrag, RefragRetriever


@pytest.fixture
def chat(almanac):
    return ChatRefrag(engine=almanac[0], max_tokens=12)


def case(almanac, number=0):
    """(question, its passages as documents, the same as passages)"""
    own, question = almanac[1][number]
    documents = [Document(id=passage.id, page_content=passage.text, metadata={"title": passage.title}) for passage in own.passages]
    return question.text, documents, own.passages


def test_bound_documents_are_read_as_passages(chat, almanac):
    question, documents, passages = case(almanac)
    message = chat.bind(documents=documents, policy="similarity", expand_fraction=0.2).invoke(question)
    answer = almanac[0].answer(question, passages, policy="similarity", expand_fraction=0.2, max_new_tokens=12)
    assert message.content == answer.text
    usage = answer.usage
    assert message.usage_metadata == {
        "input_tokens": usage["prompt_slots"],
        "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["prompt_slots"] + usage["completion_tokens"],
        "input_token_details": {name: usage[name] for name in ("context_tokens", "context_slots", "num_chunks", "expanded_chunks")},
    }
    assert message.response_metadata["trace"] == answer.trace and message.response_metadata["model_name"] == "bundled"
    assert message.response_metadata["citations"] == list(answer.citations)


def test_a_stream_is_the_answer_with_usage_at_its_end(chat, almanac):
    question, documents, _ = case(almanac)
    bound = chat.bind(documents=documents)
    whole = bound.invoke(question)
    chunks = list(bound.stream(question))
    assert len(chunks) > 2
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata] == [whole.usage_metadata]
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.response_metadata["trace"] == whole.response_metadata["trace"]


def test_async_gives_the_same(chat, almanac):
    question, documents, _ = case(almanac)
    bound = chat.bind(documents=documents)

    async def both():
        whole = await bound.ainvoke(question)
        return whole.content, "".join([chunk.content async for chunk in bound.astream(question)])

    assert asyncio.run(both()) == (bound.invoke(question).content,) * 2


def test_a_stream_that_is_left_stops_decoding(chat, almanac):
    question, documents, _ = case(almanac)
    running = threading.active_count()
    pieces = chat._stream([HumanMessage(question)], documents=documents)
    next(pieces)
    pieces.close()
    assert threading.active_count() == running


def test_without_documents_the_engine_retrieves_or_answers_from_nothing(chat, almanac):
    engine, cases = almanac
    question = cases[0][1].text
    assert [own["id"] for own in chat.invoke(question, top_k=3).response_metadata["passages"]] == [hit.passage.id for hit in engine.index.search(question, top_k=3)]
    assert ChatRefrag(engine=Refrag(engine.model), max_tokens=2).invoke(question).response_metadata["passages"] == []


def test_messages_become_system_text_history_and_question(chat):
    messages = [SystemMessage("Be brief."), HumanMessage("One?"), AIMessage("1"), HumanMessage([{"type": "text", "text": "Two?"}])]
    request = chat._request(messages, ["."], documents=["a text"], temperature=0.5)
    assert (request.question, request.system, request.passages[0].text) == ("Two?", "Be brief.", "a text")
    assert [(turn.role, turn.text) for turn in request.history] == [("user", "One?"), ("assistant", "1")]
    assert (request.generation.temperature, request.generation.stop, request.generation.max_new_tokens) == (0.5, (".",), 12)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "must be the human's question"),
        ([HumanMessage("a"), AIMessage("b")], "must be the human's question"),
        ([ToolMessage("a", tool_call_id="1"), HumanMessage("b")], "one was a ToolMessage"),
        ([HumanMessage([{"type": "image", "url": "x"}])], "block of type 'image'"),
    ],
)
def test_messages_that_cannot_be_answered(chat, messages, said):
    with pytest.raises(InputError, match=said):
        chat._request(messages, None)


def test_options_that_do_not_exist_are_refused(chat, almanac):
    with pytest.raises(InputError, match="There is no option 'expand'"):
        chat.bind(expand=0.2).invoke("What?")
    with pytest.raises(InputError, match="There is no option 'top_kk'"):
        ChatRefrag(engine=almanac[0], options={"top_kk": 3})
    with pytest.raises(InputError, match=r"There is no option 'expand_fracton' \(did you mean 'expand_fraction'\?\)"):
        ChatRefrag(engine=almanac[0], expand_fracton=1.0)
    with pytest.raises(InputError, match=r"passages belong to a call: write  chat\.bind\(documents="):
        ChatRefrag(engine=almanac[0], passages=["a"])
    with pytest.raises(InputError, match=r"options must be a dict of options of Refrag\.answer, was str"):
        ChatRefrag(engine=almanac[0], options="x")
    assert ChatRefrag(engine=almanac[0], options=None).options == {}
    with pytest.raises(InputError, match=r"engine must be a refrag\.Refrag or the name of its model, was NoneType"):
        ChatRefrag(model="bundled")


def test_options_by_name_hold_for_all_calls(almanac):
    question, documents, _ = case(almanac)
    by_name, by_dict = ChatRefrag(engine=almanac[0], policy="similarity", expand_fraction=1.0, max_tokens=4), ChatRefrag(engine=almanac[0], options={"expand_fraction": 1.0})
    usage = by_name.bind(documents=documents).invoke(question).usage_metadata["input_token_details"]
    assert usage == by_dict.bind(documents=documents).invoke(question).usage_metadata["input_token_details"]
    assert usage["expanded_chunks"] == usage["num_chunks"]
    assert by_name.options == {"policy": "similarity", "expand_fraction": 1.0} and by_name.max_tokens == 4
    assert ChatRefrag(engine="bundled").bind(documents=documents).invoke(question).content


def test_a_chain_of_prompt_and_chat(chat, almanac):
    question, documents, _ = case(almanac)
    chain = ChatPromptTemplate.from_messages([("human", "{question}")]) | chat.bind(documents=documents)
    assert chain.invoke({"question": question}).content == chat.bind(documents=documents).invoke(question).content


def test_the_retriever_finds_what_the_index_finds(almanac):
    engine, cases = almanac
    question = cases[1][1].text
    retriever = RefragRetriever(index=engine.index.path, k=4, mode="hybrid")
    hits = engine.index.search(question, top_k=4, mode="hybrid")
    assert [(own.id, own.page_content, own.metadata["title"], own.metadata["score"]) for own in retriever.invoke(question)] == [
        (hit.passage.id, hit.passage.text, hit.passage.title, hit.score) for hit in hits
    ]
    assert len(retriever.invoke(question, k=1)) == 1
    with pytest.raises(NotFoundError, match="There is no index"):
        RefragRetriever(index="no/such/index")


# ── LangChain's standard suites ──────────────────────────────────────────────────────────────────────────────────────

try:
    from langchain_tests.integration_tests import ChatModelIntegrationTests, RetrieversIntegrationTests
    from langchain_tests.unit_tests import ChatModelUnitTests
except ImportError:
    pass
else:

    class _Model:
        """What both chat suites ask for."""

        pytestmark = pytest.mark.asyncio  # the suites' coroutines carry no mark of their own

        @pytest.fixture(autouse=True, scope="class")
        def _engine(self, almanac, request):
            request.cls.engine = Refrag(almanac[0].model)

        @property
        def chat_model_class(self):
            return ChatRefrag

        @property
        def chat_model_params(self):
            return {"engine": self.engine}

        @property
        def standard_chat_model_params(self):
            return {"temperature": 0, "max_tokens": 8, "stop": []}

    class TestChatUnit(_Model, ChatModelUnitTests):
        pass

    class TestChatIntegration(_Model, ChatModelIntegrationTests):
        pass

    class TestRetriever(RetrieversIntegrationTests):
        pytestmark = pytest.mark.asyncio

        @pytest.fixture(autouse=True, scope="class")
        def _index(self, almanac, request):
            request.cls.index = almanac[0].index

        @property
        def retriever_constructor(self):
            return RefragRetriever

        @property
        def retriever_constructor_params(self):
            return {"index": self.index}

        @property
        def retriever_query_example(self):
            return "Who built the ship?"
