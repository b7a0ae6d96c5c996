# The sweep of the nursery, by the broker's reclaim thread alone: in order of the hand each page is cleaned, then promoted, evicted, or
# freed as an orphan.


cdef inline bint room_below(Arena *a, uint64_t share) noexcept nogil:
    """Whether less than 1/share of the nursery is left to be granted."""
    return <int64_t>(load_relaxed(a.hand) + a.nursery - load_relaxed(a.head)) < <int64_t>(a.nursery // share)


cdef bint settle(Arena *a, uint64_t page) noexcept nogil:
    """Ends a nursery page's time: promoted, evicted, or freed as an orphan. Dirty pages and those of a store in flight
    stay: False.
    """
    cdef uint64_t life, key, word
    if not look_up(a, page, &life, &key, &word):
        return False
    if names(word, page):
        if word & DIRTY:
            return False
        if not promote(a, page, key, word, is_proven(a, page)):
            return evict(a, page, life, key, word)
    return free_orphan(a, page, life)


cdef int add_sorted(Clean *batch, int n, uint64_t key) noexcept nogil:
    """Puts one more slot into a batch of n, in order of the keys; returns how many it has then."""
    cdef int at = n
    while at and batch[at - 1].key > key:
        batch[at].key = batch[at - 1].key
        at -= 1
    batch[at].key = key
    return n + 1


cdef void clean_sorted(Arena *a, Clean *batch, int n, Retries *retries) noexcept nogil:
    """Cleans these slots, neighbours in a file in one write, and marks what was refused."""
    cdef int i
    clean_batch(a, batch, n, a.sweeper_pins, NULL)  # a share of its own
    for i in range(n):
        if batch[i].status < 0:
            note_refused(a, &batch[i])
            if retries != NULL:
                retries.refused[batch[i].key >> KEY_SHIFT] += 1


cdef void clean_tickets(Arena *a, uint64_t ticket, int n, Retries *retries) noexcept nogil:
    """Cleans what is dirty on the pages of n tickets from `ticket` on. What its file has refused before is left alone; or, in a round of
    `retries`, nothing else is tried.
    """
    cdef Clean batch[BATCH_MAX]
    cdef uint64_t page, life, key, word
    cdef int i, dirty = 0
    for i in range(n):
        page = (ticket + i) % a.nursery
        if retries != NULL and not a.refused[page]:
            continue
        if look_up(a, page, &life, &key, &word) and names(word, page) and word & DIRTY:
            if was_refused(a, page, life) != (retries != NULL):
                continue
            if retries != NULL and not may_retry(retries, page, key >> KEY_SHIFT):
                continue
            dirty = add_sorted(batch, dirty, key)
    clean_sorted(a, batch, dirty, retries)


cdef bint is_held_long(Arena *a, uint64_t page, bint room, uint64_t *life, uint64_t *key, uint64_t *word) noexcept nogil:
    """Whether the page is of a type with a share that has at least half of its part, so that the hand does not come soon, and belongs into an
    area: it is proven, or there is room. Then its life, key and word.
    """
    cdef uint64_t type_ = load_relaxed(&a.key[page]) >> KEY_SHIFT
    if type_ >= 256 or not has_share(a, type_) or not (room or is_proven(a, page)):
        return False
    if 2 * <int64_t>load_relaxed(&a.types[type_].held) < <int64_t>nursery_part(a, type_):
        return False
    return look_up(a, page, life, key, word) and names(word[0], page) and not was_refused(a, page, life[0])


cdef void promote_held(Arena *a) noexcept nogil:
    """Promotes pages of types that have their part of the nursery: such a type draws no tickets, so the hand need not come to its pages, and its
    share of the areas would stay empty. Looks at the next OWN_PASS pages of the ring.
    """
    cdef Clean batch[BATCH_MAX]
    cdef uint64_t page, life, key, word, type_, left = min(<uint64_t>OWN_PASS, a.nursery)
    cdef bint any_ = False, room = True, proven
    cdef int i, n, dirty
    for type_ in range(256):
        any_ = any_ or has_share(a, type_)
    if not any_:
        return
    while left:
        n, dirty = <int>min(<uint64_t>BATCH_MAX, left), 0
        for i in range(n):
            if is_held_long(a, (a.held_at + i) % a.nursery, room, &life, &key, &word) and word & DIRTY:
                dirty = add_sorted(batch, dirty, key)
        clean_sorted(a, batch, dirty, NULL)
        for i in range(n):
            page = (a.held_at + i) % a.nursery
            if not is_held_long(a, page, room, &life, &key, &word) or word & DIRTY:
                continue
            proven = is_proven(a, page)
            if promote(a, page, key, word, proven):
                free_orphan(a, page, life)
            elif not proven:
                room = False
        a.held_at += n
        left -= n


cdef void sweep_nursery(Arena *a) noexcept nogil:
    """Moves the hand on until enough of the nursery is free, one lap at the most.

    The hand passes what cannot be freed, so a nursery of pages that no file takes does not look low; hence the count of what it passed
    in vain. It goes on after each ticket that somebody draws in vain, and no further: a look costs less than a ticket.
    """
    cdef uint64_t hand = load_relaxed(a.hand), head, swept = 0
    cdef int n, i
    count_promised(a)
    count_tickets(a)
    recount_held(a)
    while room_below(a, HIGH_WATER) and swept < a.nursery:
        head = load_relaxed(a.head)
        if hand + a.nursery < head:  # clients were faster and went on by direct reclaim
            hand = head - a.nursery
        n = min(<uint64_t>BATCH_MAX, head - hand)
        clean_tickets(a, hand, n, NULL)
        for i in range(n):
            a.in_vain = 0 if settle(a, (hand + i) % a.nursery) else a.in_vain + 1
            count_page(a, (hand + i) % a.nursery)
            if a.in_vain and a.in_vain % a.nursery == 0:
                store_relaxed(&a.vain_laps, a.vain_laps + 1)
        hand += n
        swept += n
        store_release(a.hand, hand)
        count_tickets(a)
    promote_held(a)


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
