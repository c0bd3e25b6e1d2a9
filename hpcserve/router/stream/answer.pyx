# cython: language_level=3
"""An engine's stream on its way to the client, compiled: `generated.py` in the same steps, which is the reference.

It has the same attributes, so that the pump, and whoever goes on with a broken stream, can't tell the two apart.
`tests/router/stream/test_answer.py` feeds both the same and compares what they write and know.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memchr, memcmp

import msgspec

from .events import HELD_MAX, Held
from .shapes cimport Last, head_end, last, usage
from .generated import (
    SGLANG_CHAT_TEXT, Chunk, EngineFault, fault_of, given_up, loosely, marks_of, without_ids,
)

cdef extern from "<string.h>" nogil:
    void *memmem(const void *text, size_t size, const void *mark, size_t mark_size)

cdef extern from *:
    """
    #ifndef HPCSERVE_SOURCE
    #define HPCSERVE_SOURCE ""
    #endif
    """
    const char *HPCSERVE_SOURCE

SOURCE = HPCSERVE_SOURCE.decode()
"""SHA-256 of the files this was compiled from."""

cdef object _decode = msgspec.json.Decoder().decode
cdef object _decode_chunk = msgspec.json.Decoder(Chunk).decode
cdef object _encode = msgspec.json.Encoder().encode
cdef tuple _IN_CHAT = marks_of(True), _IN_TEXT = marks_of(False)
cdef dict _quiet_chats = {}, _quiet_texts = {}
"""Events that only open an answer, from behind their heads on: they were parsed once, and say no more."""
cdef bytes _DONE = b"data: [DONE]\n\n"
cdef enum:
    MANY = 4096  # bytes of ids that are not copied
    LONGEST_QUIET = 512
    MOST_QUIET = 64
    OTHER = 0
    USED = 1
    ENDED = 2


cdef ssize_t _find(const char *text, ssize_t start, ssize_t stop, const char *mark, ssize_t size) noexcept:
    """As bytes.find() with indexes that are not negative."""
    if stop - start < size:
        return -1
    cdef const char *found = <const char *>memmem(text + start, stop - start, mark, size)
    return -1 if found == NULL else found - text


cdef ssize_t _first_event(const char *text, ssize_t start, ssize_t size) noexcept:
    """As events.first_event()."""
    cdef const char *found = <const char *>memchr(text + start, 10, size - start)
    cdef ssize_t at
    if found == NULL:
        return size
    at = found - text
    if at + 1 < size and text[at + 1] == 10:
        return at + 2
    while True:
        if at >= start + 1 and text[at - 1] == 10:
            return at + 1
        if at >= start + 3 and memcmp(text + at - 3, b"\r\n\r\n", 4) == 0:
            return at + 1
        found = <const char *>memchr(text + at + 1, 10, size - at - 1)
        if found == NULL:
            return size
        at = found - text


cdef class AnswerStream:
    """Hands an engine's events to `write`, less what the client did not ask for, and keeps account."""

    def __init__(self, write, asked, *, bint chat, on_prompt_ids=None):
        self._write = write
        self._on_prompt_ids = on_prompt_ids
        self._keep_ids = self.wants_ids = asked.wants_ids
        self.wants_usage = asked.wants_usage
        self._mark, self._close = _IN_CHAT if chat else _IN_TEXT
        self._held = None
        self.chat = chat
        self.head = b""
        self.text = bytearray()
        self.ids = bytearray()
        self.plain = True

    def write_to(self, write):
        self._write = write

    def prompt_ids_to(self, on_prompt_ids):
        self._on_prompt_ids = on_prompt_ids

    @property
    def marks(self):
        return self._mark, self._close

    @property
    def prompt_ids(self):
        return None if self._prompt_ids is None else bytes(self._prompt_ids)

    @property
    def whole(self):
        return self._held is None or not self._held.size

    @property
    def tokens(self):
        return self.ids.count(b",")

    def sent(self):
        return _decode(b'"' + bytes(self.text) + b'"')

    def feed(self, bytes piece):
        """Take a piece of the engine's body. Raises EngineFault."""
        self.take(piece, 0, PyBytes_GET_SIZE(piece))

    cdef take(self, bytes data, ssize_t start, ssize_t end):
        """As feed(), of `data[start:end]`."""
        self.pieces += 1
        cdef const char *text = PyBytes_AS_STRING(data)
        cdef ssize_t size = end - start
        cdef bytes out
        if (self._held is None or not self._held.size) and size >= 2 and text[end - 1] == 10 and text[end - 2] == 10:
            if start < _find(text, start, end, b"\n", 1) == end - 2:
                out = self._event(data, start, end)
                if out:
                    self._write(out)
            else:
                self._several(data, start, end)
            return
        if self._held is None:
            self._held = Held()
        whole = self._held.cut(data[start:end])
        if self._held.size > HELD_MAX:
            raise EngineFault("an event is longer than the router holds", status=502, event=None)
        if whole:
            self._several(whole, 0, PyBytes_GET_SIZE(whole))

    cdef _several(self, bytes data, ssize_t start, ssize_t end):
        cdef list out = []
        cdef ssize_t stop
        cdef const char *text = PyBytes_AS_STRING(data)
        try:
            while start < end:
                stop = _first_event(text, start, end)
                event = self._event(data, start, stop)
                start = stop
                if event:
                    out.append(event)
        finally:
            # What came before a fault is the client's.
            if out:
                self._write(out[0] if len(out) == 1 else b"".join(out))

    def end(self):
        """The engine's stream is whole."""
        if self._held is not None and self._held.size:
            self._write(self._held.take())

    def drop_half(self):
        """The engine's stream broke: forget the start of an event that will not come."""
        if self._held is not None:
            self._held.take()

    cdef bytes _event(self, bytes data, ssize_t start, ssize_t end):
        """What the client gets of the event that lies there in `data`."""
        cdef const char *text = PyBytes_AS_STRING(data)
        cdef ssize_t at, begin, stop, stop_at, last, mark = PyBytes_GET_SIZE(self._mark)
        cdef const char *event = text + start
        cdef ssize_t size = end - start
        if size == 14 and memcmp(event, <const char *>_DONE, 14) == 0:
            self.done = True
            return _DONE
        if not self.introduced or _find(event, 0, size, b'"finish_reason":null', 20) < 0:
            return self._unusual(data, start, end)
        at = _find(event, 0, size, b'"token_ids":[', 13)
        stop_at = at if at > 0 else size
        begin = _find(event, 0, size, self._mark, mark) + mark
        stop = _find(event, begin, stop_at, self._close, PyBytes_GET_SIZE(self._close))
        if stop <= 0 or begin < mark or _find(event, stop, stop_at, b'"finish_reason":null', 20) <= 0:
            return self._unusual(data, start, end)
        self.events += 1
        self.steady = True
        self.text += event[begin:stop]
        if at < 0:
            # No ids were asked for: text is all there is to count.
            return event[:size]
        last = _find(event, at, size, b"]", 1)
        if last < 0:
            # As slices of Python have it, which end one before the end.
            last = size - 1
            ids = event[at + 13:last]
            rest = event[:size]
        else:
            ids = event[at + 13:last] if last > at + 13 else b""
            rest = event[last + 1:size]
        self.ids += ids
        self.ids += b","
        if stop > begin:
            self.reached = len(self.ids)
            self.single = b"," not in ids
        return event[:size] if self._keep_ids else event[:at + 12] + b"null" + rest

    # Events that are decoded: the first, the last, and those of other engines.

    cdef bytes _unusual(self, bytes data, ssize_t start, ssize_t end):
        cdef const char *text = PyBytes_AS_STRING(data)
        cdef bytes event, quiet = None
        cdef ssize_t at, close, head, stop
        self.steady = False
        cdef Last found
        cdef int known = self._known(text + start, end - start, &found)
        if known == USED:
            return data[start:end] if self.wants_usage else b""
        if known == ENDED:
            if self._keep_ids or found.ids < 0:
                return data[start:end]
            return data[start:start + found.ids - 1] + b"null" + data[start + found.ids_end + 1:end]
        if end - start < 7 or memcmp(text + start, b"data: {", 7) != 0:
            event = PyBytes_FromStringAndSize(text + start, end - start)
            if not event.startswith(b"data:"):
                return event
            if event[5:12].strip().startswith(b"[DONE]"):
                self.done = True
                return event
        at = _find(text, start, end, b'"prompt_token_ids":[', 20)
        if at < 0:
            event = PyBytes_FromStringAndSize(text + start, end - start)
        else:
            # Out of it before decoding: there can be tens of thousands.
            close = _find(text, at, end, b"]", 1)
            if self._on_prompt_ids is not None:
                stop = close if close >= 0 else end - 1
                # Seldom does anybody want them: many stay where they are.
                raw = data[at + 20:stop] if stop - at < MANY else memoryview(data)[at + 20:stop]
                if self._on_prompt_ids(raw):
                    self._prompt_ids = raw
            if self._keep_ids:
                event = data[start:end]
            else:
                event = data[start:at + 19] + b"null" + data[close + 1 if close >= 0 else start:end]
        head = head_end(PyBytes_AS_STRING(event), PyBytes_GET_SIZE(event))
        if 0 < head and PyBytes_GET_SIZE(event) - head <= LONGEST_QUIET:
            quiet = event[head:]
            if quiet in (_quiet_chats if self.chat else _quiet_texts):
                self._open(event)
                self.introduced = True
                return event
        try:
            chunk = _decode_chunk(PyBytes_FromStringAndSize(PyBytes_AS_STRING(event) + 5, PyBytes_GET_SIZE(event) - 5))
        except (msgspec.DecodeError, UnicodeDecodeError):
            chunk = loosely(event[5:])
            if chunk is None:
                self.introduced, self.plain = True, False
                return event
            quiet = None
        if chunk.error is not None:
            fault = fault_of(chunk.error, event)
            if fault.status >= 500:
                raise fault
            # The request is to blame, and would fare no better elsewhere.
            self.has_error = self.finished = True
            return event
        if not chunk.choices:
            if chunk.usage is not None:
                self.usage = chunk.usage
                return event if self.wants_usage else b""
            return event
        self._open(event)
        if quiet is not None and self._is_quiet(chunk, event):
            self._remember(quiet)
        for choice in chunk.choices:
            self._choice(choice)
        if self.chat and SGLANG_CHAT_TEXT in event:
            self._mark = SGLANG_CHAT_TEXT
        self.introduced = True
        if self._keep_ids or _find(PyBytes_AS_STRING(event), 0, PyBytes_GET_SIZE(event), b'"token_ids":[', 13) < 0:
            return event
        return without_ids(event)

    cdef int _known(self, const char *event, ssize_t size, Last *found):
        """OTHER: nothing was done about it. Else it has a form that `shapes` knows, and was taken in; ENDED: its
        parts are in `found`."""
        cdef long long used[3]
        cdef ssize_t at = head_end(event, size)
        cdef bytes ids
        if at < 0:
            return OTHER
        if usage(event, at, size, used):
            self.usage = {"prompt_tokens": used[0], "total_tokens": used[1], "completion_tokens": used[2]}
            return USED
        if not self.head or not last(event, at, size, self._mark, self._close, found):
            return OTHER
        if found.ids >= 0:
            ids = PyBytes_FromStringAndSize(event + found.ids, found.ids_end - found.ids)
            self.ids += ids
            self.ids += b","
        if found.ids >= 0 or found.text_end > found.text:
            self.events += 1
        if found.text_end > found.text:
            self.text += event[found.text:found.text_end]
            self.reached = len(self.ids)
            self.single = found.ids >= 0 and b"," not in ids
        self.introduced = self.finished = True
        return ENDED

    cdef _open(self, bytes event):
        if self.head:
            return
        cdef ssize_t at = _find(PyBytes_AS_STRING(event), 0, PyBytes_GET_SIZE(event), b'"choices":', 10)
        if at > 0:
            self.head = event[5:at].lstrip()

    cdef bint _is_quiet(self, chunk, bytes event) except -1:
        """Does it change nothing but that the answer has begun?"""
        if b'"token_ids":[' in event or SGLANG_CHAT_TEXT in event:
            return False
        for choice in chunk.choices:
            if choice.finish_reason is not None or choice.token_ids or (choice.text and not self.chat):
                return False
            delta = choice.delta if self.chat else None
            if isinstance(delta, dict):
                for key, value in (<dict>delta).items():
                    if value and key != "role":
                        return False
            elif delta is not None:
                return False
        return True

    cdef _remember(self, bytes quiet):
        cdef dict known = _quiet_chats if self.chat else _quiet_texts
        if len(known) >= MOST_QUIET:
            known.clear()
        known[quiet] = True

    cdef _choice(self, choice):
        reason, text = choice.finish_reason, choice.text
        if reason == "abort":
            raise given_up()
        if self.chat:
            text = None
            delta = choice.delta
            if isinstance(delta, dict):
                text = delta.get("content")
                for key, value in (<dict>delta).items():
                    if value and key != "content" and key != "role":
                        self.plain = False
        ids = choice.token_ids or ()
        if len(ids) == 1 and type(ids[0]) is int:
            self.ids += b"%d," % ids[0]
        elif ids:
            self.ids += ",".join(map(str, ids)).encode() + b","
        if ids or text:
            self.events += 1
        if text:
            self.text += _encode(text)[1:-1]
            self.reached = len(self.ids)
            self.single = len(ids) == 1
        if reason is not None:
            self.finished = True
