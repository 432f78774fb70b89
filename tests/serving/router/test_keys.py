"""What a router reads in a request."""

import json

import pytest

from minilib.classic.gateway.messages import GatewayRequest
from minilib.serving.router.keys import prompt_text, routing_key
from minilib.serving.router.prefix_aware import RoutingKey


def asked(body, target="/v1/chat/completions", **headers):
    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return GatewayRequest("POST", target, lines, body=raw)


def chat(*said, **fields):
    return {"messages": [{"role": role, "content": content} for role, content in said]} | fields


def test_the_next_turn_of_a_conversation_continues_the_key_of_the_turn_before():
    said = [
        ("system", "You are helpful. " * 20),
        ("user", "one " * 40),
        ("assistant", "two " * 40),
        ("user", "3 " * 40),
    ]
    first, second = routing_key(asked(chat(*said[:2]))), routing_key(asked(chat(*said)))
    shared = len(first.blocks)
    assert shared > 5 and second.names[:shared] == first.names and len(second.blocks) > shared
    other = routing_key(asked(chat(("system", "You are not helpful. " * 20), *said[1:])))
    assert not set(other.names) & set(second.names)


def test_roles_parts_and_tools_are_part_of_the_prompt():
    parts = [{"type": "text", "text": "look: "}, {"type": "image_url", "image_url": {"url": "http://x/a"}}]
    texts = [
        prompt_text(chat(("user", "a"))),
        prompt_text(chat(("system", "a"))),
        prompt_text(chat(("user", "a"), tools=[{"type": "function"}])),
        prompt_text(chat(("user", parts))),
        prompt_text(chat(("user", parts[:1]))),
    ]
    assert len(set(texts)) == len(texts)
    assert texts[3].startswith(texts[4])


def test_the_session_is_the_header_or_the_user_and_the_salt_is_the_bodys():
    key = routing_key(asked(chat(("user", "a"), user="anna", cache_salt="s"), x_session_id="tab 3"))
    assert (key.session, key.salt) == ("tab 3", "s")
    assert routing_key(asked(chat(user="anna"))).session == "anna"
    assert routing_key(asked(chat(user=5, cache_salt=["x"]))) == RoutingKey()


def test_completions_have_a_text_several_or_token_ids():
    one = routing_key(asked({"prompt": "x" * 200}, "/v1/completions?a=b"))
    assert one == RoutingKey.of_text("x" * 200) and len(one.blocks) == 3
    assert routing_key(asked({"prompt": ["x" * 200, "y"]}, "/v1/completions")) == one
    assert routing_key(asked({"prompt": list(range(40))}, "/v1/completions")) == RoutingKey.of_tokens(range(40))


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000, {"messages": 3}, {"messages": [None, {"content": {}}]},
     {"prompt": [-1, 2**80]}, {"prompt": [[1, 2]]}, {"prompt": None}, {"prompt": [True]}],
)  # fmt: skip
def test_what_is_none_of_it_has_a_key_without_blocks(body):
    assert not routing_key(asked(body, "/v1/completions")).blocks


def test_other_paths_and_bodies_that_are_not_whole_are_not_read():
    body = json.dumps({"prompt": "x" * 200}).encode()
    assert routing_key(asked(body, "/tokenize")) == RoutingKey()
    cut = asked(body, "/v1/completions", x_session_id="s")
    cut.body_is_whole = False
    assert routing_key(cut) == RoutingKey("s")
