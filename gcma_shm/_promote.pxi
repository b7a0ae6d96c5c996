# Promotion: copying a clean page from the nursery into an area, by the broker's reclaim thread alone.
#
# Two threads of the broker touch area pages: the reclaim thread fills and evicts, the control thread takes and gives
# back; and clients claim reservations. Each announces itself and then looks for the other (Dekker's algorithm), full fences on both sides, also on
# x86, where a store may pass a later load. Whoever comes second yields: the reclaim thread leaves the page alone, or
# the control thread waits for its one copy.


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


cdef inline bint may_take(Arena *a, uint64_t index) noexcept nogil:
    return load_relaxed(&a.ranges[index]) & PAYLOAD and is_lent(&a.areas[index])


cdef void count_promised(Arena *a) noexcept nogil:
    """Brings `promised` up to date, and how much cache there may be. Policy only: what is claimed or filled meanwhile is found when a
    page is looked at.
    """
    cdef uint64_t index, area, lendable = 0, claimed = 0
    cdef AllocationEntry *entry
    memset(a.promised, 0, sizeof(a.promised))
    for index in range(load_relaxed(&a.entries_used)):
        entry = &a.allocations[index]
        area = load_relaxed(&entry.area)
        if load_relaxed(&entry.state) & KIND == RESERVATION and area < AREAS_MAX:
            if load_relaxed(&entry.claim) & CLAIM_CLIENT:
                a.promised[area] += load_relaxed(&entry.pages)
                claimed += load_relaxed(&entry.pages)
            else:
                a.promised[area] += load_relaxed(&entry.lent)
    for index in range(AREAS_MAX):
        if may_take(a, index):
            lendable += max(load_relaxed(&a.ranges[index]) & PAYLOAD, load_relaxed(&a.areas[index].held)) - load_relaxed(&a.areas[index].held)
    a.lendable = max(lendable, claimed) - claimed
    store_relaxed(a.cache_pages, a.nursery + a.lendable)
    find_crowded(a)


cdef inline bint has_room(Arena *a, uint64_t index) noexcept nogil:
    cdef AreaEntry *area = &a.areas[index]
    return load_relaxed(&area.lent) + load_relaxed(&area.held) + a.promised[index] < (load_relaxed(&a.ranges[index]) & PAYLOAD)


cdef bint make_room(Arena *a, AreaEntry *area, uint64_t page, bint may_evict) noexcept nogil:
    """Whether `page`, announced as filling, is FREE now."""
    cdef uint64_t life = load_relaxed(&a.life[page]), key, word
    if life_state(life) == FREE:
        return True
    if not look_up(a, page, &life, &key, &word):
        return False
    if not names(word, page):
        if not free_orphan(a, page, life):
            return False
    elif not may_evict or not evict(a, page, life, key, word):
        return False
    note_lent(a, area, page, life, -1)
    return True


cdef bint fill(Arena *a, AreaEntry *area, uint64_t page, uint64_t from_, uint64_t key, uint64_t word) noexcept nogil:
    """Copies nursery page `from_`, which `word` names, into the FREE area page `page`, announced as filling."""
    cdef uint64_t owner = life_owner(load_relaxed(&a.life[page]))
    cdef uint64_t life = next_life(load_relaxed(&a.life[page]), GRANTED, owner)
    cdef uint8_t seen = load_byte(&a.visited[from_])
    # The loads that proved a new page have served. Those of one that came back are of its time in the main queue.
    cdef uint8_t visits = seen & VISITS if a.policy == S3FIFO and seen & BACK else 0
    store_relaxed(&a.life[page], life)                                    # @promote.grant
    fence_release()  # the new sequence before the first byte: a reader of the page's last content must notice
    store_relaxed(&a.key[page], key)
    store_byte(&a.visited[page], visits)
    racy_copy(page_bytes(a, page), page_bytes(a, from_), a.page_size)     # @promote.copy
    store_release(&a.life[page], published(life) | (owner << OWNER_SHIFT))  # @promote.publish
    # From the exact word that was read before the copy, so the bytes are of the value that it names.
    if cas(&a.slots[key & SLOT].word, word, next_word(word, CACHED, page)):  # @promote.swing
        note_lent(a, area, page, life, 1)
        join_queue(a, page, queue_for(a, key), True)
        count(a, C_PROMOTIONS)
        return True
    store_release(&a.life[page], next_life(life, FREE, owner))            # @promote.drop
    return False


cdef inline uint64_t pages_to_skip(Arena *a, uint64_t page, uint64_t life, uint64_t first) noexcept nogil:
    """From `page` down to the first of the buffer or claimed reservation that it lies in; at least one."""
    cdef uint64_t owner = life_owner(life), begin
    if not 0 < owner <= a.allocations_count:
        return 1
    begin = max(load_relaxed(&a.allocations[owner - 1].first), first)
    return page - begin + 1 if begin <= page else 1


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


cdef int promote_into(
    Arena *a, uint64_t index, uint64_t range_, uint64_t page, bint may_evict, uint64_t from_, uint64_t key, uint64_t word
) noexcept nogil:
    """Copies nursery page `from_` into `page` of an area, whose range was `range_`: OK; BUSY: it cannot have that page; ENDED: the slot
    moved on meanwhile.
    """
    cdef AreaEntry *area = &a.areas[index]
    cdef uint64_t life
    cdef bint ready, done = False
    store_relaxed(a.filling, page + 1)                                    # @promote.announce
    fence_full()
    # In this order: whoever took the range before we announced has changed its lives before it took its announcement back,
    # and so has the area that was shrunk; a reservation's claim word is found by the life. BUFFER is nobody's to fill.
    ready = not is_taken(a, page)
    life = load_acquire(&a.life[page])
    ready = ready and life_state(life) != BUFFER and load_relaxed(&a.ranges[index]) == range_ and not is_claimed(a, life)
    ready = ready and make_room(a, area, page, may_evict)
    if ready:
        leave_queue(a, page)
        done = fill(a, area, page, from_, key, word)
    store_release(a.filling, 0)                                           # @promote.done @promote.yield
    if load_relaxed(a.taking):  # the control thread has just waited for this
        back_off(YIELD)
    return BUSY if not ready else OK if done else ENDED


cdef inline bint is_orphan(Arena *a, uint64_t page) noexcept nogil:
    cdef uint64_t life, key, word
    return look_up(a, page, &life, &key, &word) and not names(word, page)


cdef int seek(Arena *a, uint64_t index, uint64_t from_, uint64_t key, uint64_t word) noexcept nogil:
    """As `promote_into`, in an area in turn, by a hand that goes by place: where there is room, it seeks a FREE page; in a full area a few
    pages are looked at in search of an orphan, so that values that were overwritten or invalidated do not hold their pages for ever.
    """
    cdef AreaEntry *area = &a.areas[index]
    cdef uint64_t range_ = load_acquire(&a.ranges[index]), first = range_ >> 32, n = range_ & PAYLOAD
    cdef bint room = has_room(a, index)
    cdef uint64_t step, page, life, state
    cdef int done
    if not n:
        return BUSY
    for step in range(SEEK_MAX if room else SCRUB_MAX):
        page = first + n - 1 - area.clock % n  # down from the top; buffers grow from below
        life = load_relaxed(&a.life[page])
        state = life_state(life)
        # Looking before announcing as well: announcing page after page of a range that is being taken could keep the
        # control thread waiting. Safety rests on the look after the fence.
        if state == BUFFER or is_claimed(a, life):
            area.clock += pages_to_skip(a, page, life, first)
            continue
        area.clock += 1
        if state == PUBLISHED and a.queue_of[page] == NO_QUEUE:
            join_queue(a, page, queue_for(a, load_relaxed(&a.key[page])), False)
        if state != FREE and (room or not is_orphan(a, page)):
            continue
        if is_taken(a, page):
            continue
        done = promote_into(a, index, range_, page, False, from_, key, word)
        if done != BUSY:
            return done
    return BUSY


cdef int64_t area_of(Arena *a, uint64_t page) noexcept nogil:
    cdef uint64_t index, range_
    for index in range(AREAS_MAX):
        range_ = load_relaxed(&a.ranges[index])
        if page - (range_ >> 32) < (range_ & PAYLOAD):
            return <int64_t>index
    return -1


cdef uint64_t giver(Arena *a, uint64_t index, uint64_t own) noexcept nogil:
    """Which queue gives a page up for one of the queue `own`: a type that is above its share; else, by how many pages each has: that of
    the page at a place which moves on like the hand's.
    """
    cdef uint64_t page, number, range_ = load_relaxed(&a.ranges[index])
    if not may_grow(a, own):
        return own
    if a.crowded and a.queues[a.crowded].pages:
        return a.crowded
    page = (range_ >> 32) + load_relaxed(&a.areas[index].clock) % max(range_ & PAYLOAD, 1)
    number = a.queue_of[page] if page < a.pages else NO_QUEUE
    if number == NO_QUEUE:
        number = own if a.queues[own].pages else COMMON
    return number


cdef bint promote(Arena *a, uint64_t from_, uint64_t key, uint64_t word, bint proven) noexcept nogil:
    """Copies a clean page into an area. False: no page was found for it, or the slot moved on meanwhile.

    A page goes where there is room, within its type's share. In a full area one that is proven takes the place of what the policy gives
    up.
    """
    cdef uint64_t own = queue_for(a, key), number, page, tries
    cdef int64_t index = area_in_turn(a), holder
    cdef int done
    if index < 0:
        return False
    if may_grow(a, own):
        done = seek(a, <uint64_t>index, from_, key, word)
        if done != BUSY:
            return done == OK
    if not proven:
        return False
    for tries in range(VICTIMS_MAX):
        number = giver(a, <uint64_t>index, own)
        page = next_to_go(a, number)
        holder = area_of(a, page) if page else -1
        if holder < 0 or not may_take(a, <uint64_t>holder):
            continue
        done = promote_into(a, <uint64_t>holder, load_acquire(&a.ranges[holder]), page, True, from_, key, word)
        if done != BUSY:
            return done == OK
    return False
