# What the broker's control thread and its workers alone do: taking ranges for buffers and lending them again, deaths, lives of types.


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
