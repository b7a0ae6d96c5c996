# Pages that their files did not take, as the broker's reclaim thread knows them.
#
# Such a page stays dirty, readable and pinned in the nursery. The sweep tries each page once and then passes it by, or a full
# disk would cost a failing write a page and lap; rounds of retries, at a pace that reclaim.py sets, try them again. Their
# bound: of each type so many pages that are refused once more. What a file takes does not count, so the first round after a
# fault's end writes everything. The next round begins where the first page was passed over, so a few pages that are refused
# for ever (a bad block) keep no others from their turn.
#
# A page is marked with the sequence under which it was refused: a mark is void as soon as the page changes hands.

cdef struct Retries:    # one round
    int refused[256]    # by type: pages that its file refused in this round
    int64_t passed_over     # the first page for which that was too much; -1: none


cdef bint may_retry(Retries *retries, uint64_t page, uint64_t type_) noexcept nogil:
    if retries.refused[type_] < RETRIES_MAX:
        return True
    if retries.passed_over < 0:
        retries.passed_over = <int64_t>page
    return False


cdef void note_refused(Arena *a, Clean *c) noexcept nogil:
    """Marks the page that c found dirty, unless the slot has moved on. Other threads of the broker read the marks."""
    cdef uint64_t page = c.word & PAYLOAD, life = load_acquire(&a.life[page])
    # The word once more: as long as it names the page, dirty, nobody frees it, and this is the sequence that was refused.
    if load_acquire(&a.slots[c.key & SLOT].word) != c.word:
        return
    store32(&a.refused_errno, <uint32_t>-c.status)
    if load_relaxed(&a.refused[page]) != life & SEQUENCE:
        store_relaxed(&a.refused[page], life & SEQUENCE)
        store_relaxed(&a.refused_count, a.refused_count + 1)


cdef void retry_refused(Arena *a) noexcept nogil:
    """One round."""
    cdef Retries retries
    cdef uint64_t start = a.retry_at, passed = 0
    cdef int n
    memset(&retries, 0, sizeof(retries))
    retries.passed_over = -1
    while passed < a.nursery:
        n = <int>min(<uint64_t>RETRIES_MAX, a.nursery - passed)  # few at once, for what is in a batch is tried
        clean_tickets(a, start + passed, n, &retries)
        passed += n
    a.retry_at = <uint64_t>retries.passed_over if retries.passed_over >= 0 else 0


cdef void count_refused(Arena *a, uint64_t *by_type) noexcept nogil:
    """How many are left of each type; marks that are void are taken off."""
    cdef uint64_t page, life, key, word, left = 0
    for page in range(a.nursery):
        if not a.refused[page]:
            continue
        if look_up(a, page, &life, &key, &word) and was_refused(a, page, life) and names(word, page) and word & DIRTY:
            by_type[key >> KEY_SHIFT] += 1
            left += 1
        else:
            store_relaxed(&a.refused[page], 0)
    store_relaxed(&a.refused_count, left)
