"""One field of a multipart body, found without copying the rest: it may be an hour of sound."""

from __future__ import annotations

import re

from ..http.errors import HttpError

_CHARSET = rb'(?:[ \t]*;[ \t]*charset="?[\w-]+"?)?'
_TYPE = re.compile(
    rb"(?i)multipart/form-data" + _CHARSET
    + rb'[ \t]*;[ \t]*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))' + _CHARSET
)  # fmt: skip
_DISPOSITION = re.compile(rb"(?im)^content-disposition[ \t]*:[^\r\n]*")
_TEXT = rb'"(?:[^"\\\r\n]|\\[^\r\n])*"'
# The one form all parsers read alike: RFC 7578 has no unquoted name, and no second one.
_NAME = re.compile(
    rb'(?i)content-disposition:[ \t]*form-data;[ \t]*name="([^"\\\r\n]*)"'
    rb"(?:;[ \t]*filename=" + _TEXT + rb")?(?:;[ \t]*filename\*=[^;\r\n]*)?"
)
_PART_HEAD_MAX = 8192
_VALUE_MAX = 1000


def field(body: bytes, content_type: bytes, name: bytes) -> str | None:
    """The text of the form field `name` (RFC 7578); None when there is no such field.

    Raises HttpError 400 for a body that is no form, that has the field twice, or whose parts are named in
    ways that engines may read differently: what is not seen here would be a model nobody checked.
    """
    found = _TYPE.fullmatch(content_type)
    if found is None:
        raise HttpError(400, "the content-type must be multipart/form-data with a boundary and nothing else")
    mark = b"--" + (found[1] or found[2])
    if not body.startswith(mark + b"\r\n"):
        raise HttpError(400, "the multipart body does not begin with its boundary")
    values = []
    at = len(mark)
    while not body.startswith(b"--", at):
        head_end = body.find(b"\r\n\r\n", at, at + _PART_HEAD_MAX)
        end = body.find(b"\r\n" + mark, max(at, head_end))
        if head_end < 0 or end < 0:
            raise HttpError(400, "the multipart body is cut off, or one of its parts has no head")
        dispositions = _DISPOSITION.findall(body, at, head_end)
        folded = body.find(b"\r\n ", at, head_end) >= 0 or body.find(b"\r\n\t", at, head_end) >= 0
        named = _NAME.fullmatch(dispositions[0]) if len(dispositions) == 1 and not folded else None
        if named is None:
            raise HttpError(
                400, 'each part of a form needs one header `Content-Disposition: form-data; name="…"`'
            )
        if named[1] == name:
            values.append(body[head_end + 4 : min(end, head_end + 4 + _VALUE_MAX)])
        at = end + 2 + len(mark)
    if len(values) > 1:
        raise HttpError(400, f"the form field {name.decode()!r} is there twice")
    try:
        return values[0].decode() if values else None
    except UnicodeDecodeError:
        raise HttpError(400, f"the form field {name.decode()!r} is not valid UTF-8") from None
