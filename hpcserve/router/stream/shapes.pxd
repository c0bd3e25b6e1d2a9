cdef struct Last:
    # Places in an event that ends an answer.
    ssize_t text      # of the text, where it begins
    ssize_t text_end
    ssize_t ids       # of the tokens, and where they end; -1: there are none
    ssize_t ids_end


cdef ssize_t head_end(const char *event, ssize_t size) noexcept
cdef bint usage(const char *event, ssize_t at, ssize_t size, long long *found) noexcept
cdef bint last(const char *event, ssize_t at, ssize_t size, bytes mark, bytes close, Last *found) noexcept
