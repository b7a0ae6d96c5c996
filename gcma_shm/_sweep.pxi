# What the broker alone does: sweeping the nursery, promotion into the areas, taking ranges for buffers, deaths, lives
# of types.
#
# Two threads of the broker touch area pages: the reclaim thread fills and evicts, the control thread takes and gives
# back; and clients claim reservations. Each announces itself and then looks for the other (Dekker's algorithm), full fences on both sides, also on
# x86, where a store may pass a later load. Whoever comes second yields: the reclaim thread leaves the page alone, or
# the control thread waits for its one copy.


cdef inline bint room_below(Arena *a, uint64_t share) noexcept nogil:
    """Whether less than 1/share of the nursery is left to be granted."""
    return <int64_t>(load_relaxed(a.hand) + a.nursery - load_relaxed(a.head)) < <int64_t>(a.nursery // share)


cdef inline bint is_taken(Arena *a, uint64_t page) noexcept nogil:
    cdef uint64_t range_ = load_acquire(a.taking)
    return page - (range_ >> 32) < (range_ & PAYLOAD)  # unsigned: below the range wraps to far above it


cdef inline bint is_claimed(Arena *a, uint64_t life) noexcept nogil:
    """Whether the area page of that life lies in a reservation that somebody has claimed."""
    cdef uint64_t *claim = claim_of(a, life_owner(life))
    return claim != NULL and load_acquire(claim) & CLAIM_CLIENT != 0


cdef inline void note_lent(Arena *a, AreaEntry *area, uint64_t page, uint64_t life, int by) noexcept nogil:
    """One page of the area more, or less, holds cache. Those of a reservation are counted in its entry, so that a claim need not
    count what it drops.
    """
    cdef uint64_t owner = life_owner(life)
    if 0 < owner <= a.allocations_count:
        fetch_add(&a.allocations[owner - 1].lent, <uint64_t>by)
    else:
        fetch_add(&area.lent, <uint64_t>by)
        add32(<int32_t *>&a.lent_map[page // LENT_BLOCK], by)


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
    note_lent(a, area, page, life, -1)
    return True


cdef bint fill(Arena *a, AreaEntry *area, uint64_t page, uint64_t from_, uint64_t key, uint64_t word) noexcept nogil:
    """Copies nursery page `from_`, which `word` names, into the FREE area page `page`, announced as filling."""
    cdef uint64_t owner = life_owner(load_relaxed(&a.life[page]))
    cdef uint64_t life = next_life(load_relaxed(&a.life[page]), GRANTED, owner)
    store_relaxed(&a.life[page], life)                                    # @promote.grant
    fence_release()  # the new sequence before the first byte: a reader of the page's last content must notice
    store_relaxed(&a.key[page], key)
    store_byte(&a.visited[page], 0)
    racy_copy(page_bytes(a, page), page_bytes(a, from_), a.page_size)     # @promote.copy
    store_release(&a.life[page], published(life) | (owner << OWNER_SHIFT))  # @promote.publish
    # From the exact word that was read before the copy, so the bytes are of the value that it names.
    if cas(&a.slots[key & SLOT].word, word, next_word(word, CACHED, page)):  # @promote.swing
        note_lent(a, area, page, life, 1)
        count(a, C_PROMOTIONS)
        return True
    store_release(&a.life[page], next_life(life, FREE, owner))            # @promote.drop
    return False


cdef void count_promised(Arena *a) noexcept nogil:
    """Brings `promised` up to date. Policy only: what is claimed or filled meanwhile is found when a page is looked at."""
    cdef uint64_t index, area
    cdef AllocationEntry *entry
    memset(a.promised, 0, sizeof(a.promised))
    for index in range(load_relaxed(&a.entries_used)):
        entry = &a.allocations[index]
        area = load_relaxed(&entry.area)
        if load_relaxed(&entry.state) & KIND == RESERVATION and area < AREAS_MAX:
            if load_relaxed(&entry.claim) & CLAIM_CLIENT:
                a.promised[area] += load_relaxed(&entry.pages)
            else:
                a.promised[area] += load_relaxed(&entry.lent)


cdef inline bint has_room(Arena *a, uint64_t index) noexcept nogil:
    cdef AreaEntry *area = &a.areas[index]
    return load_relaxed(&area.lent) + load_relaxed(&area.held) + a.promised[index] < (load_relaxed(&a.ranges[index]) & PAYLOAD)


cdef inline uint64_t pages_to_skip(Arena *a, uint64_t page, uint64_t life, uint64_t first) noexcept nogil:
    """From `page` down to the first of the buffer or claimed reservation that it lies in; at least one."""
    cdef uint64_t owner = life_owner(life), begin
    if not 0 < owner <= a.allocations_count:
        return 1
    begin = max(load_relaxed(&a.allocations[owner - 1].first), first)
    return page - begin + 1 if begin <= page else 1


cdef bint promote(Arena *a, uint64_t index, uint64_t from_, uint64_t key, uint64_t word, bint wanted) noexcept nogil:
    """Copies a clean page into an area. False: no page was found for it, or the slot moved on meanwhile.

    Where there is room, the hand seeks a FREE page. In a full area a `wanted` page takes the place of what CLOCK gives
    up; another one looks at a few pages in search of an orphan, so that values that were overwritten or invalidated do
    not hold their pages for ever.
    """
    cdef AreaEntry *area = &a.areas[index]
    cdef uint64_t range_ = load_acquire(&a.ranges[index]), first = range_ >> 32, n = range_ & PAYLOAD
    cdef bint room = has_room(a, index)
    cdef uint64_t limit = SEEK_MAX if room else (2 * n if wanted and (load_relaxed(&area.lent) or a.promised[index]) else SCRUB_MAX)
    cdef uint64_t step, page, life, state
    cdef bint ready, done = False
    if not n:
        return False
    for step in range(limit):
        page = first + n - 1 - area.clock % n  # down from the top; buffers grow from below
        life = load_relaxed(&a.life[page])
        state = life_state(life)
        # Looking before announcing as well: announcing page after page of a range that is being taken could keep the
        # control thread waiting. Safety rests on the look after the fence.
        if state == BUFFER or is_claimed(a, life):
            area.clock += pages_to_skip(a, page, life, first)
            continue
        area.clock += 1
        if (room and state != FREE) or is_taken(a, page):
            continue
        store_relaxed(a.filling, page + 1)                                # @promote.announce
        fence_full()
        # In this order: whoever took the range before we announced has changed its lives before it took its announcement back,
        # and so has the area that was shrunk; a reservation's claim word is found by the life. BUFFER is nobody's to fill.
        ready = not is_taken(a, page)
        life = load_acquire(&a.life[page])
        ready = ready and life_state(life) != BUFFER and load_relaxed(&a.ranges[index]) == range_ and not is_claimed(a, life)
        ready = ready and make_room(a, area, page, wanted and not room)
        if ready:
            done = fill(a, area, page, from_, key, word)
        store_release(a.filling, 0)                                       # @promote.done @promote.yield
        if load_relaxed(a.taking):  # the control thread has just waited for this
            back_off(YIELD)
        if ready:
            return done
    return False


cdef inline bint may_take(Arena *a, uint64_t index) noexcept nogil:
    return load_relaxed(&a.ranges[index]) & PAYLOAD and is_lent(&a.areas[index])


cdef int64_t area_in_turn(Arena *a) noexcept nogil:
    """Which area takes the next page: the next in turn that has room, else the next in turn; -1: none is lent."""
    cdef uint64_t turn, index
    cdef int64_t next_ = -1
    for turn in range(1, <uint64_t>AREAS_MAX + 1):
        index = (a.next_area + turn) % AREAS_MAX
        if may_take(a, index):
            if next_ < 0:
                next_ = <int64_t>index
            if has_room(a, index):
                a.next_area = index
                return <int64_t>index
    if next_ >= 0:
        a.next_area = <uint64_t>next_
    return next_


cdef bint settle(Arena *a, uint64_t page) noexcept nogil:
    """Ends a nursery page's time: promoted, evicted, or freed as an orphan. Dirty pages and those of a store in flight
    stay: False.
    """
    cdef uint64_t life, key, word
    cdef int64_t index
    cdef bint wanted
    if not look_up(a, page, &life, &key, &word):
        return False
    if names(word, page):
        if word & DIRTY:
            return False
        # Policy, the idea of S3-FIFO (Yang et al., SOSP 2023): the small queue filters out what is never read again.
        wanted = load_byte(&a.visited[page]) & ~READ_AHEAD != 0
        index = area_in_turn(a)
        if index < 0 or not promote(a, <uint64_t>index, page, key, word, wanted):
            return evict(a, page, life, &a.slots[key & SLOT], word)
    return free_orphan(a, page, life)


cdef void clean_tickets(Arena *a, uint64_t ticket, int n, Retries *retries) noexcept nogil:
    """Cleans what is dirty on the pages of n tickets from `ticket` on, sorted so that neighbours in a file go in one
    write. What its file has refused before is left alone; or, in a round of `retries`, nothing else is tried.
    """
    cdef Clean batch[BATCH_MAX]
    cdef uint64_t page, life, key, word
    cdef int i, k, dirty = 0
    for i in range(n):
        page = (ticket + i) % a.nursery
        if retries != NULL and not a.refused[page]:
            continue
        if look_up(a, page, &life, &key, &word) and names(word, page) and word & DIRTY:
            if was_refused(a, page, life) != (retries != NULL):
                continue
            if retries != NULL and not may_retry(retries, page, key >> KEY_SHIFT):
                continue
            k = dirty
            while k and batch[k - 1].key > key:
                batch[k].key = batch[k - 1].key
                k -= 1
            batch[k].key = key
            dirty += 1
    clean_batch(a, batch, dirty, a.sweeper_pins, NULL)  # a share of its own
    for i in range(dirty):
        if batch[i].status < 0:
            note_refused(a, &batch[i])
            if retries != NULL:
                retries.refused[batch[i].key >> KEY_SHIFT] += 1


cdef void sweep_nursery(Arena *a) noexcept nogil:
    """Moves the hand on until enough of the nursery is free, one lap at the most.

    The hand passes what cannot be freed, so a nursery of pages that no file takes does not look low; hence the count of what it passed
    in vain. It goes on after each ticket that somebody draws in vain, and no further: a look costs less than a ticket.
    """
    cdef uint64_t hand = load_relaxed(a.hand), head, swept = 0
    cdef int n, i
    count_promised(a)
    while room_below(a, HIGH_WATER) and swept < a.nursery:
        head = load_relaxed(a.head)
        if hand + a.nursery < head:  # clients were faster and went on by direct reclaim
            hand = head - a.nursery
        n = min(<uint64_t>BATCH_MAX, head - hand)
        clean_tickets(a, hand, n, NULL)
        for i in range(n):
            a.in_vain = 0 if settle(a, (hand + i) % a.nursery) else a.in_vain + 1
            if a.in_vain and a.in_vain % a.nursery == 0:
                store_relaxed(&a.vain_laps, a.vain_laps + 1)
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


cdef uint64_t set_range(
    Arena *a, AreaEntry *area, uint64_t first, uint64_t n, uint64_t state, uint64_t owner
) noexcept nogil:
    """Takes n pages out of the cache's hands, or gives them to it: BUFFER or FREE, under `owner`; returns how many held cache.

    Waits for no client: only for the copy of one page into this range. A reserved range has to be claimed before.
    """
    cdef uint64_t hands = next_life(0, state, owner) & ~SEQUENCE, cached = <uint64_t>PUBLISHED << (LIFE_SHIFT - OWNER_SHIFT)
    cdef uint64_t *lives = a.life
    cdef uint64_t page = first, end = first + n, block_end, at, life, discards = 0, dropped
    cdef unsigned step = 0
    store_relaxed(a.taking, (first << 32) | n)                            # @take.announce
    fence_full()
    while load_acquire(a.filling) - 1 - first < n:                        # @take.wait
        back_off(min(step, <unsigned>YIELD))  # never to sleep: the other thread wants to run, and will be done in a moment
        step += 1
    # From here on this thread is the only one that changes these words, so plain stores do. Readers see the sequence
    # move; words that still name these pages heal when they are read. What the holders of a buffer wrote came before the message,
    # or the death, that brought us here.
    while page < end:
        block_end = min(end, (page // LENT_BLOCK + 1) * LENT_BLOCK)
        dropped = 0
        for at in range(page, block_end):
            life = load_relaxed(&lives[at])
            dropped += (life >> OWNER_SHIFT) == cached  # in nobody's reservation
            store_relaxed(&lives[at], hands | ((life + 1) & SEQUENCE))   # @take.life @give.life @release.life
        if dropped:
            add32(<int32_t *>&a.lent_map[page // LENT_BLOCK], -<int32_t>dropped)
        discards += dropped
        page = block_end
    fetch_add(&area.lent, <uint64_t>0 - discards)
    # All of it before the answer to the client, and so before the first byte that a holder writes.
    fence_full()
    store_release(a.taking, 0)                                            # @take.done
    fetch_add(&a.me.counters[C_DISCARDS], discards)
    return discards


cdef inline bint is_among(const uint64_t *numbers, uint64_t number) noexcept nogil:
    return number < 64 * CLIENT_WORDS and (numbers[number // 64] >> (number % 64)) & 1


cdef void bury(Arena *a, const uint64_t *dead) noexcept nogil:
    """Takes back what dead clients were granted and the claims in their names. Their numbers may be used again afterwards,
    not before.
    """
    cdef uint64_t page, life, key, word, i, side
    for page in range(a.nursery):                                         # @death.grants
        life = load_acquire(&a.life[page])
        if life_state(life) != GRANTED or not is_among(dead, life_owner(life)):
            continue
        # Killed before it wrote the key? Then the old key's word had left this page before it was granted, and does
        # not name it.
        key = load_relaxed(&a.key[page])
        word = load_acquire(&a.slots[key & SLOT].word) if (key & SLOT) < a.slots_count else 0
        cas(&a.life[page], life, published(life) if names(word, page) else next_life(life, FREE, 0))
    for i in range(a.slots_count):
        side = load_acquire(&a.slots[i].side)
        if side >> 52 and is_among(dead, side >> 52):
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
    store_relaxed(&t.base, base)
    store_relaxed(&t.slots, slots)
    fence_full()
    fetch_add(&t.life, 1)                                                 # @type.begin
