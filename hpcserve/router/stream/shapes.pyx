# cython: language_level=3
"""Events just as vLLM writes them, read without a JSON parser: the head of each, the last token's, and the usage.

Every byte of an event is looked at: what is accepted here is what a parser would accept, with the same meaning. What
has another form, escapes or letters beyond ASCII is left to the parser. `answer.pyx` is what uses it, and
`tests/router/stream/test_answer.py` compares that with the reference, which parses.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.string cimport memcmp

cdef extern from *:
    """
    #ifndef HPCSERVE_SOURCE
    #define HPCSERVE_SOURCE ""
    #endif
    """
    const char *HPCSERVE_SOURCE

SOURCE = HPCSERVE_SOURCE.decode()
"""SHA-256 of the files this was compiled from."""

cdef enum:
    MOST_DIGITS = 15


cdef ssize_t _past(const char *text, ssize_t at, ssize_t size, const char *word, ssize_t length) noexcept:
    """Where `word` ends, which has to be there; -1: it isn't, or something before was not."""
    if at < 0 or size - at < length or memcmp(text + at, word, length) != 0:
        return -1
    return at + length


cdef ssize_t _past_plain(const char *text, ssize_t at, ssize_t size) noexcept:
    """Where a string's letters end, all of them ASCII and none escaped."""
    if at < 0:
        return -1
    while at < size and 32 <= text[at] < 127 and text[at] != 34 and text[at] != 92:
        at += 1
    return at


cdef ssize_t _past_number(const char *text, ssize_t at, ssize_t size, long long *number) noexcept:
    """Where a whole number ends that is not below zero."""
    cdef ssize_t start = at
    if at < 0:
        return -1
    number[0] = 0
    while at < size and 48 <= text[at] <= 57:
        if at - start == MOST_DIGITS:
            return -1
        number[0] = number[0] * 10 + text[at] - 48
        at += 1
    # JSON has no zeros before a number.
    return -1 if at == start or (text[start] == 48 and at - start > 1) else at


cdef ssize_t head_end(const char *event, ssize_t size) noexcept:
    """Behind id, kind, time and model, which an event begins with; -1: it does not."""
    cdef long long number
    cdef ssize_t at = _past(event, 0, size, b'data: {"id":"', 13)
    at = _past(event, _past_plain(event, at, size), size, b'","object":"', 12)
    at = _past(event, _past_plain(event, at, size), size, b'","created":', 12)
    at = _past(event, _past_number(event, at, size, &number), size, b',"model":"', 10)
    return _past(event, _past_plain(event, at, size), size, b'",', 2)


cdef bint usage(const char *event, ssize_t at, ssize_t size, long long *found) noexcept:
    """Is all that follows what was used, and no choice? Tokens of the prompt, in all, and of the answer."""
    at = _past(event, at, size, b'"choices":[],"usage":{"prompt_tokens":', 38)
    at = _past(event, _past_number(event, at, size, found), size, b',"total_tokens":', 16)
    at = _past(event, _past_number(event, at, size, found + 1), size, b',"completion_tokens":', 21)
    return _past(event, _past_number(event, at, size, found + 2), size, b"}}\n\n", 4) == size


cdef bint last(const char *event, ssize_t at, ssize_t size, bytes mark, bytes close, Last *found) noexcept:
    """Is all that follows one choice with a text between `mark` and `close`, and the reason why it ends?"""
    cdef long long number
    cdef ssize_t word, next_
    at = _past(event, at, size, b'"choices":[{"index":0,', 22)
    at = _past(event, at, size, PyBytes_AS_STRING(mark), PyBytes_GET_SIZE(mark))
    found.text = at
    at = found.text_end = _past_plain(event, at, size)
    at = _past(event, at, size, PyBytes_AS_STRING(close), PyBytes_GET_SIZE(close))
    word = at = _past(event, at, size, b'null,"finish_reason":"', 22)
    if at < 0:
        return False
    while at < size and 97 <= event[at] <= 122:
        at += 1
    # Who gives up is for the other way.
    if at - word == 5 and memcmp(event + word, b"abort", 5) == 0:
        return False
    at = _past(event, at, size, b'"', 1)
    next_ = _past(event, at, size, b',"stop_reason":null', 19)
    at = at if next_ < 0 else next_
    next_ = _past(event, at, size, b',"prompt_token_ids":null', 24)
    at = at if next_ < 0 else next_
    next_ = _past(event, at, size, b',"token_ids":[', 14)
    found.ids = found.ids_end = -1
    if next_ >= 0:
        found.ids = next_
        while True:
            at = _past_number(event, next_, size, &number)
            next_ = _past(event, at, size, b",", 1)
            if next_ < 0:
                break
        found.ids_end = at
        at = _past(event, at, size, b"]", 1)
    return _past(event, at, size, b"}]}\n\n", 5) == size
