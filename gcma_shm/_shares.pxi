# A type's part of the nursery, so that neither one that stores fast, nor one whose file takes no pages, fills it for all.
#
# The sweep counts how many nursery pages each type has, ticket by ticket; who stores adds the tickets that were drawn since, but for
# those that he sees others have. So he knows no less than there are, stores in flight apart. A type that could have more than its part
# takes, for a store, one of its own pages instead of a free one: cleaned if need be, evicted, and granted on the spot. A type without a
# share may have all of the nursery, but for the last one page in RESERVE it cleans one of its own first. Where the file refuses that,
# and as many pages as it may have are dirty, the store fails before it has changed anything.


cdef inline uint64_t nursery_part(Arena *a, uint64_t type_) noexcept nogil:
    """How many nursery pages the type may have."""
    return share_of(a, type_, a.nursery - a.nursery // RESERVE)


cdef bint is_above_part(Arena *a, const Handle *t, uint64_t ticket) noexcept nogil:
    """Whether the type has its part of the nursery, or may have it, with a page for `ticket`."""
    cdef uint64_t at = load_relaxed(a.counted), page
    cdef int64_t pages = <int64_t>load_relaxed(&a.types[t.type].nursery) + <int64_t>(ticket - at)
    cdef int look
    if pages < <int64_t>t.nursery_part:
        return False
    # Others' tickets do not count, so far as we look.
    for look in range(OWN_LOOK):
        if at + look >= ticket:
            break
        page = (at + look) % a.nursery
        if load_relaxed(&a.key[page]) >> KEY_SHIFT != t.type and life_state(load_acquire(&a.life[page])) != GRANTED:
            pages -= 1
    return pages >= <int64_t>t.nursery_part


cdef int try_own(Arena *a, const Handle *t, uint64_t page, uint64_t key, bint dirty) noexcept nogil:
    """Reclaims one of the type's own pages for ourselves, who have a pin: OK. Of a type without a share a dirty one is only cleaned:
    FULL, a free page may be taken. BUSY, or -errno: its file refused it.
    """
    cdef Clean one
    cdef uint64_t life
    cdef int status
    if dirty and not has_share(a, t.type):
        if was_refused(a, page, load_acquire(&a.life[page])):
            return -a.refused_errno
        one.key = key
        clean_batch(a, &one, 1, 1, t)
        return FULL if one.status == OK else one.status
    status = reclaim(a, page)
    if status != OK:
        return status
    count(a, C_DIRECT_RECLAIMS)
    life = load_relaxed(&a.life[page])
    if life_state(life) == FREE and cas(&a.life[page], life, next_life(life, GRANTED, a.number)):  # @store.grant
        fence_release()  # as in `grant`
        return OK
    return BUSY


cdef int64_t own_page(Arena *a, const Handle *t, bint may_write, int *refusal) noexcept nogil:
    """One of the type's own pages, granted to us, who have a pin; the unproven ones first. -1: none was found among the next OWN_LOOK
    pages, and if `refusal` is 0, a free one may be taken. (A type without a share gives a clean page up only when its file refuses others.)
    """
    cdef uint64_t at = load_relaxed(&a.own_at[t.type]) % a.nursery, page, life, key, word, spare_key = 0
    cdef int64_t spare = -1
    cdef int status = BUSY, look, refused = 0
    cdef bint dirty, shares = has_share(a, t.type)
    for look in range(<int>min(<uint64_t>OWN_LOOK, a.nursery)):
        page = (at + look) % a.nursery
        if not look_up(a, page, &life, &key, &word) or key >> KEY_SHIFT != t.type:
            continue
        dirty = names(word, page) and word & DIRTY
        if names(word, page) and not dirty and (not shares or is_proven(a, page)):
            if spare < 0:
                spare, spare_key = <int64_t>page, key
            continue
        if (dirty and not may_write) or refused == OWN_REFUSALS:
            continue
        status = try_own(a, t, page, key, dirty)
        if status == OK or status == FULL:
            store_relaxed(&a.own_at[t.type], page + 1)
            refusal[0] = 0
            return <int64_t>page if status == OK else -1
        if status < 0:
            refusal[0] = -status
            refused += not was_refused(a, page, life)  # has cost a write
    store_relaxed(&a.own_at[t.type], at + look + 1)
    if spare >= 0 and (shares or refusal[0]) and try_own(a, t, <uint64_t>spare, spare_key, False) == OK:
        refusal[0] = 0
        return spare
    return -1


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
    while ticket + max(a.nursery // (2 * RESERVE), 2) < head:
        count_page(a, ticket % a.nursery)
        ticket += 1
    store_relaxed(a.counted, ticket)
