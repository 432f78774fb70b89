"""Sessions in both designs: the same replies whatever is lost, and work and bytes counted exactly."""

import asyncio
import hashlib
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilib.classic.http.sessions import (
    SESSION_LOST,
    TURN_BYTES,
    Conversation,
    SessionServer,
    run_conversations,
    take_turn,
)
from minilib.classic.http.wire import MAX_HEAD, Client, HttpError
from minilib.mechanisms.balancing import Sticky
from minilib.mechanisms.caching import Fifo, Lru
from tests.classic.http.http_cases import ask, bad_backend, run

pytestmark = pytest.mark.filterwarnings("error")
AMPLE = 1 << 20


def talk(num_turns, who="x"):
    return [f"turn {number} of {who}, with commas & ünïcode?" for number in range(num_turns)]


def replies_to(turns):
    """The replies from a chain of hashes, each over all replies before it and the turn."""
    chain = []
    for turn in turns:
        chain.append(hashlib.blake2b(b"".join(chain) + turn.encode(), digest_size=16).digest())
    return [reply.hex() for reply in chain]


@asynccontextmanager
async def serving(*servers):
    """A client of each server, listening for as long as the body takes."""
    clients = []
    try:
        for server in servers:
            clients.append(Client(await server.start()))
        yield clients
    finally:
        for client in clients:
            client.check_invariants()
            await client.close()
        for server in servers:
            server.check_invariants()
            await server.kill()


@pytest.mark.parametrize("num_turns", [0, 1, 2, 3, 20])
def test_the_work_of_a_conversation(num_turns):
    """n (n + 1) / 2 turns folded without memory, and n with it."""
    turns = talk(num_turns)
    stateless, stateful = run_conversations([turns]), run_conversations([turns], memory=AMPLE)
    assert stateless.replies == stateful.replies == [replies_to(turns)]
    assert stateless.folded == [num_turns * (num_turns + 1) // 2] and stateful.folded == [num_turns]
    assert stateless.requests == stateful.requests == num_turns
    assert stateless.lost == stateful.lost == 0
    assert stateless.bytes_received == stateful.bytes_received


def test_the_bytes_of_a_conversation():
    """Turns of 10 bytes: the head of a request is 51 bytes, a reply 32 and its head 63."""
    turns = [f"turn{number:06d}" for number in range(20)]
    stateless, stateful = run_conversations([turns]), run_conversations([turns], memory=AMPLE)
    assert stateless.bytes_sent == 20 * 51 + sum(11 * n - 1 for n in range(1, 21)) == 3310
    assert stateful.bytes_sent == 20 * 51 + 20 * 10 + 19 * 2 * TURN_BYTES == 1828
    assert stateless.bytes_received == stateful.bytes_received == 20 * (63 + 32) == 1900


def test_the_bytes_counted_are_those_that_cross_the_wire():
    """A relay between client and server counts them, too; refusals and lost sessions are among them."""

    async def check():
        crossed = [0, 0]

        async def pump(number, reader, writer):
            while piece := await reader.read(1 << 16):
                crossed[number] += len(piece)
                writer.write(piece)
            writer.write_eof()

        async def relay(reader, writer):
            from_server, to_server = await asyncio.open_connection("127.0.0.1", server.port)
            try:
                await asyncio.gather(pump(0, reader, to_server), pump(1, from_server, writer))
            finally:
                to_server.close()
                await asyncio.gather(to_server.wait_closed(), return_exceptions=True)

        server = SessionServer(3 * TURN_BYTES)
        async with serving(server), bad_backend(relay) as port:
            client = Client(port)
            conversation = Conversation(client, "a/b ü", stateful=True)
            for turn in talk(6):
                await conversation.say(turn)
            with pytest.raises(HttpError):
                await conversation.say("x" * MAX_HEAD)
            await client.close()
            assert conversation.num_lost == 2, "a session of 4 turns is larger than the memory"
            assert (conversation.bytes_sent, conversation.bytes_received) == tuple(crossed)

    run(check)


def test_a_restart_costs_the_stateful_design_one_replay_and_the_stateless_one_nothing():
    turns = talk(20)
    events = [(10, 0, SessionServer.restart)]
    stateless, stateful = (
        run_conversations([turns], events=events),
        run_conversations([turns], memory=AMPLE, events=events),
    )
    assert stateless.replies == stateful.replies == [replies_to(turns)]
    assert (stateless.folded, stateless.requests, stateless.lost) == ([210], 20, 0)
    assert (stateful.folded, stateful.requests, stateful.lost) == ([10 + 11 + 9], 21, 1)


def test_a_second_server_halves_the_work_of_one_design_and_ruins_the_other():
    """Behind round robin a session is never where the next request goes; stuck to its server, it always is."""
    turns = talk(20)
    stateless = run_conversations([turns], num_servers=2)
    assert (stateless.folded, stateless.requests, stateless.lost) == ([100, 110], 20, 0)
    lost = run_conversations([turns], memory=AMPLE, num_servers=2)
    assert (lost.folded, lost.requests, lost.lost) == ([210, 0], 39, 19)
    stuck = run_conversations([turns], memory=AMPLE, num_servers=2, balancing=Sticky(2))
    assert (sorted(stuck.folded), stuck.requests, stuck.lost) == ([0, 20], 20, 0)
    assert stateless.replies == lost.replies == stuck.replies == [replies_to(turns)]
    assert lost.bytes_sent > stateless.bytes_sent > stuck.bytes_sent


def test_many_conversations_stick_to_their_servers_and_a_dead_one_costs_a_replay_each():
    conversations = [talk(8, who) for who in "abcdefgh"]
    alive = run_conversations(conversations, memory=AMPLE, num_servers=2, balancing=Sticky(2))
    assert sum(alive.folded) == 64 and alive.lost == 0 and min(alive.folded) > 0
    of_server_0 = alive.folded[0] // 8
    events = [(5, 0, SessionServer.kill)]
    died = run_conversations(conversations, memory=AMPLE, num_servers=2, balancing=Sticky(2), events=events)
    assert died.lost == of_server_0 and sum(died.folded) == 64 + 5 * of_server_0
    stateless = run_conversations(conversations, num_servers=2, balancing=Sticky(2), events=events)
    assert sum(stateless.folded) == 8 * 36 and stateless.lost == 0
    expected = [replies_to(turns) for turns in conversations]
    assert alive.replies == died.replies == stateless.replies == expected


def least_recently_used(num_conversations, num_turns, memory):
    """Turns folded and sessions lost, by a list of sessions in the order of their last turn; memory in turns."""
    held, folded, lost = [], 0, 0
    for taken in range(num_turns):
        for number in range(num_conversations):
            lost += taken > 0 and number not in dict(held)
            folded += 1 if number in dict(held) else taken + 1
            held = [session for session in held if session[0] != number]
            if taken + 1 <= memory:
                while sum(dict(held).values()) + taken + 1 > memory:
                    held.pop(0)
                held.append((number, taken + 1))
    return folded, lost


def test_memory_that_does_not_hold_all_sessions():
    """Four sessions of 4 turns take 16 turns of memory; with less, some are forgotten before they go on."""
    conversations, counts = [talk(4, who) for who in "abcd"], {}
    for memory in (0, 1, 3, 4, 8, 12, 15, 16):
        report = run_conversations(conversations, memory=memory * TURN_BYTES)
        assert report.replies == [replies_to(turns) for turns in conversations]
        assert report.requests == 16 + report.lost
        counts[memory] = report.folded[0], report.lost
        assert not memory or counts[memory] == least_recently_used(4, 4, memory)
    assert counts == {
        0: (40, 0),
        1: (39, 11),
        3: (37, 11),
        4: (39, 11),
        8: (34, 7),
        12: (25, 3),
        15: (16, 0),
        16: (16, 0),
    }
    by_age = run_conversations(conversations, memory=8 * TURN_BYTES, eviction=Fifo)
    assert by_age.replies == report.replies and by_age.folded[0] > 16


def test_a_retry_a_fork_and_a_stranger_never_get_a_wrong_reply():
    async def check():
        server = SessionServer(AMPLE)
        async with serving(server) as (client,):
            first, other = (Conversation(client, "same name", stateful=True) for _ in range(2))
            await first.say("a")
            assert await other.say("b") == replies_to("b")[-1]
            assert await first.say("c") == replies_to("ac")[-1], "the session was another's"
            assert await other.say("d") == replies_to("bd")[-1]
            assert (first.num_lost, other.num_lost, server.num_lost) == (1, 1, 2)
            for _ in range(2):  # the second is a retry, whose first answer was lost on its way
                asked = await ask(server.port, f"/same%20name?after={other.reply}&turns=e,f")
            assert asked[0][0] == SESSION_LOST and b"send all of its turns" in asked[0][1]
            await other.say("g")
            other.turns, other.reply = other.turns[:1], replies_to("b")[-1]  # go back and say something else
            assert await other.say("h") == replies_to("bh")[-1]
            for conversation in (first, other):
                assert conversation.reply == replies_to(conversation.turns)[-1]

    run(check)


@given(
    memory=st.integers(0, 8),
    steps=st.lists(st.tuples(st.integers(0, 2), st.text(max_size=4), st.integers(0, 5)), max_size=12),
)
@settings(max_examples=40)
def test_replies_depend_on_the_turns_alone(memory, steps):
    """Three clients of two servers that restart and forget, each of which goes to either server."""

    async def check():
        servers = SessionServer(memory * TURN_BYTES), SessionServer(memory * TURN_BYTES)
        async with serving(*servers) as clients:
            talks = [Conversation(clients[0], f"s{number}", memory > 0) for number in range(3)]
            for number, turn, fate in steps:
                if fate == 0:
                    await servers[0].restart()
                conversation = talks[number]
                conversation._client = clients[fate % 2]
                assert await conversation.say(turn) == replies_to(conversation.turns)[-1]
                for server in servers:
                    server.check_invariants()
                    assert server.sessions.used <= memory * TURN_BYTES

    run(check)


def test_a_history_that_no_request_holds_is_refused_and_the_conversation_is_as_it_was():
    """The stateless design ends at its 8th turn of 1,000 bytes; the stateful one goes on until its session is lost."""

    async def check():
        servers = SessionServer(), SessionServer(AMPLE)
        async with serving(*servers) as clients:
            stateless, stateful = Conversation(clients[0], "s", False), Conversation(clients[1], "s", True)
            for _ in range(8):
                await stateless.say("x" * 1000)
            for _ in range(20):
                await stateful.say("x" * 1000)
            await servers[1].restart()
            for conversation in (stateless, stateful):
                before = list(conversation.turns)
                with pytest.raises(HttpError, match=f"more than {MAX_HEAD} bytes") as refused:
                    await conversation.say("x" * 1000)
                assert refused.value.status == 431
                assert conversation.turns == before and conversation.reply == replies_to(before)[-1]

    run(check)


def test_malformed_requests_are_refused_by_name():
    async def check():
        server = SessionServer(AMPLE)
        async with serving(server):
            targets = [
                "/",
                "/s",
                "/s?turns=a",
                "/s?after=&turns=%ff",
                "/%ff?after=&turns=a",
                "/s?after=XY&turns=a",
                "/s?after=&turns=a&b=c",
            ]
            for target in targets:
                ((status, body),) = await ask(server.port, target)
                assert status == 400 and b"/session?after=reply&turns=" in body, target
            lost = [f"/s?after={reply}&turns=a" for reply in ("0", "00" * 16, "0" * 99)]
            assert [status for status, _ in await ask(server.port, *lost)] == [SESSION_LOST] * 3
            assert server.num_folded == 0 and len(server.sessions) == 0

    run(check)


def test_a_server_that_is_not_there_is_an_oserror():
    async def check():
        server = SessionServer()
        async with serving(server) as (client,):
            conversation = Conversation(client, "s", stateful=False)
            await conversation.say("a")
            await server.kill()
            with pytest.raises(OSError):
                await conversation.say("b")
            assert conversation.turns == ["a"]
            await server.start()
            assert await conversation.say("b") == replies_to("ab")[-1]

    run(check)


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="a server or more, got 0"):
        run_conversations([["a"]], num_servers=0)
    with pytest.raises(ValueError, match="0 or more, got -1"):
        run_conversations([["a"]], memory=-1)
    for event in ((0, 1, SessionServer.kill), (2, 0, SessionServer.kill), (-1, 0, SessionServer.kill)):
        with pytest.raises(ValueError, match="no server 1 of 1|no round (2|-1) of 1"):
            run_conversations([["a"]], events=[event])
    assert run_conversations([]).replies == [] and run_conversations([[], ["a"]]).replies == [[], replies_to("a")]


def test_invariants_see_every_kind_of_damage():
    server = SessionServer(AMPLE)
    server.sessions.put("s", take_turn(b"", "a")[:-1], TURN_BYTES - 1)
    with pytest.raises(AssertionError, match="part of a turn"):
        server.check_invariants()
    server = SessionServer(AMPLE, Lru)
    server.sessions.policy.add("s")
    with pytest.raises(AssertionError, match="other keys"):
        server.check_invariants()
