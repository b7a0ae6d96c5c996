# A type's part of the nursery, so that neither one that stores fast, nor one whose file takes no pages, fills it for all.
#
# A type with a share: whoever publishes or frees one of its pages counts it (`held`), and the sweep counts anew each lap. Once it has its
# part, a store takes the place of one of the type's own pages, cleaned if need be, evicted, and granted on the spot, and draws no ticket: so the
# others' pages have as much time in the nursery as without it. A handle remembers which pages it has filled; where none of these is to be had
# (a new process, or all are in other hands) it looks among OWN_LOOK pages of the ring, and then takes a free one. So the type can exceed its part by
# the stores in flight, and by a page for each process that begins.
#
# A type without a share may have all of the nursery, but for the last one page in RESERVE it cleans one of its own first. The sweep counts how
# many it has, ticket by ticket; who stores adds the tickets that were drawn since, but for those that he sees others have.
#
# Where the file refuses, and as many pages as the type may have are dirty, the store fails before it has changed anything.

cdef enum:              # what a type that has its part may do, beside taking a page
    TAKE_FREE = -1
    GIVE_UP = -2
    UNPINNED = -3       # the same, and the pin is given back already


cdef inline uint64_t nursery_part(Arena *a, uint64_t type_) noexcept nogil:
    """How many nursery pages the type may have."""
    return share_of(a, type_, a.nursery - a.nursery // RESERVE)


cdef bint others_have(Arena *a, const Handle *t, int64_t pages) noexcept nogil:
    """Whether of so many pages that may be a type's others have enough, as far as we look among the tickets that are not counted yet."""
    cdef uint64_t at = load_relaxed(a.counted), head = load_relaxed(a.head), page
    cdef int look
    for look in range(OWN_LOOK):
        if at + look >= head:
            break
        page = (at + look) % a.nursery
        if load_relaxed(&a.key[page]) >> KEY_SHIFT != t.type and life_state(load_acquire(&a.life[page])) != GRANTED:
            pages -= 1
    return pages < <int64_t>t.nursery_part


cdef inline bint is_above_part(Arena *a, const Handle *t) noexcept nogil:
    """Whether the type has its part of the nursery, or, without a share, may have it."""
    cdef int64_t pages
    if t.shares:
        return <int64_t>load_relaxed(&a.types[t.type].held) >= <int64_t>t.nursery_part
    pages = <int64_t>(load_relaxed(&a.types[t.type].nursery) + load_relaxed(a.head) - load_relaxed(a.counted))
    return pages >= <int64_t>t.nursery_part and not others_have(a, t, pages)


cdef void note_own(Arena *a, Handle *t, uint64_t page) noexcept nogil:
    """The handle, on a type with a share, has published `page`. To be remembered as a hint: its threads may write over each other's."""
    fetch_add(&a.types[t.type].held, 1)
    store32(&t.own[fetch_add(&t.own_next, 1) % t.own_size], <uint32_t>page)


cdef int try_own(Arena *a, const Handle *t, uint64_t page, uint64_t life, uint64_t key, bint dirty) noexcept nogil:
    """Reclaims one of the type's own pages, PUBLISHED under `life`, for ourselves, who have a pin: OK. Of a type without a share a dirty one is only cleaned:
    FULL, a free page may be taken. BUSY, or -errno: its file refused it.
    """
    cdef Clean one
    cdef int status
    if dirty and not t.shares:
        if was_refused(a, page, life):
            return -<int>load32(&a.refused_errno)
        one.key = key
        clean_batch(a, &one, 1, 1, t)
        return FULL if one.status == OK else one.status
    status = reclaim(a, page, life)
    if status != OK:
        return status
    count(a, C_DIRECT_RECLAIMS)
    life = load_relaxed(&a.life[page])
    if life_state(life) == FREE and cas(&a.life[page], life, next_life(life, GRANTED, a.number)):  # @store.grant
        fence_release()  # as in `grant`
        return OK
    return BUSY


cdef int64_t own_page(Arena *a, const Handle *t, bint may_write, int *refusal) noexcept nogil:
    """One of the type's own pages, granted to us, who have a pin: of those that the handle remembers, then among the next OWN_LOOK pages of the
    ring; the unproven ones first. -1: none was found, and if `refusal` is 0, a free one may be taken. (A type without a share gives a clean
    page up only when its file refuses others.)
    """
    cdef uint64_t at = load_relaxed(&a.own_at[t.type]) % a.nursery, page, life, key, word, spare_life = 0, spare_key = 0
    cdef uint64_t next_ = load_relaxed(&t.own_next), known = min(t.own_size, <uint64_t>OWN_LOOK) if t.shares else 0, look, lookups = known + min(<uint64_t>OWN_LOOK, a.nursery)
    cdef int64_t spare = -1
    cdef int status = BUSY, refused = 0
    cdef bint dirty
    for look in range(lookups):
        page = load32(&t.own[(next_ + look) % t.own_size]) % a.nursery if look < known else (at + look - known) % a.nursery
        if not look_up(a, page, &life, &key, &word) or key >> KEY_SHIFT != t.type:
            continue
        dirty = names(word, page) and word & DIRTY
        if names(word, page) and not dirty and (not t.shares or is_proven(a, page)):
            if spare < 0:
                spare, spare_life, spare_key = <int64_t>page, life, key
            continue
        if (dirty and not may_write) or refused == OWN_REFUSALS:
            continue
        status = try_own(a, t, page, life, key, dirty)
        if status == OK or status == FULL:
            if look >= known:
                store_relaxed(&a.own_at[t.type], page + 1)
            refusal[0] = 0
            return <int64_t>page if status == OK else -1
        if status < 0:
            refusal[0] = -status
            refused += not was_refused(a, page, life)  # has cost a write
    store_relaxed(&a.own_at[t.type], at + OWN_LOOK)
    if spare >= 0 and (t.shares or refusal[0]) and try_own(a, t, <uint64_t>spare, spare_life, spare_key, False) == OK:
        refusal[0] = 0
        return spare
    return -1


cdef int64_t grant_own(Arena *a, const Handle *t, Patience *patience) noexcept nogil:
    """For a type that has its part, and us, who have a pin: one of its own pages, or what else may be done. Without `patience`: none at
    hand. While the file refuses what must go, waits without the pin.
    """
    cdef unsigned step = 64
    cdef int64_t own
    cdef int refused
    while True:
        refused = 0
        own = own_page(a, t, patience != NULL, &refused)
        if own >= 0:
            return own
        if patience == NULL:
            return GIVE_UP
        if not refused or not has_all_dirty(a, t):
            return TAKE_FREE
        patience.refusal = refused
        if a.refused != NULL or is_over(patience):  # the broker waits for no file
            return GIVE_UP
        if not pause_unpinned(a, patience, &step):
            return UNPINNED
        if not is_above_part(a, t):
            return TAKE_FREE


cdef bint has_all_dirty(Arena *a, const Handle *t) noexcept nogil:
    """Whether as many of the type's pages are dirty as it may have in the nursery: counted exactly, for a store that is about to fail."""
    cdef uint64_t page, life, key, word, dirty = 0
    for page in range(a.nursery):
        if look_up(a, page, &life, &key, &word) and key >> KEY_SHIFT == t.type and names(word, page) and word & DIRTY:
            dirty += 1
            if dirty >= t.nursery_part:
                return True
    return False


cdef bint pause_unpinned(Arena *a, Patience *patience, unsigned *step) noexcept nogil:
    """A moment without our pin, for a file to take pages again; whether we have it back before the deadline."""
    unpin(a, 1)
    while not is_over(patience):
        back_off(step[0])
        step[0] += 1
        if pin(a, 1):
            return True
    return False


# --- the sweep's part

cdef void count_page(Arena *a, uint64_t page) noexcept nogil:
    """Brings the gauges up to date with what `page` holds now."""
    cdef uint64_t life = load_acquire(&a.life[page]), type_ = load_relaxed(&a.key[page]) >> KEY_SHIFT, counted = a.nursery_of[page]
    cdef uint64_t now = type_ + 1 if life_state(life) == PUBLISHED and type_ < 256 else 0
    if now == counted:
        return
    a.nursery_of[page] = <uint16_t>now
    if counted:
        store_relaxed(&a.types[counted - 1].nursery, load_relaxed(&a.types[counted - 1].nursery) - 1)
    if now:
        store_relaxed(&a.types[now - 1].nursery, load_relaxed(&a.types[now - 1].nursery) + 1)


cdef void count_tickets(Arena *a) noexcept nogil:
    """Counts the pages of the tickets that were drawn since the last time. Pages change hands in other ways, too: they are counted again
    when the hand passes them. A broker that begins counts all of them.
    """
    cdef uint64_t head = load_acquire(a.head), ticket = load_relaxed(a.counted), type_
    if not a.counts_nursery:
        a.counts_nursery = True
        for type_ in range(256):
            store_relaxed(&a.types[type_].nursery, 0)
        ticket = 0
    if ticket > head or head - ticket > a.nursery:
        ticket = head - min(head, a.nursery)
    # The last few may be in hand still, or their pages not granted yet: till later the tickets stand for them.
    while ticket + max(a.nursery // COUNT_LAG, 2) < head:
        count_page(a, ticket % a.nursery)
        ticket += 1
    store_relaxed(a.counted, ticket)


cdef void recount_held(Arena *a) noexcept nogil:
    """Counts the nursery's pages of the types with a share anew, once a lap of the hand."""
    cdef uint64_t held[256]
    cdef uint64_t hand = load_relaxed(a.hand), page, type_
    if a.recounted and hand - a.recounted < a.nursery:
        return
    a.recounted = max(hand, <uint64_t>1)
    memset(held, 0, sizeof(held))
    for page in range(a.nursery):
        type_ = load_relaxed(&a.key[page]) >> KEY_SHIFT
        if type_ < 256 and life_state(load_acquire(&a.life[page])) == PUBLISHED:
            held[type_] += 1
    for type_ in range(256):
        if has_share(a, type_):
            store_relaxed(&a.types[type_].held, held[type_])
