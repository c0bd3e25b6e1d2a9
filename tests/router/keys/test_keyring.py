"""Whose key a request has."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcserve.http.errors import HttpError
from hpcserve.http.exchange import Exchange
from hpcserve.router.keys.identity import ANYONE, RUN, Identity
from hpcserve.router.keys.keyring import KeyRing
from hpcserve.router.keys.store import KeyStore, id_of
from tests.patience import DEADLINE


class Head:
    """What identify() reads of an exchange."""

    def __init__(self, **headers: str) -> None:
        self.headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]

    def header(self, name: bytes) -> bytes | None:
        return dict(self.headers).get(name)


def identify(ring: KeyRing, **headers: str) -> Identity:
    exchange: Exchange = Head(**headers)  # type: ignore[assignment]
    ring._watch = ring._watch or object()  # type: ignore[assignment] # no thread in these tests
    return ring.identify(exchange)


def refusal(ring: KeyRing, **headers: str) -> str:
    with pytest.raises(HttpError) as error:
        identify(ring, **headers)
    assert error.value.status == 401
    assert (b"x-hpcserve-reason", b"invalid_api_key") in error.value.headers
    return error.value.message


@pytest.fixture
def store(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path / "runs" / ".keys")


@pytest.fixture
def create(store: KeyStore) -> Callable[..., str]:
    return lambda name, **fields: store.create(name, created_by="me", **fields)[1]


def test_without_any_key_everyone_is_let_in() -> None:
    assert identify(KeyRing()) is ANYONE


def test_the_runs_own_key_is_good_in_both_headers() -> None:
    ring = KeyRing("hs-secret")
    assert identify(ring, authorization="Bearer hs-secret") is RUN
    assert identify(ring, authorization="bearer  hs-secret ") is RUN
    assert identify(ring, x_api_key="hs-secret") is RUN
    assert "wrong" in refusal(ring, authorization="Bearer hs-secreT")
    assert "needed" in refusal(ring)
    assert "needed" in refusal(ring, authorization="Basic hs-secret")


def test_keys_of_a_directory_are_good_besides_the_runs_own(
    store: KeyStore, create: Callable[..., str]
) -> None:
    alice = create("alice", concurrent=3, models=("a",), priority="batch", weight=2.0)
    bob = create("bob")
    ring = KeyRing("hs-secret", store.directory)
    found = identify(ring, authorization=f"Bearer {alice}")
    assert (found.name, found.weight, found.priority) == ("alice", 2.0, -1)
    assert (found.limits.concurrent, found.limits.models) == (3, frozenset({"a"}))
    assert found.key == id_of(alice.encode())
    assert identify(ring, x_api_key=bob).name == "bob"
    assert identify(ring, authorization="Bearer hs-secret") is RUN


def test_a_key_with_another_keys_id_is_refused(store: KeyStore, create: Callable[..., str]) -> None:
    alice, bob = create("alice"), create("bob")
    mixed = alice[:15] + bob[15:]
    refusal(KeyRing("hs-secret", store.directory), authorization=f"Bearer {mixed}")
    refusal(KeyRing(None, store.directory), authorization="Bearer hps-0000000000-x")
    refusal(KeyRing(None, store.directory), authorization="Bearer \xff\xfe")


def test_only_a_hash_is_stored_and_only_the_owner_can_read_it(
    store: KeyStore, create: Callable[..., str]
) -> None:
    key = create("alice")
    (path,) = store.directory.iterdir()
    secret = key.split("-", 2)[2]
    assert secret not in path.read_text()
    assert len(secret) >= 43  # 256 bits
    assert re.fullmatch(r"hps-[0-9a-z]{10}-[\w-]+", key)
    assert path.stat().st_mode & 0o777 == 0o600
    assert store.directory.stat().st_mode & 0o777 == 0o700


def test_a_directory_of_a_group_has_files_the_group_can_read(
    store: KeyStore, create: Callable[..., str]
) -> None:
    store.directory.mkdir(parents=True)
    os.chmod(store.directory, 0o2770)
    create("alice")
    (path,) = store.directory.iterdir()
    assert path.stat().st_mode & 0o777 == 0o640


def test_keys_that_come_and_go_are_noticed(store: KeyStore, create: Callable[..., str]) -> None:
    ring = KeyRing("hs-secret", store.directory)  # there is no such directory yet
    alice = create("alice")
    refusal(ring, x_api_key=alice)
    ring.reload()
    assert identify(ring, x_api_key=alice).name == "alice"
    store.revoke("alice")
    ring.reload()
    assert "was revoked" in refusal(ring, x_api_key=alice)


def test_a_damaged_file_keeps_what_it_last_said_and_warns_once(
    store: KeyStore, create: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    alice, bob = create("alice"), create("bob")
    ring = KeyRing(None, store.directory)
    path = store.directory / f"{id_of(alice.encode())}.json"
    good = path.read_text()
    path.write_text(good[:50])
    carol = create("carol")
    with caplog.at_level(logging.WARNING):
        ring.reload()
        ring.reload()
    assert [identify(ring, x_api_key=key).name for key in (alice, bob, carol)] == ["alice", "bob", "carol"]
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    path.write_text(good)
    ring.reload()
    assert identify(ring, x_api_key=alice).name == "alice"


def test_a_file_that_was_always_damaged_lets_nobody_in(
    store: KeyStore, create: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    alice, bob = create("alice"), create("bob")
    (store.directory / f"{id_of(alice.encode())}.json").write_text('{"id": 1}')
    ring = KeyRing(None, store.directory)
    refusal(ring, x_api_key=alice)
    assert identify(ring, x_api_key=bob).name == "bob"
    assert "nobody can use it" in caplog.text


def test_a_directory_that_goes_away_keeps_the_keys_revoked_by_nobody(
    store: KeyStore, create: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    alice = create("alice")
    ring = KeyRing(None, store.directory)
    moved = store.directory.rename(store.directory.with_name("away"))
    store.directory.write_text("not a directory")
    ring.reload()
    assert identify(ring, x_api_key=alice).name == "alice"
    assert "stay valid" in caplog.text
    store.directory.unlink()
    moved.rename(store.directory)


async def test_a_running_router_notices_by_itself(
    store: KeyStore, create: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import asyncio

    monkeypatch.setattr("hpcserve.router.keys.keyring._EVERY", 0.01)
    ring = KeyRing("hs-secret", store.directory)
    exchange: Exchange = Head(x_api_key="hs-secret")  # type: ignore[assignment]
    ring.identify(exchange)
    create("alice")
    async with asyncio.timeout(DEADLINE):
        while not list(ring.identities()):  # noqa: ASYNC110 - a test may poll
            await asyncio.sleep(0.01)
    await ring.close()


def _create_many(directory: str, name: str) -> None:
    store = KeyStore(Path(directory))
    for number in range(20):
        store.create(f"{name}{number}", created_by=name)


def test_keys_made_on_two_login_nodes_at_one_time_are_all_there(store: KeyStore) -> None:
    context = multiprocessing.get_context("spawn")
    makers = [context.Process(target=_create_many, args=(str(store.directory), name)) for name in "ab"]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(60)
    records, errors = store.read()
    assert sorted(record.name for record in records.values()) == sorted(
        f"{name}{number}" for name in "ab" for number in range(20)
    )
    assert not errors


def test_revoking_by_name_takes_all_keys_of_it(store: KeyStore, create: Callable[..., str]) -> None:
    create("alice"), create("alice"), create("bob")
    assert len(store.revoke("alice")) == 2
    assert store.revoke("alice") == []
    states = {record.name: record.revoked for record in store.read()[0].values()}
    assert states["bob"] is None
    assert states["alice"] is not None


def test_a_file_of_another_key_is_not_taken_for_it(store: KeyStore, create: Callable[..., str]) -> None:
    alice = create("alice")
    path = store.directory / f"{id_of(alice.encode())}.json"
    value = json.loads(path.read_text())
    (store.directory / "zzzzzzzzzz.json").write_text(json.dumps(value))
    records, errors = store.read()
    assert list(errors) == ["zzzzzzzzzz"]
    assert len(records) == 1


def test_identify_costs_microseconds(store: KeyStore, create: Callable[..., str]) -> None:
    """A slow hash in the request path would show here, by four orders of magnitude."""
    ring = KeyRing("hs-secret", store.directory)
    create("alice")
    began = time.process_time()
    for _ in range(1000):
        identify(ring, authorization="Bearer hs-secret")
    assert time.process_time() - began < 1.0
