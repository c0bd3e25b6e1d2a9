"""Forms, in whatever pieces they come."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from hpcserve.batch.api.form import Form
from hpcserve.http.errors import HttpError

KIND = b"multipart/form-data; boundary=mark"
# Everything that looks like the beginning of a mark, and is none.
FILE = b"\r\n--mar\r\n-\r\n--marx\r\r\n" + b"\r\n--mark"[:-1] + b"\n" + bytes(range(256))
BODY = (
    b'--mark\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b"--mark\r\ncontent-type: text/plain\r\n"
    b'content-disposition:form-data;name="file"; filename="a \\"b\\".jsonl"'
    b"\r\n\r\n" + FILE + b"\r\n--mark--\r\n"
)


async def read(body: bytes, size: int, kind: bytes = KIND) -> list[tuple[str, str | None, bytes]]:
    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(body), size):
            yield body[at : at + size]

    form = Form(kind, pieces())
    return [
        (part.name, part.filename, b"".join([piece async for piece in form.data()]))
        async for part in form.parts()
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 9, 11, 64, 100_000])
async def test_parts_are_whole_however_the_bytes_come(size: int) -> None:
    assert await read(BODY, size) == [("purpose", None, b"batch"), ("file", 'a "b".jsonl', FILE)]


async def test_a_preamble_and_a_quoted_boundary_are_read() -> None:
    found = await read(b"hello\r\n" + BODY, 10, b'Multipart/Form-Data; charset=utf-8; boundary="mark"')
    assert found[1][2] == FILE


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "cut off"),
        (BODY[:-10], "cut off"),
        (BODY[:40], "cut off"),
        (b"--mark\r\nContent-Type: x\r\n\r\na\r\n--mark--", "needs one header"),
        (b"--mark\r\nX: " + b"y" * 100_000, "too long"),
        (b"x" * 100_000, "does not begin"),
        (
            b'--mark\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 40 + b"--mark--",
            "more than 32",
        ),
    ],
)
async def test_what_is_no_form_is_told(body: bytes, told: str) -> None:
    with pytest.raises(HttpError, match=told) as refused:
        await read(body, 1000)
    assert refused.value.status == 400


async def test_a_short_field_may_not_be_long() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'--mark\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n'
        while True:
            yield b"x" * 10_000

    form = Form(KIND, pieces())
    with pytest.raises(HttpError, match="longer than"):
        async for _ in form.parts():
            await form.text()
