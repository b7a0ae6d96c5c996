# Giving back the disk space of places in spill files that no value needs any more.
#
# An EMPTY, ZERO or FILLED word that says LAID tells that the file may hold a page at its place. Whoever makes such a word says so (`swing`), at no cost;
# the broker's reclaim thread finds it by a slow pass over the words, a bounded number of them a turn. So nothing is to be remembered by
# anybody, and a death loses nothing: what a broker has not given back its successor finds.
#
# A hole is punched under the slot's writer, like any other change of its place. A store that comes meanwhile makes the word CACHED and DIRTY;
# it cannot be cleaned before the claim is given back, so the hole is never younger than the page. The word is looked at once more under the
# claim: from the look before, it may have been stored to, and cleaned. A load that had found the word SPILLED, before the slot was
# invalidated, may read the hole; it finds the word changed.
#
# Claims are bounded by the thread's share (`sweeper_pins`), and none is waited for.

cdef struct Place:      # one slot whose place is to be given back
    uint64_t word
    uint64_t side       # our claim


cdef uint64_t laid_block(Slot *slots, uint64_t n) noexcept nogil:
    """n, when no value needs any of the n places of one block, and the file may hold a page in it; else 0."""
    cdef uint64_t i, word
    cdef bint laid = False
    for i in range(n):
        word = load_acquire(&slots[i].word)
        if not is_hollow(word):
            return 0
        laid = laid or is_laid(word)
    return n if laid else 0


cdef inline void release_place(Slot *slot, Place *place) noexcept nogil:
    cas(&slot.side, place.side, place.side & CRC)                         # @punch.release


cdef bint claim_place(Arena *a, Slot *slot, Place *place) noexcept nogil:
    """Whether the place is ours, and no value needs it; else nothing has changed."""
    if not take_writer(a, slot, &place.side):
        return False
    place.word = load_acquire(&slot.word)                                 # @punch.again
    if is_hollow(place.word):
        return True
    release_place(slot, place)
    return False


cdef int punch_range(
    Arena *a, uint64_t type_, uint64_t life, int fd, Slot *slots, uint64_t offset, int n, uint64_t block
) noexcept nogil:
    """Gives back up to n places of that life from `offset` on, which `slots` are of, whole blocks of them: how many, or -errno."""
    cdef Place places[BATCH_MAX]
    cdef int i, claimed = 0, done = 0, failed = 0
    while claimed < n and claim_place(a, &slots[claimed], &places[claimed]):
        claimed += 1
    # The life before the claims (the caller's look) and after the words: words, claims and file belong to one life, as in clean_claim.
    if load_acquire(&a.types[type_].life) == life:
        done = claimed if claimed == n else <int>(claimed - claimed % block)
    if done and fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset * a.page_size, done * a.page_size):  # @punch.hole
        failed, done = -errno, 0
    for i in range(done):
        # Lost to a store: its page will be written when the claim is given back.
        if is_laid(places[i].word) and cas(&slots[i].word, places[i].word, punched_word(places[i].word)):  # @punch.word
            count(a, C_PUNCHED)
    for i in range(claimed):
        release_place(&slots[i], &places[i])
    return failed if failed else done


cdef inline uint64_t pages_of_block(Arena *a, int fd) noexcept nogil:
    """Pages that share a block of the file system, which goes back only as a whole; 1 also where a block has more pages than we may claim:
    some file systems tell a size that is no block's.
    """
    cdef stat_t found
    cdef uint64_t pages
    if fstat(fd, &found) < 0 or <uint64_t>found.st_blksize <= a.page_size:
        return 1
    pages = <uint64_t>found.st_blksize // a.page_size
    return pages if pages <= <uint64_t>a.sweeper_pins else 1


cdef bint punch_type(Arena *a, uint64_t type_, uint64_t life, int fd, int64_t *budget, int *ranges) noexcept nogil:
    """Goes on through that life's slots from `punch_offset`; whether it has come to their end. Both bounds are counted down."""
    cdef uint64_t base = load_acquire(&a.types[type_].base), slots = load_acquire(&a.types[type_].slots)
    cdef uint64_t block = pages_of_block(a, fd), at = a.punch_offset - a.punch_offset % block
    cdef uint64_t most = <uint64_t>a.sweeper_pins, run, found
    cdef int done
    if slots > a.slots_count or base > a.slots_count - slots or load_acquire(&a.types[type_].life) != life:
        return True
    while at < slots and budget[0] > 0 and ranges[0] > 0:
        run = 0
        while at + run < slots and run + block <= most:
            found = laid_block(&a.slots[base + at + run], min(block, slots - at - run))
            budget[0] -= <int64_t>block
            if not found:
                break
            run += found
        if not run:
            at += block
            continue
        ranges[0] -= 1
        done = punch_range(a, type_, life, fd, &a.slots[base + at], at, <int>run, block)
        if done == -EOPNOTSUPP or done == -ENOSYS:
            a.unpunchable[type_] = life
            return True
        if done < 0:  # the next pass tries again; a disk that fails is not asked for every place of it in one turn
            ranges[0] = 0
        at += run if done < 0 or done == <int>run else <uint64_t>done + block  # past the one that was not to be had
    a.punch_offset = at
    return at >= slots


cdef bint punch_some(Arena *a) noexcept nogil:
    """One turn: at most PUNCH_SLOTS words are looked at, and PUNCH_RANGES ranges given back. Whether the pass has come to its end."""
    cdef int64_t budget = PUNCH_SLOTS
    cdef int ranges = PUNCH_RANGES, fd
    cdef uint64_t type_, life
    cdef bint private_ = False, ended
    while a.punch_type < 256:
        type_ = a.punch_type
        life = load_acquire(&a.types[type_].life)
        ended = True
        if life & 1 and a.unpunchable[type_] != life:
            fd = spill_open(a, type_, life, &private_)
            if fd >= 0:
                ended = punch_type(a, type_, life, fd, &budget, &ranges)
                spill_done(a, type_, fd, private_)
        if not ended:
            return False
        a.punch_type, a.punch_offset = type_ + 1, 0
    a.punch_type = 0
    return True
