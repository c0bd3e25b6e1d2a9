"""Conversations that strangers can't join, change or replay."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from hpcserve.node.frames import MAX_FRAME, Channel, Failed, WrongKey, accept, connect, receive, send
from tests.patience import DEADLINE

KEY, ATTEMPT = b"job-secret", "7.0"


async def talk(
    served: Callable[[Channel], Awaitable[object]],
    asked: Callable[[str, int], Awaitable[object]],
    key: bytes = KEY,
) -> tuple[object, object]:
    """What the server's side and the client's side returned, or raised."""
    done: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            channel = await accept(reader, writer, key=key, attempt=ATTEMPT)
            done.set_result(await served(channel))
        except (WrongKey, *Failed) as error:
            done.set_result(error)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        result: object = await asked("127.0.0.1", port)
    except (WrongKey, *Failed) as error:
        result = error
    async with asyncio.timeout(30):
        told = await done
    server.close()
    return told, result


async def echo(channel: Channel) -> object:
    for _ in range(2):
        await channel.send({"back": await channel.receive()})
    return "served"


async def ask(address: str, port: int) -> object:
    channel = await connect(address, port, key=KEY, attempt=ATTEMPT, seconds=10)
    assert channel is not None
    answers = []
    try:
        for number in range(2):
            await channel.send({"n": number})
            answers.append(await channel.receive())
    finally:
        await channel.close()
    return answers


def test_both_sides_with_the_key_hear_each_other() -> None:
    assert asyncio.run(talk(echo, ask)) == ("served", [{"back": {"n": 0}}, {"back": {"n": 1}}])


def test_a_stranger_without_the_key_is_refused() -> None:
    told, result = asyncio.run(talk(echo, ask, key=b"another"))
    assert isinstance(told, WrongKey)
    assert isinstance(result, Failed)


def test_a_server_without_the_key_is_not_believed() -> None:
    async def lie(channel: Channel) -> object:
        with pytest.raises(WrongKey):
            await channel.receive()
        await channel.send({"back": "anything"})
        return "lied"

    told, result = asyncio.run(talk(lie, ask, key=b"another"))
    assert told == "lied"
    assert isinstance(result, WrongKey)


def test_a_server_of_another_job_is_left_alone() -> None:
    async def other(address: str, port: int) -> object:
        return await connect(address, port, key=KEY, attempt="8.0", seconds=10)

    told, result = asyncio.run(talk(echo, other))
    assert result is None
    assert isinstance(told, Failed)


def test_a_message_longer_than_agreed_is_refused() -> None:
    async def long(address: str, port: int) -> object:
        channel = await connect(address, port, key=KEY, attempt=ATTEMPT, seconds=10)
        assert channel is not None
        channel.put({"n": "x" * MAX_FRAME})
        await channel.drain()
        await channel.close()
        return None

    told, _ = asyncio.run(talk(echo, long))
    assert isinstance(told, ValueError)


def test_closing_does_not_wait_for_a_side_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcserve.node.frames.CLOSE_TIMEOUT", 0.1)
    closed = asyncio.Event()

    async def deaf(_: Channel) -> object:
        await closed.wait()
        return "never read"

    async def shout(address: str, port: int) -> object:
        channel = await connect(address, port, key=KEY, attempt=ATTEMPT, seconds=10)
        assert channel is not None
        for _ in range(64):
            channel.put({"n": "x" * MAX_FRAME})
        await channel.close()
        closed.set()
        return "closed"

    async def both() -> object:
        async with asyncio.timeout(DEADLINE):
            return await talk(deaf, shout)

    assert asyncio.run(both()) == ("never read", "closed")


@pytest.mark.parametrize("what", ["twice", "changed"])
def test_a_message_said_twice_or_changed_on_the_way_is_refused(what: str) -> None:
    async def tamper(address: str, port: int) -> object:
        recorded: list[dict[str, object]] = []

        class Recorder:
            def write(self, data: bytes) -> None:
                recorded.append(msgspec.json.decode(data[4:]))

            async def drain(self) -> None:
                pass

        reader, writer = await asyncio.open_connection(address, port)
        hello = await receive(reader)
        send(writer, {"nonce": "mine"})
        channel = Channel(
            reader,
            Recorder(),  # type: ignore[arg-type]
            key=KEY,
            nonces=f"{hello['nonce']} mine",
            sides=("client", "server"),
            most=1000,
        )
        await channel.send({"n": 0})
        if what == "changed":
            recorded[0]["message"] = {"n": 1}
        else:
            send(writer, recorded[0])
        send(writer, recorded[0])
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        return None

    told, _ = asyncio.run(talk(echo, tamper))
    assert isinstance(told, WrongKey)
