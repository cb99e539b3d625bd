"""Request bodies. Unknown fields are refused; what OpenAI's API has and we do not is accepted only where it changes nothing."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..config import MAX_SEED, PolicyName

Text = Annotated[str, Field(min_length=1)]
Mode = Literal["dense", "text", "hybrid"]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
"""Every new token looks for each of them."""
Count = Annotated[int, Field(ge=0, lt=2**31)]
Number = Annotated[int, Field(ge=1, lt=2**31)]


def _encodable(text: str) -> str:
    """Half a character (a lone surrogate) is no text that could be stored or looked for."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text has half a character, which UTF-8 cannot hold") from error
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("the text is blank")
    return text


Name = Annotated[str, AfterValidator(_encodable)]
NotBlank = Annotated[str, AfterValidator(_not_blank)]


class Body(BaseModel):
    """No unknown fields, no conversion between types, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Document(Body):
    """A passage. With an id alone it is the index's passage of that id."""

    id: Name | int | None = None
    text: str | None = None
    title: str | None = None
    metadata: dict[str, Any] | None = None


class StoredPassage(Body):
    """A passage to add to the index, or to put in place of the one with its id."""

    id: Text
    text: NotBlank
    title: str = ""
    metadata: dict[str, Any] = {}


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A turn. `documents` are the passages it brought: they are compressed wherever they stand."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    documents: list[str | Document] | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None


class StreamOptions(Body):
    """What a stream holds beside the text."""

    include_usage: bool | None = None


class ResponseFormat(Body):
    """Text is the only format."""

    type: Literal["text"]


class Reading(Body):
    """What is read, and how it is compressed. `refrag.Budget` says what the three budgets mean; at most one may be given."""

    documents: list[str | Document] | None = None
    """Passages to read; without them they are retrieved from the index, with an empty list there are none."""
    top_k: Number | None = None
    """Passages to retrieve."""
    mode: Mode | None = None
    where: NotBlank | None = None
    policy: PolicyName | None = None
    expand_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    expand_chunks: Count | None = None
    max_slots: Number | None = None
    passages_first: bool | None = None


class Decoding(Body):
    """How the answer is decoded. Sampling among the k most probable tokens is `sample_top_k`: `top_k` counts passages."""

    max_tokens: Number | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    """0, the default, decodes greedily."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    sample_top_k: Count | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None


class OpenAIRequest(Reading, Decoding):
    """What chat and completion requests share."""

    model: str | None = None
    """The served model's name."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    trace: bool | None = None
    """Return one entry a chunk: its text, score, and whether it was expanded."""
    n: Literal[1] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None


UNSUPPORTED = frozenset(
    ("n", "presence_penalty", "frequency_penalty", "logit_bias", "store", "logprobs", "top_logprobs", "tools", "echo", "suffix", "best_of", "refusal", "annotations", "audio", "function_call", "tool_calls")
)
"""Fields of OpenAI's that are accepted with the value that changes nothing."""


class ChatRequest(OpenAIRequest):
    """`POST /v1/chat/completions`: the last message is the question."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Number | None = None
    response_format: ResponseFormat | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None


class CompletionRequest(OpenAIRequest):
    """`POST /v1/completions`: the prompt is the question."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None


class AnswerRequest(Reading, Decoding):
    """`POST /v1/answer`: the names are those of `Refrag.answer`, the passages are `documents`."""

    question: Text
    model: str | None = None
    system: str | None = None


class AddRequest(Body):
    """`POST /v1/passages`."""

    passages: Annotated[list[StoredPassage], Field(min_length=1, max_length=10_000)]


class DeleteRequest(Body):
    """`DELETE /v1/passages`."""

    ids: Annotated[list[Text], Field(min_length=1, max_length=10_000)]


class SearchRequest(Body):
    """`POST /v1/passages/search`."""

    question: Text
    top_k: Number | None = None
    mode: Mode = "dense"
    where: NotBlank | None = None


BODIES: dict[str, type[Body]] = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest, "/v1/answer": AnswerRequest, "/v1/passages/search": SearchRequest}
"""Whose fields a route's misspelt one may have meant."""
