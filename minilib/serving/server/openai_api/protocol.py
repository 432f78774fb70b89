"""Requests as OpenAI's API has them, with vLLM's fields for what the engine can do besides.

A field that is not here is refused, and so is every value that could not be honoured: nothing is ignored. A field of
OpenAI's API that this server cannot serve is here with the one value that changes nothing, so that clients which always
send it are served.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, RootModel, Tag, ValidationError

from minilib.serving.server.errors import ApiError

Model = TypeVar("Model", bound=BaseModel)
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=1024)]
Zero = Annotated[float, Field(ge=0, le=0)]
Empty = Annotated[list[None], Field(max_length=0)]
NoBias = Annotated[dict[str, None], Field(max_length=0)]


class Strict(BaseModel):
    """Numbers are no strings, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream has besides its text."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: bool | None = None  # vLLM's, which guidellm asks for: usage so far in every chunk


class TextFormat(Strict):
    """The one format of answers that this server has."""

    type: Literal["text"]


class Unserved(Strict):
    """Fields of both endpoints with the values that change nothing, which are all that is taken."""

    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    repetition_penalty: Literal[1] | None = None  # vLLM's, whose benchmark always sends 1
    logit_bias: NoBias | None = None


class UnservedOfCompletions(Unserved):
    """The same of /v1/completions."""

    best_of: Literal[1] | None = None
    suffix: None = None


class UnservedOfChats(Unserved):
    """The same of /v1/chat/completions."""

    response_format: TextFormat | None = None
    tools: Empty | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: None = None
    functions: Empty | None = None
    function_call: Literal["none"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    audio: None = None
    prediction: None = None
    metadata: NoBias | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None
    prompt_cache_key: None = None
    prompt_cache_retention: None = None
    safety_identifier: None = None


UNSERVED = UnservedOfCompletions.model_fields.keys() | UnservedOfChats.model_fields.keys()


class GenerationRequest(Strict):
    """What completions and chats have in common."""

    model: str
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    priority: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(max_length=512)] | None = None


class CompletionRequest(GenerationRequest, UnservedOfCompletions):
    """POST /v1/completions."""

    prompt: Text | TokenIds | Texts | Annotated[list[TokenIds], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: Annotated[str, Field(max_length=512)] | None = None
    tool_call_id: Annotated[str, Field(max_length=512)] | None = None
    refusal: None = None
    tool_calls: Empty | None = None
    function_call: None = None
    audio: None = None


Messages = Annotated[list[ChatMessage], Field(min_length=1)]


class ChatRequest(GenerationRequest, UnservedOfChats):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TokenizeTextRequest(Strict):
    """POST /tokenize of a prompt."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class TokenizeChatRequest(Strict):
    """POST /tokenize of a chat."""

    model: str | None = None
    messages: Messages
    add_generation_prompt: bool = True


def _of_chat(value: object) -> str:
    return "chat" if isinstance(value, dict) and "messages" in value else "text"


Tokenized = Annotated[TokenizeTextRequest, Tag("text")] | Annotated[TokenizeChatRequest, Tag("chat")]


class TokenizeRequest(RootModel[Annotated[Tokenized, Discriminator(_of_chat)]]):
    """POST /tokenize."""

    model_config = ConfigDict(strict=True)


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


def parse(model: type[Model], body: bytes) -> Model:
    """A request from the bytes of its body.

    Raises:
        ApiError: 400, for the first thing that is wrong, with the field in `param`.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)
        if issubclass(model, RootModel):  # the first place is which of its models was meant
            wrong = [each | {"loc": each["loc"][1:]} for each in wrong]
        raise _refusal(wrong) from None


def _refusal(wrong: list[dict]) -> ApiError:
    first = wrong[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['msg'].removeprefix('Invalid JSON: ')}", "invalid_json")
    if not first["loc"]:
        return ApiError(400, "the body must be a JSON object", "invalid_type")
    param = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        place = ".".join(map(str, first["loc"]))[:200]
        message = f"{place!r} is no field of this request; leave it out (extra_forbidden)"
        return ApiError(400, message, "unknown_field", param[:200])
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return ApiError(400, f"{param!r} is missing", "missing_field", param)
    place = _place(first["loc"])
    said = dict.fromkeys(_lower(each["msg"]) for each in wrong if _place(each["loc"]) == place)
    message = f"{place}: {', or '.join(list(said)[:4])}"
    if param in UNSERVED:
        message = f"this server does not support {param} with this value; leave it out"
        return ApiError(400, message, "unsupported_parameter", param)
    return ApiError(400, message, "invalid_value", param)


def _place(location: tuple[str | int, ...]) -> str:
    """Where a value is, such as messages[1].content; pydantic names the types that it tried behind that."""
    place = str(location[0])
    for before, here in pairwise(location):
        if isinstance(here, int):
            place += f"[{here}]"
        elif isinstance(before, int):
            place += f".{here}"
        else:
            break
    return place


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
