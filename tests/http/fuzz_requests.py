"""Mutated requests through a live router, checked against what h11 makes of the same bytes."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field

import h11

from tests.patience import DEADLINE
from tests.router.live import LiveRouter, worker

from .answers import Broken, Replies, Reply
from .corpus import ALL
from .corpus.case import Got, head
from .mutations import Mutator
from .recorder import MARK, Recorder, Seen

LANES = 12
_QUIET = 0.03
_KEPT = 20_000
"""Recorded requests a slow lane may still ask about."""
_OURS = frozenset({"return_token_ids", "stream_options"})
_STATUSES = frozenset({200, 400, 401, 404, 405, 408, 413, 415, 417, 429, 431, 501, 503, 505})
_ABSOLUTE = re.compile(r"(?i)\Ahttps?://[^/?#]*")


def seeds() -> list[bytes]:
    """The corpus, less its giants, and everyday requests."""
    body = b'{"model":"toy","prompt":"a b","max_tokens":2,"stream":%b}'
    chat = b'{"model":"toy","messages":[{"role":"user","content":"a \\u00e9"}]}'
    lines = (b"Content-Type: application/json", b"User-Agent: x", b"Authorization: Bearer x")
    everyday = []
    for text, target in (
        (body % b"true", b"/v1/completions"),
        (body % b"false", b"/v1/completions"),
        (chat, b"/v1/chat/completions"),
        (b'{"model":"toy","input":"a"}', b"/v1/embeddings"),
    ):
        everyday.append(head(*lines, b"Content-Length: %d" % len(text), target=target) + text)
        everyday.append(
            head(*lines, b"Transfer-Encoding: chunked", target=target)
            + b"%x\r\n%b\r\n0\r\n\r\n" % (len(text), text)
        )
    everyday.append(head(method=b"GET", target=b"/v1/models"))
    everyday.append(head(method=b"GET", target=b"/health"))
    short = [case for case in ALL.values() if len(case.data) < 10_000]
    served = [case.data for case in short if case.got]
    return [case.data for case in short] + served * 4 + everyday * 40


@dataclass(slots=True)
class Opinion:
    """What h11 makes of the bytes of a connection."""

    requests: list[Got] = field(default_factory=list)
    state: str = "idle"
    """After them: `idle`, `part` of another, `error`, or `closed` by the client's wish."""


def opinion(data: bytes) -> Opinion:
    found = Opinion()
    while True:
        # RFC 9112 §2.2: empty lines before a request are ignored.
        data = data.lstrip(b"\r\n")
        if not data:
            return found
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        parser.receive_data(data)
        try:
            request = _one(parser)
        except h11.RemoteProtocolError:
            found.state = "error"
            return found
        if request is None:
            found.state = "part"
            return found
        found.requests.append(request[0])
        data = bytes(parser.trailing_data[0])
        # h11 knows no HTTP/1.0 connection that goes on.
        if parser.our_state is h11.MUST_CLOSE and not _kept(request[1]):
            found.state = "closed"
            return found


def _kept(request: h11.Request) -> bool:
    """RFC 9112 §9.3: an HTTP/1.0 client may ask for its connection to be kept."""
    options = b",".join(value for name, value in request.headers if name == b"connection").lower().split(b",")
    words = {option.strip() for option in options}
    return request.http_version == b"1.0" and b"keep-alive" in words and b"close" not in words


def _one(parser: h11.Connection) -> tuple[Got, h11.Request] | None:
    request: h11.Request | None = None
    body: list[bytes] = []
    while True:
        event = parser.next_event()
        if isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body.append(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            assert request is not None
            parser.send(h11.Response(status_code=404, headers=[("content-length", "0")]))
            parser.send(h11.EndOfMessage())
            got = Got(method=request.method.decode(), target=request.target.decode(), body=b"".join(body))
            return got, request
        else:
            return None


def agree(sent: Got, seen: Got) -> bool:
    """An engine sees what h11 saw: the method, the target without an authority, and the body."""
    target = _ABSOLUTE.sub("", sent.target)
    if not target.startswith("/"):
        target = "/" + target
    if (sent.method, target) != (seen.method, seen.target):
        return False
    return same_body(sent.body, seen.body)


def same_body(sent: bytes, seen: bytes) -> bool:
    """An engine sees what the client sent, but for keys the router adds."""
    if sent == seen:
        return True
    try:
        one, two = json.loads(sent), json.loads(seen)
    except (ValueError, RecursionError):
        return False
    if not isinstance(one, dict) or not isinstance(two, dict):
        return False
    return two.keys() - one.keys() <= _OURS and all(two[key] == value for key, value in one.items())


def lenient(data: bytes) -> str | None:
    """Why h11 may refuse what the router serves: readings that change no message. None: there is none."""
    if re.search(rb"[A-Z] {2,}\S|\S {2,}HTTP/1\.[01]\r", data):
        return "several spaces in the request line"
    if b" RTSP/1." in data:
        return "RTSP's name for the same syntax"
    if re.search(rb"\r\n0{12,}", data):
        return "a chunk size with many leading zeros"
    return None


def _strict(data: bytes) -> bytes:
    """The same message as h11 takes it."""
    data = re.sub(rb"(?<=[A-Z]) {2,}(?=\S)|(?<=\S) {2,}(?=HTTP/1\.[01]\r)", b" ", data)
    return re.sub(rb"(?<=\r\n)0{12,}(?=[0-9A-Fa-f])", b"", data.replace(b" RTSP/1.", b" HTTP/1."))


@dataclass(slots=True)
class Result:
    """What a run found."""

    cases: int = 0
    served: int = 0
    refused: int = 0
    statuses: dict[int, int] = field(default_factory=dict)
    excused: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


class RequestFuzz:
    """Runs cases `first` … `first + count - 1` of a seed."""

    def __init__(self, live: LiveRouter, recorder: Recorder, seed: int) -> None:
        self._live = live
        self._recorder = recorder
        self._seed = seed
        self._seeds = seeds()
        self._known: set[Got] = set()
        """All requests of connections that we left before their answers."""
        self._linked: set[int] = set()
        self.result = Result()

    async def run(self, count: int, first: int = 0) -> Result:
        numbers = iter(range(first, first + count))
        await self._live.table([worker("aggregated-0", self._recorder.url)])
        async with asyncio.TaskGroup() as group:
            for _ in range(LANES):
                group.create_task(self._lane(numbers))
        await self._live.idle()
        self._orphans()
        self.result.failures += self._recorder.faults
        self.result.failures += self._live.complaints
        return self.result

    async def _lane(self, numbers: object) -> None:
        for number in numbers:  # type: ignore[attr-defined]
            mutator = Mutator(self._seeds, f"{self._seed}/{number}")
            data = mutator.message()
            pieces = mutator.pieces(data)
            try:
                why = await self._case(data, pieces)
            except Broken as error:
                why = f"an answer is broken: {error}"
            except ConnectionRefusedError:
                why = "the router does not listen"
            if why is not None:
                self.result.failures.append(f"case {number}: {why}\n    {data[:1500]!r}")
            self.result.cases += 1
            if self.result.cases % 2000 == 0:
                self.result.memory.append(self._live.memory())
                self._forget()

    async def _case(self, data: bytes, pieces: list[bytes]) -> str | None:
        view = opinion(data)
        replies = await self._talk(pieces, view)
        for index, reply in enumerate(replies):
            statuses = self.result.statuses
            statuses[reply.status] = statuses.get(reply.status, 0) + 1
            if reply.status not in _STATUSES:
                return f"answered {reply.status}: {reply.body[:300]!r}"
            if MARK not in reply.headers:
                self.result.refused += 1
                continue
            self.result.served += 1
            number = int(reply.headers[MARK])
            self._linked.add(number)
            seen = self._seen(number).got
            if index >= len(view.requests):
                reason = lenient(data)
                if reason is None:
                    return f"the router read a request where h11 reads none ({view.state}): {seen}"
                self.result.excused[reason] = self.result.excused.get(reason, 0) + 1
            elif not agree(view.requests[index], seen):
                return f"h11 reads {view.requests[index]}, the engine saw {seen}"
        answered = len(replies)
        ended = bool(replies) and (replies[-1].closes or replies[-1].status >= 400)
        if view.state in ("idle", "closed") and answered < len(view.requests) and not ended:
            return f"{answered} answers to {len(view.requests)} requests within {DEADLINE:g} s"
        if answered < len(view.requests) or view.state == "part":
            self._known.update(view.requests)
        elif view.state == "error" and lenient(data) is not None:
            # On a busy machine the answer to what the router reads more leniently comes when we have left.
            self._known.update(opinion(_strict(data)).requests)
        return None

    async def _talk(self, pieces: list[bytes], view: Opinion) -> list[Reply]:
        """Send, and take answers until all that can be expected are here."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._live.port)
        parser = Replies()
        found: list[Reply] = []
        settled = view.state in ("idle", "closed")
        try:
            for piece in pieces:
                if not writer.transport.is_closing():
                    writer.write(piece)
                    await asyncio.sleep(0)
            while True:
                due = len(found) < len(view.requests)
                method = view.requests[len(found)].method if due else "GET"
                reply = parser.more(method)
                if reply is None:
                    if settled and not due and parser.clean:
                        return found
                    try:
                        async with asyncio.timeout(DEADLINE if due else _QUIET):
                            data = await reader.read(65536)
                    except TimeoutError:
                        return found
                    if not data and parser.clean:
                        return found
                    reply = parser.feed(data, method)
                    if reply is None and not data:
                        raise Broken(f"it ended in the middle of answer {len(found)}")
                if reply is not None:
                    found.append(reply)
                    if reply.closes:
                        return found
        except ConnectionError:
            # We still sent when it closed.
            return found
        finally:
            writer.transport.abort()

    def _seen(self, number: int) -> Seen:
        seen = self._recorder.seen
        found = seen[number - seen[0].number]
        assert found.number == number
        return found

    def _forget(self) -> None:
        """Drop what is settled, or a long run would hold all it ever sent."""
        old, self._recorder.seen[:] = self._recorder.seen[:-_KEPT], self._recorder.seen[-_KEPT:]
        for seen in old:
            if seen.number not in self._linked:
                self._orphan(seen)
        self._linked -= {seen.number for seen in old}

    def _orphans(self) -> None:
        for seen in self._recorder.seen:
            if seen.number not in self._linked:
                self._orphan(seen)

    def _orphan(self, seen: Seen) -> None:
        """A request whose answer nobody waited for: it must be one that was sent."""
        if not any(agree(sent, seen.got) for sent in self._known if sent.method == seen.method):
            self.result.failures.append(f"nobody sent what an engine got: {seen.got}")
