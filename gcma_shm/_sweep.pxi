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


cdef void promote_held(Arena *a) noexcept nogil:
    """Promotes pages of types that have their part of the nursery: such a type draws no tickets, so the hand need not come to its pages, and its
    share of the areas would stay empty. The next OWN_PASS pages of the ring; what is not proven only as long as there is room.
    """
    cdef uint64_t page, life, key, word, type_, look
    cdef bint any_ = False, room = True, proven
    cdef Clean one
    for type_ in range(256):
        any_ = any_ or has_share(a, type_)
    if not any_:
        return
    for look in range(min(<uint64_t>OWN_PASS, a.nursery)):
        page = a.held_at % a.nursery
        a.held_at += 1
        type_ = load_relaxed(&a.key[page]) >> KEY_SHIFT
        if type_ >= 256 or not has_share(a, type_):
            continue
        if 2 * <int64_t>load_relaxed(&a.types[type_].held) < <int64_t>nursery_part(a, type_):  # the hand comes soon enough
            continue
        proven = is_proven(a, page)
        if not (proven or room) or not look_up(a, page, &life, &key, &word) or not names(word, page) or was_refused(a, page, life):
            continue
        if word & DIRTY:
            one.key = key
            clean_batch(a, &one, 1, a.sweeper_pins, NULL)
            if one.status < 0:
                note_refused(a, &one)
            if not look_up(a, page, &life, &key, &word) or not names(word, page) or word & DIRTY:
                continue
        if promote(a, page, key, word, proven):
            free_orphan(a, page, life)
        elif not proven:
            room = False


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
