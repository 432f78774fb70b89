"""Sessions over HTTP: a reply depends on all turns of a conversation, so somebody has to keep them.

    stateless   the client sends every turn again, the server folds all of them       n (n + 1) / 2 turns of work
    stateful    the client sends the new turn, the server has folded the others       n turns, and memory

    GET /alice?after=&turns=hello          ──► 200 5d41…     a conversation begins
    GET /alice?after=5d41…&turns=again     ──► 200 9a0b…     and goes on after that reply
    GET /alice?after=5d41…&turns=again     ──► 404           the server is another one, or has forgotten: send all turns

What a server keeps is a memo of its own work. It may forget at any time (a restart, an eviction, a request that went to
another server): the client sends all turns again, which costs work and bytes, and the reply is the same. So one server
is both designs: without memory it is the stateless one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from minilib.classic.http.experiment import LIMIT, run_in_thread, stage
from minilib.classic.http.wire import Client, HttpError, HttpServer, Response, encode_request
from minilib.mechanisms.balancing import Policy, RoundRobin
from minilib.mechanisms.caching import Cache, EvictionPolicy, Lru

TURN_BYTES = 16  # what a turn adds to the state of its session
SESSION_LOST = 404  # the server does not hold the session after that reply
_TARGET = re.compile(r"/([^?]*)\?after=([0-9a-f]*)&turns=([^&]*)")


def take_turn(state: bytes, turn: str) -> bytes:
    """Fold one turn into the state of a session: it reads all of the state, and appends to it.

    Args:
        state: b"" before the first turn.
        turn: any text.

    Returns:
        The state with TURN_BYTES more, which are the reply and depend on every turn so far.
    """
    return state + hashlib.blake2b(state + turn.encode(), digest_size=TURN_BYTES).digest()


def reply_of(state: bytes) -> str:
    """The reply to the last turn, "" before the first."""
    return state[-TURN_BYTES:].hex()


class SessionServer(HttpServer):
    """Folds turns into sessions, and keeps as many sessions as its memory holds.

    Args:
        memory: bytes for the states of sessions; 0 is the stateless design.
        eviction: makes the policy that chooses which session is forgotten when memory runs out.

    Attributes:
        sessions: the states held now.
        num_folded: turns folded so far, in all lives of the server.
        num_lost: requests that were answered by SESSION_LOST, in all lives.

    Raises:
        ValueError: if memory is below 0.
    """

    def __init__(self, memory: int = 0, eviction: Callable[[], EvictionPolicy] = Lru) -> None:
        super().__init__(self._reply)
        self._new_sessions = lambda: Cache(memory, eviction())
        self.sessions, self.num_folded, self.num_lost = self._new_sessions(), 0, 0

    async def kill(self) -> None:
        """As HttpServer; what the process held in memory is gone."""
        await super().kill()
        self.sessions = self._new_sessions()

    async def restart(self) -> None:
        """Kill, and start again on the same port."""
        await self.kill()
        await self.start()

    def check_invariants(self) -> None:
        """Sessions fit into memory, and each is as large as its turns."""
        self.sessions.check_invariants()
        assert self.sessions.used % TURN_BYTES == 0, f"a session holds part of a turn: {self.sessions.used} bytes"

    async def _reply(self, target: str) -> Response:
        session, after, turns = _parse(target)
        state = self.sessions.get(session, b"") if after else b""
        if reply_of(state) != after:
            self.num_lost += 1
            raise HttpError(SESSION_LOST, "this session is not here after that reply; send all of its turns")
        for turn in turns:
            state = take_turn(state, turn)
            self.num_folded += 1
        self.sessions.offer(session, state, len(state))
        return Response(200, reply_of(state).encode())


def _parse(target: str) -> tuple[str, str, list[str]]:
    """Name of the session, reply that its turns so far ended with, and turns to fold; HttpError 400 if malformed."""
    match = _TARGET.fullmatch(target)
    try:
        if match:
            turns = [unquote(turn, errors="strict") for turn in match[3].split(",")]
            return unquote(match[1], errors="strict"), match[2], turns
    except UnicodeDecodeError:
        pass
    raise HttpError(400, "a request is /session?after=reply&turns=turn,turn with quoted turns in UTF-8")


class Conversation:
    """The client's side of a session: sends what its design asks for, and everything if the session was lost.

    Args:
        client: connected to a server, or to a proxy of several.
        session: its name; whoever uses the name of another loses the session, and never gets a wrong reply.
        stateful: whether the server is trusted to hold the turns so far.

    Attributes:
        turns: those that were answered.
        reply: to the last of them.
        num_requests, num_lost: requests that were answered, and how many of them by SESSION_LOST.
        bytes_sent, bytes_received: of these requests and their responses, heads included.
    """

    def __init__(self, client: Client, session: str, stateful: bool) -> None:
        self.session, self.stateful, self._client = session, stateful, client
        self.turns: list[str] = []
        self.reply = ""
        self.num_requests = self.num_lost = self.bytes_sent = self.bytes_received = 0

    async def say(self, turn: str) -> str:
        """Take a turn.

        Returns:
            The reply to it.

        Raises:
            HttpError: if it is refused, as a history is that does not fit into the head of a request (431); the
                conversation is as it was.
            OSError: if the server is not there, or too slow (TimeoutError); the conversation is as it was.
        """
        history, response = [*self.turns, turn], None
        if self.stateful and self.turns:
            response = await self._ask(self.reply, [turn])
            self.num_lost += response.status == SESSION_LOST
        if response is None or response.status == SESSION_LOST:
            response = await self._ask("", history)
        if response.status != 200:
            raise HttpError(response.status, response.body.decode(errors="replace").strip())
        self.turns, self.reply = history, response.body.decode()
        return self.reply

    async def _ask(self, after: str, turns: Sequence[str]) -> Response:
        quoted = ",".join(quote(turn, safe="") for turn in turns)
        target = f"/{quote(self.session, safe='')}?after={after}&turns={quoted}"
        response = await self._client.get(target)
        self.num_requests += 1
        self.bytes_sent += len(encode_request(target))
        self.bytes_received += len(response.encode(response.keep_alive))
        return response


SessionEvent = tuple[int, int, Callable[[SessionServer], Coroutine[Any, Any, object]]]


@dataclass(frozen=True)
class SessionReport:
    """What conversations cost.

    Args:
        replies: of each conversation, one a turn.
        folded: turns that each server folded.
        requests, lost: requests that were answered, and how many of them by SESSION_LOST.
        bytes_sent, bytes_received: of all clients.
    """

    replies: Sequence[Sequence[str]]
    folded: Sequence[int]
    requests: int
    lost: int
    bytes_sent: int
    bytes_received: int


def run_conversations(
    conversations: Sequence[Sequence[str]],
    *,
    memory: int = 0,
    num_servers: int = 1,
    balancing: Policy | None = None,
    eviction: Callable[[], EvictionPolicy] = Lru,
    events: Sequence[SessionEvent] = (),
) -> SessionReport:
    """Hold conversations s0, s1, … over real HTTP, through a proxy: in each round every one of them takes a turn.

    Args:
        conversations: the turns of each.
        memory, eviction: of each server; memory 0 is the stateless design, for servers and clients.
        num_servers: 1 or more.
        balancing: which server gets a request, by the name of its session; round robin if left out.
        events: such as (10, 0, SessionServer.restart), which restarts server 0 after 10 rounds.

    Raises:
        ValueError: if an argument is out of range.
        HttpError, OSError: as Conversation.say.
        TimeoutError: if it takes more than LIMIT seconds.
    """
    rounds = max(map(len, conversations), default=0)
    if num_servers < 1:
        raise ValueError(f"conversations need a server or more, got {num_servers}")
    for after, number, _ in events:
        if number not in range(num_servers) or after not in range(rounds + 1):
            raise ValueError(f"no server {number} of {num_servers}, or no round {after} of {rounds}")
    servers = [SessionServer(memory, eviction) for _ in range(num_servers)]

    async def experiment() -> SessionReport:
        async with stage(balancing or RoundRobin(), servers, answer_within=LIMIT) as client:
            clients = [Conversation(client, f"s{number}", memory > 0) for number in range(len(conversations))]
            replies: list[list[str]] = [[] for _ in clients]
            for taken in range(rounds + 1):
                for _, number, method in (event for event in events if event[0] == taken):
                    await method(servers[number])
                for number, turns in enumerate(conversations):
                    if taken < len(turns):
                        replies[number].append(await clients[number].say(turns[taken]))
            return _report(replies, servers, clients)

    return run_in_thread(experiment)


def _report(
    replies: list[list[str]], servers: Sequence[SessionServer], clients: Sequence[Conversation]
) -> SessionReport:
    return SessionReport(
        replies,
        folded=[server.num_folded for server in servers],
        requests=sum(client.num_requests for client in clients),
        lost=sum(client.num_lost for client in clients),
        bytes_sent=sum(client.bytes_sent for client in clients),
        bytes_received=sum(client.bytes_received for client in clients),
    )
