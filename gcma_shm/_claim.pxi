# What a client does to a reservation that it holds: claiming its range and lending it again, both without a message.
#
# Who writes the life words of a reserved range: the reclaim thread while the range is lent, each page announced; whoever has the
# claim, while it is claimed. The control thread is one of those: it claims in the broker's name before it changes anything.


cdef uint64_t claim_range(Arena *a, uint64_t index, uint64_t state, bint *made) noexcept nogil:
    """Claims the reservation in entry `index` whose state word is `state`, if nobody has: the claim word that is in place then; 0:
    the entry is not that reservation any more. O(1): readers compare the claim word, no page is touched.
    """
    cdef AllocationEntry *entry = &a.allocations[index]
    cdef uint64_t claim, mine
    while True:
        claim = load_acquire(&entry.claim)
        # After the claim word: a release takes the claim, and so changes the word, before it changes the state. When the CAS
        # below succeeds, the reservation was ours at this look and is ours still.
        if load_acquire(&entry.state) != state:
            return 0
        if claim & CLAIM_CLIENT:
            return claim
        mine = next_claim(claim, a.number)
        if cas(&entry.claim, claim, mine):                                # @claim.word
            # Dekker's: we have said that the range is claimed, now we look whether the broker is filling a page of it; it says
            # which page it fills, then looks at the claim (`promote`). And a seqlock's entry: the claim is seen before the first
            # byte that we write. Explicit, since on ARM a later store may pass the store of a CAS.
            fence_full()
            store_relaxed(&entry.ordinal, fetch_add(&a.me.claims, 1) + 1)
            made[0] = True
            return mine


cdef bint claim_settled(Arena *a, uint64_t first, uint64_t n, uint64_t deadline) noexcept nogil:
    """Whether no promotion into the range is under way any more. False at the deadline: the broker is stopped or dead, and the
    caller finds out which: the copy of a dead one never goes on.
    """
    cdef unsigned step = 0
    while load_acquire(a.filling) - 1 - first < n:                        # @claim.wait
        if now_ns() >= deadline:
            return False
        back_off(step)
        step += 1
    return True


cdef bint seize_claim(Arena *a, uint64_t index, uint64_t claim, uint64_t *seized) noexcept nogil:
    """Takes over exactly `claim`: the broker, from a dead client or for itself; a client, from a dead broker."""
    seized[0] = next_claim(claim, a.number)
    if not cas(&a.allocations[index].claim, claim, seized[0]):            # @release.word @death.claim
        return False
    fence_full()
    return True


cdef bint lend_claimed(Arena *a, uint64_t index, uint64_t claim, uint64_t first, uint64_t n) noexcept nogil:
    """Ends our claim. False: it is not ours alone; the broker lends the range once the last of us has freed it.

    Each page's sequence advances before the range is lent: slot words that still name its pages never lead to a guest's bytes.
    Idempotent, should we die on the way: the broker then does the same.
    """
    cdef AllocationEntry *entry = &a.allocations[index]
    cdef AreaEntry *area = &a.areas[load_relaxed(&entry.area) % AREAS_MAX]
    cdef uint64_t *lives = a.life
    cdef uint64_t page, state
    cdef bint made
    while True:
        if load_acquire(&entry.claim) != claim:
            return False
        state = FREE if is_lent(area) else BUFFER  # what is not lent at all is kept from the reclaim thread
        fence_release()
        for page in range(first, first + n):
            store_relaxed(&lives[page], next_life(load_relaxed(&lives[page]), state, index + 1))  # @lend.life
        store_relaxed(&entry.lent, 0)
        if not cas(&entry.claim, claim, next_claim(claim, 0)):            # @lend.word
            return False
        if is_lent(area) == (state == FREE):
            return True
        # The area was drained or resumed meanwhile, and the broker passed over a range that was claimed: once more.
        made = False
        claim = claim_range(a, index, load_acquire(&entry.state), &made)
        if not made:
            return True


cdef bint yield_claim(Arena *a, uint64_t index, uint64_t claim) noexcept nogil:
    """Ends a claim under which nothing was written, and leaves the lives alone: the broker may be filling a page of the range still,
    and a sweep that ran across it could give a page a sequence that it has had (a model found the load that this deceives).
    """
    return cas(&a.allocations[index].claim, claim, next_claim(claim, 0))  # @claim.yield


cdef bint share_claim(Arena *a, uint64_t index, uint64_t claim) noexcept nogil:
    """Marks `claim` as more than one process's, so that none of them lends the range by itself."""
    return cas(&a.allocations[index].claim, claim, claim | CLAIM_SHARED)  # @claim.share
