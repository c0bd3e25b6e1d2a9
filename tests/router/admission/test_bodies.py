"""Memory for the bodies of requests."""

from __future__ import annotations

import pytest

from hpcserve.http.errors import HttpError
from hpcserve.http.exchange import Exchange
from hpcserve.router.admission.bodies import Bodies, Held

LARGEST = 64


class Head:
    def __init__(self, **headers: str) -> None:
        self._headers = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}

    def header(self, name: bytes) -> bytes | None:
        return self._headers.get(name)


def hold(bodies: Bodies, **headers: str) -> Held:
    exchange: Exchange = Head(**headers)  # type: ignore[assignment]
    return bodies.hold(exchange, LARGEST)


def refused(bodies: Bodies, **headers: str) -> None:
    with pytest.raises(HttpError) as error:
        hold(bodies, **headers)
    assert error.value.status == 429
    assert (b"retry-after", b"1") in error.value.headers
    assert (b"x-hpcserve-reason", b"body_memory") in error.value.headers


def test_many_large_bodies_at_once_are_refused_and_room_comes_back() -> None:
    bodies = Bodies(100)
    with hold(bodies, content_length="60"):
        refused(bodies, content_length="60")
        with hold(bodies, content_length="40"):
            refused(bodies, content_length="1")
    assert bodies.held == 0
    with hold(bodies, content_length="60"):
        pass


def test_a_body_without_a_length_counts_as_the_largest_until_it_is_read() -> None:
    bodies = Bodies(100)
    with hold(bodies, transfer_encoding="chunked") as held:
        assert bodies.held == LARGEST
        held.read(3)
        assert bodies.held == 3
    assert bodies.held == 0


def test_what_is_refused_by_its_size_later_does_not_count_for_more_than_the_largest() -> None:
    bodies = Bodies(100)
    with hold(bodies, content_length="999999999999"):
        assert bodies.held == LARGEST


def test_no_body_takes_nothing_and_one_body_always_fits() -> None:
    bodies = Bodies(10)
    with hold(bodies), hold(bodies, content_length="64"):
        assert bodies.held == LARGEST
