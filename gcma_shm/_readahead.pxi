# Reading ahead: a load from the file that goes on where the last ones ended brings the next pages along, into nursery pages.
#
# Not in the buffered way, where the kernel reads ahead. In the direct one each read costs a disk's time, and a longer one hardly more; in the
# uncached one the kernel reads ahead too, but drops all that it has read together when the first page of it was asked for.
#
# What is read ahead is put in place as `refault` does it: the word must be SPILLED, and the very same from before the read until the CAS
# that points it to the page; the checksum must fit. Nobody sees a page before that, so the disk may write it meanwhile. One load of such a
# page proves nothing (`PROVEN`): a scan does not push out what is used. No page at hand: less is read.

cdef struct Ahead:      # one slot whose page is read ahead
    Slot *slot
    uint64_t word
    uint64_t side
    uint64_t page


cdef inline int pages_ahead(Arena *a, Handle *t, uint64_t offset) noexcept nogil:
    """How many pages to read behind the one at `offset`, which is about to be read. Counts the handle's streak. Its threads may count
    into each other's: it is a guess.
    """
    # Unsigned: what is below wraps to far above. A few on the way may have been in memory.
    cdef uint64_t streak = load_relaxed(&t.streak) + 1 if offset - load_relaxed(&t.expected) < AHEAD_GAP else 0
    store_relaxed(&t.streak, streak)
    store_relaxed(&t.expected, offset + 1)
    if streak < AHEAD_FROM:
        return 0
    return <int>min(AHEAD_FIRST << min(streak - AHEAD_FROM, <uint64_t>4), min(<uint64_t>AHEAD_MAX, t.slots - offset - 1))


cdef bint take_ahead(Arena *a, Handle *t, uint64_t offset, Ahead *one) noexcept nogil:
    """Whether the slot can be read ahead; then a page for it is ours."""
    cdef int64_t page
    one.slot = slot_of(a, t, offset)
    one.word = load_acquire(&one.slot.word)
    # Its life as for any load: the word belongs to it, and a later one's word is another.
    if state_of(one.word) != SPILLED or not living(a, t):
        return False
    one.side = load_acquire(&one.slot.side)                               # @ahead.side
    page = grant(a, t, NULL)                                              # @ahead.grant
    if page < 0:
        return False
    one.page = <uint64_t>page
    store_relaxed(&a.key[page], key_of(t, offset))
    store_byte(&a.visited[page], 0)
    return True


cdef void place_ahead(Arena *a, Ahead *one, bint whole) noexcept nogil:
    """Publishes a page that was read, if it is whole and its slot has not moved on."""
    if (
        whole
        and crc32c_page(&a.crc, page_bytes(a, one.page)) == <uint32_t>(one.side & CRC)
        and cas(&one.slot.word, one.word, next_word(one.word, CACHED, one.page))     # @ahead.swing
    ):
        publish(a, one.page)
        count_held(a, load_relaxed(&a.key[one.page]) >> KEY_SHIFT, 1)
        count(a, C_READ_AHEAD)
    else:
        abandon(a, one.page)


cdef int64_t read_with_next(Arena *a, Handle *t, uint64_t offset, uint8_t *out, int n) noexcept nogil:
    """Reads the place at `offset` to `out`, and up to n behind it into the nursery, in one read. What it returns is of the first."""
    cdef iovec parts[AHEAD_MAX + 1]
    cdef Ahead ahead[AHEAD_MAX]
    cdef uint8_t *first = out
    cdef uint64_t size = a.page_size
    cdef int64_t got
    cdef int i, taken = 0
    if a.spill_io == DIRECT and <size_t>out % load32(&a.direct_memory):
        first = <uint8_t *>aligned_alloc(DIRECT_MEMORY, size)
        if first == NULL:
            return -ENOMEM
    while taken < n and take_ahead(a, t, offset + 1 + taken, &ahead[taken]):
        taken += 1
    parts[0].iov_base = first
    parts[0].iov_len = size
    for i in range(taken):
        parts[i + 1].iov_base = page_bytes(a, ahead[i].page)
        parts[i + 1].iov_len = size
    got = read_parts(a, t.type, t.fd, parts, taken + 1, offset * size)    # @ahead.read
    fence_acquire()
    for i in range(taken):
        place_ahead(a, &ahead[i], got >= <int64_t>((i + 2) * size))
    store_relaxed(&t.expected, offset + 1 + taken)
    if first != out:
        if got > 0:
            memcpy(out, first, min(<uint64_t>got, size))
        free(first)
    if got < 0 and taken:  # a place behind ours may be the one that cannot be read
        return spill_read(a, t.type, t.fd, out, size, offset * size)
    return min(got, <int64_t>size)


cdef int64_t read_place(Arena *a, Handle *t, uint64_t offset, uint8_t *out) noexcept nogil:
    """Reads the slot's place in the file: as spill_read."""
    cdef int n = pages_ahead(a, t, offset) if a.spill_io != BUFFERED else 0
    if n > 0:
        return read_with_next(a, t, offset, out, n)
    return spill_read(a, t.type, t.fd, out, a.page_size, offset * a.page_size)
