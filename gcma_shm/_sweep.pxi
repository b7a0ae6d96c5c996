# What the broker alone does: sweeping the nursery, promotion into the areas, taking ranges for buffers, deaths, lives
# of types.
#
# Two threads of the broker touch area pages: the reclaim thread fills and evicts, the control thread takes and gives
# back. Each announces itself and then looks for the other (Dekker's algorithm), full fences on both sides, also on
# x86, where a store may pass a later load. Whoever comes second yields: the reclaim thread leaves the page alone, or
# the control thread waits for its one copy.


cdef inline bint room_below(Arena *a, uint64_t share) noexcept nogil:
    """Whether less than 1/share of the nursery is left to be granted."""
    return <int64_t>(load_relaxed(a.hand) + a.nursery - load_relaxed(a.head)) < <int64_t>(a.nursery // share)


cdef inline bint is_taken(Arena *a, uint64_t page) noexcept nogil:
    cdef uint64_t range_ = load_acquire(a.taking)
    return page - (range_ >> 32) < (range_ & PAYLOAD)  # unsigned: below the range wraps to far above it


cdef bint make_room(Arena *a, AreaEntry *area, uint64_t page, bint may_evict) noexcept nogil:
    """Whether `page`, announced as filling, is FREE now. Policy: CLOCK, one more lap for whoever was visited (Corbato,
    1968).
    """
    cdef uint64_t life = load_relaxed(&a.life[page]), key, word
    if life_state(life) == FREE:
        return True
    if not look_up(a, page, &life, &key, &word):
        return False
    if not names(word, page):
        if not free_orphan(a, page, life):
            return False
    elif not may_evict:
        return False
    elif load_byte(&a.visited[page]):
        store_byte(&a.visited[page], 0)
        return False
    elif not evict(a, page, life, &a.slots[key & SLOT], word):
        return False
    fetch_add(&area.lent, <uint64_t>-1)
    return True


cdef bint fill(Arena *a, AreaEntry *area, uint64_t page, uint64_t from_, uint64_t key, uint64_t word) noexcept nogil:
    """Copies nursery page `from_`, which `word` names, into the FREE area page `page`, announced as filling."""
    cdef uint64_t life = next_life(load_relaxed(&a.life[page]), GRANTED, a.number)
    store_relaxed(&a.life[page], life)                                    # @promote.grant
    fence_release()  # the new sequence before the first byte: a reader of the page's last content must notice
    store_relaxed(&a.key[page], key)
    store_byte(&a.visited[page], 0)
    memcpy(page_bytes(a, page), page_bytes(a, from_), a.page_size)        # @promote.copy
    store_release(&a.life[page], published(life))                         # @promote.publish
    # From the exact word that was read before the copy, so the bytes are of the value that it names.
    if cas(&a.slots[key & SLOT].word, word, next_word(word, CACHED, page)):  # @promote.swing
        fetch_add(&area.lent, 1)
        count(a, C_PROMOTIONS)
        return True
    store_release(&a.life[page], next_life(life, FREE, 0))                # @promote.drop
    return False


cdef inline bint has_room(Arena *a, uint64_t index) noexcept nogil:
    return a.areas[index].lent + a.areas[index].held < a.ranges[index].pages


cdef bint promote(Arena *a, uint64_t index, uint64_t from_, uint64_t key, uint64_t word, bint wanted) noexcept nogil:
    """Copies a clean page into an area. False: no page was found for it, or the slot moved on meanwhile.

    Where there is room, the hand seeks a FREE page. In a full area a `wanted` page takes the place of what CLOCK gives
    up; another one looks at a few pages in search of an orphan, so that values that were overwritten or invalidated do
    not hold their pages for ever.
    """
    cdef AreaEntry *area = &a.areas[index]
    cdef AreaRange range_ = a.ranges[index]
    cdef bint room = has_room(a, index)
    cdef uint64_t limit = SEEK_MAX if room else (2 * range_.pages if wanted and area.lent else SCRUB_MAX)
    cdef uint64_t step, page, state
    cdef bint ready, done = False
    for step in range(limit):
        page = range_.first + range_.pages - 1 - area.clock % range_.pages  # down from the top; buffers grow from below
        area.clock += 1
        state = life_state(load_relaxed(&a.life[page]))
        # Looking before announcing as well: announcing page after page of a range that is being taken could keep the
        # control thread waiting. Safety rests on the look after the fence.
        if state == BUFFER or (room and state != FREE) or is_taken(a, page):
            continue
        store_relaxed(a.filling, page + 1)                                # @promote.announce
        fence_full()
        ready = not is_taken(a, page) and make_room(a, area, page, wanted and not room)
        if ready:
            done = fill(a, area, page, from_, key, word)
        store_release(a.filling, 0)                                       # @promote.done @promote.yield
        if ready:
            return done
    return False


cdef void settle(Arena *a, uint64_t page) noexcept nogil:
    """Ends a nursery page's time: promoted, evicted, or freed as an orphan. Dirty pages and those of a store in flight
    stay.
    """
    cdef uint64_t life, key, word, index, turn
    cdef bint wanted
    if not look_up(a, page, &life, &key, &word):
        return
    if names(word, page):
        if word & DIRTY:
            return
        # Policy, the idea of S3-FIFO (Yang et al., SOSP 2023): the small queue filters out what is never read again.
        wanted = load_byte(&a.visited[page])
        # Areas in turn; where the one whose turn it is has no room, the next that has.
        a.next_area = index = (a.next_area + 1) % a.areas_count
        for turn in range(1, a.areas_count):
            if has_room(a, index):
                break
            index = (a.next_area + turn) % a.areas_count
        if not promote(a, index, page, key, word, wanted):
            evict(a, page, life, &a.slots[key & SLOT], word)
            return
    free_orphan(a, page, life)


cdef int clean_tickets(Arena *a, uint64_t ticket, int n) noexcept nogil:
    """Cleans what is dirty on the pages of n tickets from `ticket` on, sorted so that neighbours in a file go in one
    write.
    """
    cdef Clean batch[BATCH_MAX]
    cdef uint64_t page, life, key, word
    cdef int i, k, dirty = 0
    for i in range(n):
        page = (ticket + i) % a.nursery
        if look_up(a, page, &life, &key, &word) and names(word, page) and word & DIRTY:
            k = dirty
            while k and batch[k - 1].key > key:
                batch[k].key = batch[k - 1].key
                k -= 1
            batch[k].key = key
            dirty += 1
    clean_batch(a, batch, dirty, a.pins_max, NULL)  # the reclaim thread has a share of its own
    return dirty


cdef void sweep_nursery(Arena *a) noexcept nogil:
    """Moves the hand on until enough of the nursery is free, one lap at the most."""
    cdef uint64_t hand = load_relaxed(a.hand), head, swept = 0
    cdef int n, i
    while room_below(a, HIGH_WATER) and swept < a.nursery:
        head = load_relaxed(a.head)
        if hand + a.nursery < head:  # clients were faster and went on by direct reclaim
            hand = head - a.nursery
        n = min(<uint64_t>BATCH_MAX, head - hand)
        clean_tickets(a, hand, n)
        for i in range(n):
            settle(a, (hand + i) % a.nursery)
        hand += n
        swept += n
        store_release(a.hand, hand)


cdef void sweeper_sleep(Arena *a, uint64_t timeout_ns) noexcept nogil:
    """Until a client finds the nursery low, or the time is over.

    The flag goes up before the last look, the client draws its ticket before it looks at the flag: one of the two sees
    the other. (On ARM the client's look may pass its relaxed draw; the timeout bounds what that costs.)
    """
    store32(a.wake, 1)
    fence_full()
    if not room_below(a, LOW_WATER):
        futex_wait(a.wake, 1, timeout_ns)
    store32(a.wake, 0)


cdef uint64_t take_range(Arena *a, AreaEntry *area, uint64_t first, uint64_t n) noexcept nogil:
    """Makes n pages a buffer's; returns how many held cache. Waits for no client: only for the copy of one page into
    this range.
    """
    cdef uint64_t page, life, discards = 0
    cdef unsigned step = 0
    store_relaxed(a.taking, (first << 32) | n)                            # @take.announce
    fence_full()
    while load_acquire(a.filling) - 1 - first < n:                        # @take.wait
        back_off(step)
        step += 1
    # From here on this thread is the only one that changes these words, so plain stores do. Readers see the sequence
    # move; words that still name these pages heal when they are read.
    for page in range(first, first + n):
        life = load_relaxed(&a.life[page])
        discards += life_state(life) == PUBLISHED
        store_relaxed(&a.life[page], next_life(life, BUFFER, 0))          # @take.life
    fetch_add(&area.lent, <uint64_t>0 - discards)
    fetch_add(&area.held, n)
    # All of it before the answer to the client, and so before the first byte that a holder writes.
    fence_full()
    store_release(a.taking, 0)                                            # @take.done
    fetch_add(&a.me.counters[C_DISCARDS], discards)
    return discards


cdef void give_range(Arena *a, AreaEntry *area, uint64_t first, uint64_t n) noexcept nogil:
    """Ends a buffer. What its holders wrote came before the message, or the death, that brought us here."""
    cdef uint64_t page
    fence_release()
    for page in range(first, first + n):
        store_relaxed(&a.life[page], next_life(load_relaxed(&a.life[page]), FREE, 0))  # @give.life
    fetch_add(&area.held, <uint64_t>0 - n)


cdef void bury(Arena *a, uint64_t number) noexcept nogil:
    """Takes back what a dead client was granted and the claims in its name. Its number may be used again afterwards,
    not before.
    """
    cdef uint64_t page, life, key, word, i, side
    for page in range(a.nursery):                                         # @death.grants
        life = load_acquire(&a.life[page])
        if life_state(life) != GRANTED or life_owner(life) != number:
            continue
        # Killed before it wrote the key? Then the old key's word had left this page before it was granted, and does
        # not name it.
        key = a.key[page]
        word = load_acquire(&a.slots[key & SLOT].word) if (key & SLOT) < a.slots_count else 0
        cas(&a.life[page], life, published(life) if names(word, page) else next_life(life, FREE, 0))
    for i in range(a.slots_count):
        side = load_acquire(&a.slots[i].side)
        if side >> 52 == number:
            # Writes are synchronous, so none is under way any more. The word is DIRTY still, or the checksum in place.
            cas(&a.slots[i].side, side, side & CRC)                       # @death.writer


cdef void end_type(Arena *a, TypeEntry *t, uint64_t base, uint64_t slots) noexcept nogil:
    """The life first: from then on no operation starts on these words, and one that started before loses its CAS."""
    cdef uint64_t i, word
    fetch_add(&t.life, 1)                                                 # @type.end
    fence_full()
    for i in range(base, base + slots):
        while True:
            word = load_acquire(&a.slots[i].word)
            if cas(&a.slots[i].word, word, next_word(word, CLOSED, 0)):   # @type.close
                break


cdef void begin_type(Arena *a, TypeEntry *t, uint64_t base, uint64_t slots) noexcept nogil:
    """Empty words under an ended life, then the new life. Versions go on counting, so whoever sleeps since the old one
    loses.
    """
    cdef uint64_t i, word
    for i in range(base, base + slots):
        # A claim that a stopped client of the old life holds here is void: its write goes to the old file, its tag
        # will not fit.
        store_release(&a.slots[i].side, 0)                                # @type.reset
        while True:
            word = load_acquire(&a.slots[i].word)
            if cas(&a.slots[i].word, word, next_word(word, EMPTY, 0)):
                break
    t.base = base
    t.slots = slots
    fence_full()
    fetch_add(&t.life, 1)                                                 # @type.begin
