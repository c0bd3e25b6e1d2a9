"""Mutated answers of an engine through a live router, checked against what h11 makes of the same bytes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass

import h11

from tests.router.live import LiveRouter, worker

from .answers import Broken, Replies, Reply, read_reply
from .corpus.responses import AND_MORE, BAD, GOOD, TOKEN
from .fuzz_requests import LANES, Result
from .mutations import Mutator
from .recorder import Recorder, Script, Seen

_ANSWERED = 8.0
_BATCH = 240
_TOKEN = re.compile(rb"case-[0-9]+\.|smuggled\.")
_ERROR_EVENT = re.compile(rb'data: \{"error":[^\n]*\n\n\Z')
_OURS = frozenset({502, 503, 504})


@dataclass(slots=True, kw_only=True)
class View:
    """What h11 makes of an engine's bytes and a connection that then ends."""

    status: int = 0
    body: bytes = b""
    """As much of it as there is."""
    state: str = "part"
    """`whole` by its own framing, `ended` by the connection's end, `part` or `error`."""
    rest: bytes = b""


def view(data: bytes, method: str) -> View:
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    parser.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
    parser.send(h11.EndOfMessage())
    found = View()
    try:
        for piece, state in ((data.lstrip(b"\r\n"), "whole"), (b"", "ended")):
            parser.receive_data(piece)
            while (event := parser.next_event()) is not h11.NEED_DATA:
                if isinstance(event, h11.Response):
                    found.status = event.status_code
                elif isinstance(event, h11.Data):
                    found.body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    found.state, found.rest = state, bytes(parser.trailing_data[0])
                    return found
                elif event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                    found.state = "error"
                    return found
    except h11.RemoteProtocolError:
        found.state = "error"
    return found


def _lenient(data: bytes) -> str | None:
    """Why h11 may refuse what the router passes on: differences that reach no client. None: there is none."""
    if re.search(rb"\r\n0{12,}", data):
        return "a chunk size with many leading zeros"
    if re.match(rb"\s*HTTP/1\.[01] \d{3}[^\r\n]*[\0-\x08\x0b\x0c\x0e-\x1f\x7f]", data):
        return "a control character in the phrase behind a status"
    if re.match(rb"\s*HTTP/1\.[01] 1\d\d", data):
        return "framing headers in a 1xx answer"
    return None


@dataclass(slots=True, kw_only=True)
class _Case:
    data: bytes
    pieces: list[bytes]
    method: str
    view: View
    closes: bool
    intact: bool


class ResponseFuzz:
    """Runs cases `first` … `first + count - 1` of a seed."""

    def __init__(self, live: LiveRouter, recorder: Recorder, seed: int) -> None:
        self._live = live
        self._recorder = recorder
        self._seed = seed
        self._seeds = [
            answer.data
            for part in (GOOD, BAD, AND_MORE)
            for answer in part.values()
            if len(answer.data) < 20_000
        ] + [answer.data for answer in GOOD.values()] * 4
        self._good = {answer.data for answer in GOOD.values()}
        self._cases: dict[int, _Case] = {}
        self.result = Result()

    async def run(self, count: int, first: int = 0) -> Result:
        self._recorder.answer = self._answer
        workers = [worker(f"aggregated-{i}", self._recorder.url) for i in range(2)]
        await self._live.table(workers)
        for low in range(first, first + count, _BATCH):
            numbers = iter(range(low, min(low + _BATCH, first + count)))
            async with asyncio.TaskGroup() as group:
                for _ in range(LANES):
                    group.create_task(self._lane(numbers))
            self._cases.clear()
            self._recorder.seen.clear()
            self.result.memory.append(self._live.memory())
            # The engines have misbehaved; a router that avoids them would test nothing.
            await self._live.restarted()
        await self._live.idle()
        self.result.failures += self._recorder.faults
        self.result.failures += self._live.complaints
        return self.result

    def _make(self, number: int) -> _Case:
        mutator = Mutator(self._seeds, f"{self._seed}/answers/{number}")
        original = mutator.random.choice(self._seeds)
        data = original
        if mutator.random.random() < 0.9:
            data = mutator.message(3)
        data = data.replace(TOKEN, b"case-%06d." % number)
        method = mutator.random.choice(("POST", "POST", "POST", "GET", "HEAD"))
        found = view(data, method)
        return _Case(
            data=data,
            # An answer nobody asked for can't be told from the next one, unless it comes with the last.
            pieces=[data] if found.rest else mutator.pieces(data),
            method=method,
            view=found,
            # What h11 still waits for must end, or the router would rightly wait as well.
            closes=found.state != "whole" or mutator.random.random() < 0.2,
            intact=original in self._good and data == original.replace(TOKEN, b"case-%06d." % number),
        )

    def _answer(self, seen: Seen) -> Script:
        number = int(dict(seen.headers)[b"x-request-id"].partition(b"-")[0])
        case = self._cases[number]
        return Script(pieces=case.pieces, closes=case.closes)

    async def _lane(self, numbers: Iterator[int]) -> None:
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        replies = Replies()
        for number in numbers:
            case = self._cases[number] = self._make(number)
            if connection is None:
                connection = await asyncio.open_connection("127.0.0.1", self._live.port)
                replies = Replies()
            connection[1].write(self._request(number, case.method))
            reply: Reply | None = None
            why = None
            try:
                reply = await read_reply(connection[0], replies, case.method, _ANSWERED)
            except TimeoutError:
                why = f"no whole answer within {_ANSWERED} s ({case.view.state})"
            except (Broken, ConnectionError) as error:
                why = self._broken(case, str(error))
            else:
                why = self._judge(number, case, reply)
            if why is not None:
                self.result.failures.append(f"case {number} ({case.method}): {why}\n    {case.data[:1500]!r}")
            self.result.cases += 1
            if reply is None or reply.closes or _ERROR_EVENT.search(reply.body):
                connection[1].transport.abort()
                connection = None
        if connection is not None:
            connection[1].transport.abort()

    def _request(self, number: int, method: str) -> bytes:
        body = b'{"model":"toy","prompt":"x","max_tokens":3,"stream":%b}' % (
            b"true" if number % 2 else b"false"
        )
        target = b"/v1/completions" if method == "POST" else b"/version"
        body = body if method == "POST" else b""
        return b"%b %b HTTP/1.1\r\nHost: x\r\nX-Request-Id: %d\r\nContent-Length: %d\r\n\r\n%b" % (
            method.encode(), target, number, len(body), body,
        )  # fmt: skip

    def _broken(self, case: _Case, why: str) -> str | None:
        """The answer broke off: right where the engine's did, or where it can't be trusted."""
        self.result.refused += 1
        if case.intact and case.view.state in ("whole", "ended"):
            return f"a good answer broke off: {why}"
        return None

    def _judge(self, number: int, case: _Case, reply: Reply | None) -> str | None:
        if reply is None:
            return self._broken(case, "nothing came")
        self.result.statuses[reply.status] = self.result.statuses.get(reply.status, 0) + 1
        if reply.headers.get(b"x-request-id") != b"%d" % number:
            return f"the answer to another request: {reply.headers}"
        foreign = set(_TOKEN.findall(reply.body)) - set(_TOKEN.findall(case.data + case.view.body)) - {TOKEN}
        if foreign:
            return f"bytes of another answer: {foreign}"
        if b"internal error" in reply.body:
            return f"an internal error: {reply.body!r}"
        found = case.view
        if reply.status in _OURS:
            self.result.refused += 1
            return (
                f"a good answer became {reply.status}: {reply.body!r}"
                if case.intact and found.state == "whole" and not found.rest and found.status < 500
                else None
            )
        self.result.served += 1
        if case.method == "HEAD" and not reply.body:
            return None
        reason = _lenient(case.data) if found.state == "error" else None
        if reason is not None:
            self.result.excused[reason] = self.result.excused.get(reason, 0) + 1
            return None
        if reply.status != found.status:
            said = f"the engine said {found.status} ({found.state})"
            return f"answered {reply.status}, {said}: {reply.body[:300]!r}"
        if found.state in ("whole", "ended") and reply.body == found.body:
            return None
        told = _ERROR_EVENT.search(reply.body)
        if told is not None and found.state == "error":
            # h11 gives nothing of a body whose head it refuses.
            return None
        if told is not None and found.body.startswith(reply.body[: told.start()]):
            return None
        both = f"{reply.body[:600]!r}, the engine's: {found.body[:600]!r}"
        return f"a client takes for whole what is not ({found.state}): {both}"
