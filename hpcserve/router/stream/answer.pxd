from .shapes cimport Last


cdef class AnswerStream:
    cdef object _write
    cdef object _on_prompt_ids
    cdef object _held
    cdef bytes _mark
    cdef bytes _close
    cdef bint _keep_ids
    # See GeneratedStream for what they are.
    cdef public bint chat
    cdef public bint wants_ids
    cdef public bint wants_usage
    cdef public bytes head
    cdef public bytearray text
    cdef public bytearray ids
    cdef public ssize_t reached
    cdef public bint single
    cdef object _prompt_ids
    cdef public bint plain
    cdef public bint introduced
    cdef public bint finished
    cdef public bint done
    cdef public bint has_error
    cdef public object usage
    cdef public ssize_t events
    cdef public ssize_t pieces
    cdef public bint steady

    cdef take(self, bytes data, ssize_t start, ssize_t end)
    cdef _several(self, bytes data, ssize_t start, ssize_t end)
    cdef bytes _event(self, bytes data, ssize_t start, ssize_t end)
    cdef bytes _unusual(self, bytes data, ssize_t start, ssize_t end)
    cdef int _known(self, const char *event, ssize_t size, Last *found)
    cdef _open(self, bytes event)
    cdef bint _is_quiet(self, chunk, bytes event) except -1
    cdef _remember(self, bytes quiet)
    cdef _choice(self, choice)
