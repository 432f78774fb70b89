"""What a router reads in a request before it is served: the session, the beginning of the prompt, the salt.

    x-session-id, or "user"          session
    messages: role + content …       text of the prompt, cut into blocks
    prompt                           the same; token ids are blocks of tokens
    cache_salt                       salt

A request that cannot be read is not refused here: a replica knows better what is wrong with it. Its key holds nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from minilib.classic.gateway.messages import GatewayRequest
from minilib.serving.router.prefix_aware import RoutingKey

GENERATING = ("/v1/chat/completions", "/v1/completions")


def routing_key(request: GatewayRequest) -> RoutingKey:
    """The key of a request in OpenAI's form.

    Cost: the body is parsed once more than by its replica alone; a body longer than the gateway keeps is not parsed.
    """
    session = (request.header(b"x-session-id") or b"").decode("latin-1")
    body = _body_of(request)
    user, salt = (value if isinstance(value := body.get(name), str) else "" for name in ("user", "cache_salt"))
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(token, int) and 0 <= token < 2**31 for token in prompt):
        return RoutingKey.of_tokens(prompt, session or user, salt)
    return RoutingKey.of_text(prompt_text(body), session or user, salt)


def prompt_text(body: dict[str, Any]) -> str:
    """The text that a prompt begins with, in the order in which templates have it: tools, then messages; or the prompt.

    It need not be what the model sees, as long as equal beginnings here are equal beginnings there.
    """
    parts = [json.dumps(body["tools"])] if body.get("tools") else []
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            parts += [f"\n{message.get('role')}\n", *_texts(message.get("content"))]
            parts += [json.dumps(message["tool_calls"])] if message.get("tool_calls") else []
    prompt = body.get("prompt")
    parts += _texts(prompt[0] if isinstance(prompt, list) and prompt else prompt)
    return "".join(parts)


def _body_of(request: GatewayRequest) -> dict[str, Any]:
    """The body of a request that generates; empty where there is none, or none that can be read."""
    if request.target.partition("?")[0] not in GENERATING or not request.body_is_whole:
        return {}
    try:
        body = json.loads(request.body)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _texts(content: object) -> Iterator[str]:
    """The texts of a content: itself, or those of its parts; a picture is known by its address."""
    if isinstance(content, str):
        yield content
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict):
            yield part["text"] if isinstance(part.get("text"), str) else json.dumps(part, sort_keys=True)
