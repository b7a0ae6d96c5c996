# Cleaning: writing dirty pages to their places in the spill file.
#
# Two writes of one place must not overlap or overtake each other, or the older could land last; hence `writer` in the
# side word. While it is held with a write under way, the slot cannot become SPILLED: only cleaning takes DIRTY off,
# and cleaning needs the writer. So whoever reads the file reads a finished write.

cdef struct Clean:      # one slot to be cleaned
    uint64_t key
    uint64_t life       # of the type
    uint64_t offset     # of the slot in it
    uint64_t word       # that was found dirty
    uint64_t side       # our claim, with the checksum that it carries
    int status          # OK: clean, or superseded; BUSY: try again later; ENDED; -errno

cdef enum:
    CLAIMED = 100       # between claim and release, inside clean_batch only


cdef bint take_writer(Arena *a, Slot *slot, uint64_t *mine) noexcept nogil:
    """Claims the slot's place in the file, if nobody has it: our side word in `mine`."""
    cdef uint64_t side = load_acquire(&slot.side), tag
    # A dead writer's claim is taken over, broker or not: its writes were synchronous, so none is under way. The claim was read
    # before its holder was found dead, and its tag tells it from one that a successor of that number makes meanwhile.
    if side >> 32 and not has_ended(a, side >> 52):
        return False
    # The tag tells two claims of one client apart: a thread that slept through the end of the type's life, in which
    # the side words were reset, cannot give back a claim that another thread of its process holds in the next one.
    tag = fetch_add(&a.me.tag, 1) & 0xfffff
    mine[0] = (((a.number << 20) | tag) << 32) | (side & CRC)
    return cas(&slot.side, side, mine[0])                                # @clean.claim @punch.claim


cdef void clean_claim(Arena *a, Clean *c) noexcept nogil:
    cdef uint64_t type_ = c.key >> KEY_SHIFT
    cdef Slot *slot = &a.slots[c.key & SLOT]
    cdef uint64_t slots
    if not (load_acquire(&slot.word) & DIRTY):
        c.status = OK
        return
    # The life before the claim and again after the word: word, file and claim belong to one life. Read after the
    # claim, it could be that of a new life, whose beginning has taken this claim off: we would write its file holding
    # nothing.
    c.life = load_acquire(&a.types[type_].life)                          # @clean.life
    if not take_writer(a, slot, &c.side):
        c.status = BUSY
        return
    c.word = load_acquire(&slot.word)                                    # @clean.read
    # Between the two looks at the life: the ranges of living types do not overlap, so a slot in this range is this
    # life's. A key of an earlier life may lead to a slot that another type has by now, whose page is none of ours.
    c.offset = (c.key & SLOT) - load_acquire(&a.types[type_].base)
    slots = load_acquire(&a.types[type_].slots)
    c.status = CLAIMED
    if not (c.life & 1) or load_acquire(&a.types[type_].life) != c.life or c.offset >= slots:
        c.status = ENDED
    elif state_of(c.word) != CACHED or not (c.word & DIRTY):
        c.status = OK
    elif (c.word & PAYLOAD) >= a.nursery:
        c.status = DAMAGED
    if c.status != CLAIMED:
        cas(&slot.side, c.side, c.side & CRC)                            # @clean.release


cdef void clean_finish(Arena *a, Clean *c, uint32_t crc, int written) noexcept nogil:
    cdef Slot *slot = &a.slots[c.key & SLOT]
    cdef uint64_t summed = (c.side & ~CRC) | crc
    c.status = written
    if written < 0:
        count(a, C_SPILL_FAILURES)
    if written == OK:
        # The checksum first: from the CAS below on the slot may be evicted and read from the file by anybody, also
        # when we die here.
        if not cas(&slot.side, c.side, summed):                          # @clean.crc
            c.status = ENDED
            return
        c.side = summed
        # Lost to a newer value: that one is DIRTY still, will be written after our claim, and the file's content does
        # not matter. 28 bits of version could only repeat if this slot changed 2^28 times during one write, and hit
        # this very page.
        if cas(&slot.word, c.word, next_word(c.word, CACHED, c.word & PAYLOAD)):  # @clean.dirty_off
            count(a, C_CLEANED)
    cas(&slot.side, c.side, c.side & CRC)                                # @clean.release


cdef void write_run(Arena *a, Clean *batch, int n, int fd) noexcept nogil:
    """Writes n claimed neighbours in one write, if the file takes it, and gives the claims back. A page that it refuses keeps none of
    the others from being written.
    """
    cdef iovec parts[BATCH_MAX]
    cdef uint32_t crcs[BATCH_MAX]
    cdef uint64_t type_ = batch[0].key >> KEY_SHIFT
    cdef int i, done = 0, whole, written
    for i in range(n):
        parts[i].iov_base = page_bytes(a, batch[i].word & PAYLOAD)
        parts[i].iov_len = a.page_size
        crcs[i] = crc32c_page(&a.crc, <uint8_t *>parts[i].iov_base)
    while done < n:
        written = spill_write(a, type_, fd, parts + done, n - done, (batch[0].offset + done) * a.page_size, &whole)  # @clean.write
        for i in range(done, done + whole):
            clean_finish(a, &batch[i], crcs[i], OK)
        done += whole
        if written != OK:
            clean_finish(a, &batch[done], 0, written)
            done += 1


cdef void clean_claimed(Arena *a, Clean *batch, int n, const Handle *own) noexcept nogil:
    """Claims n slots, writes them in runs of at most `run_max` neighbours and releases them: holds no more than n claims, waits for
    nobody.
    """
    cdef uint64_t type_
    cdef int i, k, first, run, fd, failed
    cdef bint is_own, private_ = False
    for i in range(n):
        clean_claim(a, &batch[i])
    first = 0
    while first < n:
        if batch[first].status != CLAIMED:
            first += 1
            continue
        run = 1
        while (
            run < a.run_max
            and first + run < n
            and batch[first + run].status == CLAIMED
            and batch[first + run].key == batch[first].key + run
            and batch[first + run].life == batch[first].life
        ):
            run += 1
        type_ = batch[first].key >> KEY_SHIFT
        is_own = own != NULL and own.type == type_ and own.life == batch[first].life
        fd = own.fd if is_own else spill_open(a, type_, batch[first].life, &private_)
        if fd >= 0:
            write_run(a, &batch[first], run, fd)
            if not is_own:
                spill_done(a, type_, fd, private_)
        else:
            failed = fd if load_acquire(&a.types[type_].life) == batch[first].life else ENDED  # and its file gone
            for k in range(run):
                clean_finish(a, &batch[first + k], 0, failed)
        first += run


cdef void clean_batch(Arena *a, Clean *batch, int n, int pins, const Handle *own) noexcept nogil:
    """Cleans n slots, in order of their keys; neighbours go in one write. Never waits for a claim.

    The caller has `pins`, at least one, and so many claims are held at once. `own`: a handle whose file is open, or
    NULL.
    """
    cdef int first = 0
    while first < n:
        clean_claimed(a, batch + first, min(pins, n - first), own)
        first += pins


cdef int clean_wait(Arena *a, const Handle *t, uint64_t key, uint64_t word, Patience *patience) noexcept nogil:
    """Until `word` of that slot is clean or superseded: OK, BUSY at the deadline, ENDED, or -errno.

    Holds nothing, neither claim nor pin, while it waits.
    """
    cdef Clean one
    cdef unsigned step = 0
    one.key = key
    while load_acquire(&a.slots[key & SLOT].word) == word:
        if pin(a, 1):
            clean_batch(a, &one, 1, 1, t)
            unpin(a, 1)
            if one.status != BUSY:
                return one.status
        if is_over(patience):
            return BUSY
        back_off(step)
        step += 1
    return OK


cdef void clean_all(Arena *a, const Handle *t, Clean *batch, const uint64_t *words, int n, Patience *patience) noexcept nogil:
    """Cleans n slots, in order of their keys, whose `words` were found dirty; waits for those that others are writing.

    Each slot's status is OK, BUSY at the deadline, ENDED, or -errno.
    """
    cdef unsigned step = 0
    cdef int i, pins
    while True:
        pins = pin(a, n)
        if pins:
            break
        if is_over(patience):
            for i in range(n):
                batch[i].status = BUSY
            return
        back_off(step)
        step += 1
    clean_batch(a, batch, n, pins, t)
    unpin(a, pins)
    for i in range(n):
        if batch[i].status == BUSY:
            batch[i].status = clean_wait(a, t, batch[i].key, words[i], patience)
