"""The fields of a multipart body: a model that an engine would read and the router would not is refused."""

from __future__ import annotations

import pytest
import requests

from hpcserve.http.errors import HttpError
from hpcserve.router import form

TYPE = b"multipart/form-data; boundary=b"
NAME = b"Content-Disposition: form-data; name="
END = b"--b--\r\n"


def part(head: bytes, value: bytes = b"toy") -> bytes:
    return b"--b\r\n" + head + b"\r\n\r\n" + value + b"\r\n"


@pytest.mark.parametrize(
    "head",
    [
        NAME + b"model",
        NAME + b' "model"',
        b'Content-Disposition: form-data; name = "model"',
        b"Content-Disposition: form-data; name*=utf-8''model",
        b'Content-Disposition: form-data; name="a"; name="model"',
        NAME + b'"model"; name="a"',
        NAME + b'"a"; filename="b"; name="model"',
        NAME + b'"a"; filename="b\\"; name="model"',
        NAME + b'"mo\\del"',
        NAME + b'"a"\r\n' + NAME + b'"model"',
        NAME + b'"a"\r\n ; name="model"',
        NAME + b'"a"\n' + NAME + b'"model"',
        b'Content-Disposition : form-data; name="model"',
        b"Content-Type: text/plain",
        b'Content-Disposition: attachment; name="model"',
    ],
)
def test_part_that_may_be_named_otherwise_is_refused(head):
    with pytest.raises(HttpError) as refusal:
        form.field(part(NAME + b'"file"') + part(head) + END, TYPE, b"model")
    assert refusal.value.status == 400


@pytest.mark.parametrize(
    "kind",
    [
        b"application/x-www-form-urlencoded; boundary=b",
        b"multipart/mixed; boundary=b",
        b"multipart/form-data; boundary=a; boundary=b",
        b"multipart/form-data; boundary=b; boundary=a",
        b"multipart/form-data; boundary*=utf-8''b",
        b"multipart/form-data",
        b"text/plain, multipart/form-data; boundary=b",
        b"",
    ],
)
def test_type_that_may_mean_another_body_is_refused(kind):
    with pytest.raises(HttpError):
        form.field(part(NAME + b'"model"') + END, kind, b"model")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        END,
        b"\r\n" + part(NAME + b'"model"') + END,
        b"preamble\r\n" + part(NAME + b'"model"') + END,
        part(NAME + b'"model"'),
        part(NAME + b'"model"').replace(b"\r\n", b"\n") + b"--b--\n",
        b"--b  \r\n" + part(NAME + b'"model"')[5:] + END,
        part(NAME + b'"model"') + part(NAME + b'"model"') + END,
    ],
)
def test_body_that_is_no_plain_form_is_refused(body):
    with pytest.raises(HttpError):
        form.field(body, TYPE, b"model")


def test_forms_of_usual_clients_are_read():
    for files in ({"file": ('a "b" é.wav', b"\r\n--x\r\n", "audio/wav")}, {"file": b"1"}):
        data = {"model": "toy", "stream": "true"}
        request = requests.Request("POST", "http://x", data=data, files=files).prepare()
        kind = str(request.headers["content-type"]).encode()
        assert isinstance(request.body, bytes)
        assert form.field(request.body, kind, b"model") == "toy"
        assert form.field(request.body, kind, b"prompt") is None
    quoted = part(NAME + b'"file"; filename="a.wav"; filename*=UTF-8\'\'a.wav\r\nContent-Type: audio/wav')
    assert form.field(quoted + part(NAME + b'"model"') + END, TYPE, b"model") == "toy"
    charset = TYPE + b"; charset=ISO-8859-1"
    assert form.field(part(NAME + b'"model"') + END, charset, b"model") == "toy"
    assert form.field(part(NAME + b'"model"') + END, b'Multipart/Form-Data; Boundary="b"', b"model") == "toy"
