# What a new broker puts right in the tables of one that was killed, before any thread of its own runs. Clients go on meanwhile:
# they store, load, clean, claim and lend. Each step may be cut off by another death, and is done again by the next broker.


cdef void close_words(Arena *a, uint64_t first, uint64_t n) noexcept nogil:
    """Closes words that belong to no living type: the dead broker may have ended a life and closed only some of them.

    A page that stayed dirty under an ended life could never be cleaned nor freed. EMPTY words, too: a client that read its type's
    life before that ended may be about to swing one, and must lose. A word of version 0 no life ever had.
    """
    cdef uint64_t i, word
    for i in range(first, first + n):
        while True:
            word = load_acquire(&a.slots[i].word)
            if word == 0 or state_of(word) == CLOSED or cas(&a.slots[i].word, word, next_word(word, CLOSED, 0)):  # @recover.words
                break


cdef void put_right(
    Arena *a, AreaEntry *area, uint64_t first, uint64_t n, uint64_t state, uint64_t owner, bint claimed
) noexcept nogil:
    """Makes the range what its entry says, `state` under `owner`, where it is not that already. Cache stays where it may be.

    Nobody but the broker changes the lives of a buffer's pages, or of pages that no guest has. Those of a reservation may be
    claimed at any moment, and lent again, or given up without a sweep. All that can be wrong there is one page GRANTED to the dead
    broker's copy. It is put right whoever has the claim, and else nothing of a range that is `claimed`. A claimer's sweep stores the
    same FREE in the same sequence, or has passed over it, and the CAS loses.
    """
    cdef uint64_t page, life, now, lent = 0
    for page in range(first, first + n):
        life = load_acquire(&a.life[page])
        now = life_state(life)
        if now == PUBLISHED and state == FREE and life_owner(life) == owner:
            lent += 1
            if owner == 0:
                a.lent_map[page // LENT_BLOCK] += 1  # no thread of ours runs yet
        elif now == GRANTED or not (claimed or (now == state and life_owner(life) == owner)):
            cas(&a.life[page], life, next_life(life, state, owner))       # @recover.range
    if owner == 0:
        fetch_add(&area.lent, lent)


cdef uint64_t count_published(Arena *a, uint64_t first, uint64_t n) noexcept nogil:
    cdef uint64_t page, found = 0
    for page in range(first, first + n):
        found += life_state(load_acquire(&a.life[page])) == PUBLISHED
    return found


cdef void count_lent(Arena *a, uint64_t index, uint64_t first, uint64_t n) noexcept nogil:
    """Writes a reservation's gauge, also when it is claimed: its claimer may give up, and leave what it holds in place.

    No broker fills its pages yet. They can only become less, by a claimer's sweep, which is followed by its writing 0 and by
    another claim word. So 0 is right for good; and any other count when after it was written the claim word is that from before
    (nobody has swept it wholly) and the pages are as many (nobody who claimed it before is about to: he writes 0 after we did).
    """
    cdef AllocationEntry *entry = &a.allocations[index]
    cdef uint64_t claim, lent
    while True:
        claim = load_acquire(&entry.claim)
        lent = count_published(a, first, n)
        store_release(&entry.lent, lent)
        fence_full()
        if not lent or (count_published(a, first, n) == lent and load_acquire(&entry.claim) == claim):
            return
