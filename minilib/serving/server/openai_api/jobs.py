"""What a request of HTTP asks of the engine: prompts as token ids, and how each is continued."""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import dataclass

from minilib.serving.request import SamplingParams, SchedulingParams
from minilib.serving.server.errors import ApiError
from minilib.serving.server.limits import Limits
from minilib.serving.server.openai_api.protocol import GenerationRequest

DEFAULT_TOKENS = 16  # of a completion, as OpenAI's API has it; a chat may fill the model's context


@dataclass(frozen=True)
class GenerationJob:
    """One request of HTTP, which becomes one request of the engine for each prompt.

    Args:
        prompts: token ids of each.
        params: how to continue each.
        scheduling: for all of them.
        stream: send tokens as they come.
        include_usage: end the stream with the usage.
        continuous_usage: put the usage so far into every chunk of the stream.
    """

    prompts: list[list[int]]
    params: list[SamplingParams]
    scheduling: SchedulingParams
    stream: bool
    include_usage: bool
    continuous_usage: bool

    @property
    def samples(self) -> int:
        """Samples of each prompt."""
        return self.params[0].n


def job_of(
    request: GenerationRequest,
    prompts: list[list[int]],
    limits: Limits,
    max_length: int,
    param: str,
    logprobs: int | None = None,
    max_tokens: int | None = None,
    default_tokens: int | None = None,
) -> GenerationJob:
    """The job that a request describes.

    Args:
        request: what the client sent.
        prompts: its prompts as token ids.
        limits: of the server.
        max_length: most tokens of a prompt and its continuation.
        param: the field that holds the prompts, for errors.
        logprobs: how many likely tokens to tell beside each chosen one; None for nothing.
        max_tokens: most tokens to generate.
        default_tokens: the same where the client says nothing; None for what the context leaves.

    Raises:
        ApiError: 400, if it asks for more than the limits or the model allow.
        InvalidRequest: if a value makes no sense.
    """
    _check_numbers(request, len(prompts), limits, param)
    return GenerationJob(
        prompts,
        [
            _sampling_params(request, logprobs, _room(prompt, max_tokens, default_tokens, max_length, param))
            for prompt in prompts
        ],
        SchedulingParams(priority=request.priority or 0, tenant=request.user or ""),
        bool(request.stream),
        bool(request.stream_options and request.stream_options.include_usage),
        bool(request.stream_options and request.stream_options.continuous_usage_stats),
    )


def _check_numbers(request: GenerationRequest, prompts: int, limits: Limits, param: str) -> None:
    if prompts > limits.prompts:
        raise ApiError(400, f"{prompts} prompts in one request; at most {limits.prompts} are taken", "too_many", param)
    if prompts * (request.n or 1) > limits.samples:
        message = f"{prompts} prompts with n={request.n} are more than {limits.samples} samples"
        raise ApiError(400, message, "too_many", "n")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream=true", "invalid_value", "stream_options")
    stop = _stop_strings(request)
    if len(stop) > limits.stop_strings:
        message = f"{len(stop)} stop strings; at most {limits.stop_strings} are taken"
        raise ApiError(400, message, "too_many", "stop")
    if any(len(text) > limits.stop_characters for text in stop):
        message = f"a stop string is longer than {limits.stop_characters} characters"
        raise ApiError(400, message, "too_long", "stop")


def _room(prompt: Row[int], asked: int | None, default: int | None, max_length: int, param: str) -> int:
    """Tokens to generate at most."""
    left = max_length - len(prompt)
    if not prompt:
        raise ApiError(400, f"{param} has no token; give at least one", "invalid_value", param)
    if left < 1 or asked is not None and asked > left:
        wanted = f" and {asked} more are asked for" if asked else ""
        message = f"the model's context has {max_length} tokens; the prompt has {len(prompt)}{wanted}"
        raise ApiError(400, message, "context_length_exceeded", param)
    return asked or min(default or left, left)


def _stop_strings(request: GenerationRequest) -> tuple[str, ...]:
    return (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())


def _sampling_params(request: GenerationRequest, logprobs: int | None, max_tokens: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=max(request.top_k or 0, 0),  # vLLM's −1 is all tokens, too
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        n=request.n or 1,
        stop=_stop_strings(request),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        cache_salt=request.cache_salt or "",
        logprobs=logprobs,
    )
