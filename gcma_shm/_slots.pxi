# What clients do to slots: store, load, invalidate, sync, counting.


cdef inline Slot *slot_of(Arena *a, Handle *t, uint64_t offset) noexcept nogil:
    return &a.slots[t.base + offset]


cdef inline uint64_t key_of(Handle *t, uint64_t offset) noexcept nogil:
    return (t.type << KEY_SHIFT) | (t.base + offset)


cdef inline bint living(Arena *a, Handle *t) noexcept nogil:
    """To be asked after the slot word was read: the life advances before the words of an ended type are touched, so a
    word that was read while the handle's life lasted belongs to it, and the CAS from exactly that word fails once it
    does not."""
    return load_acquire(&a.types[t.type].life) == t.life                  # @load.type


cdef int swing(
    Arena *a, Handle *t, Slot *slot, uint64_t state, uint64_t rest, uint64_t *before, uint64_t *after, int tries
) noexcept nogil:
    """Points the slot to a new value, whatever it held: OK, ENDED, or BUSY after so many tries. A lost CAS is somebody else's progress. `rest`: of a CACHED
    word, or the pattern of a FILLED one.
    """
    cdef int lost
    for lost in range(tries):
        before[0] = load_acquire(&slot.word)
        if not living(a, t) or state_of(before[0]) == CLOSED:
            return ENDED
        after[0] = next_word(before[0], CACHED, rest) if state == CACHED else hollow_word(before[0], state, rest)
        if cas(&slot.word, before[0], after[0]):
            return OK
        count(a, C_RETRIES)
    return BUSY


cdef bint is_filled(const uint8_t *page, size_t size, uint32_t *pattern) noexcept nogil:
    """Whether the page is its first four bytes over and over, as zeros are, or any one byte. The ends first: they differ in most pages,
    also in those that begin with many zeros. Then the page is compared with itself, shifted, up to the first byte that differs.
    """
    cdef uint32_t last
    memcpy(pattern, page, sizeof(uint32_t))
    memcpy(&last, page + size - sizeof(uint32_t), sizeof(uint32_t))
    return pattern[0] == last and memcmp(page, page + sizeof(uint32_t), size - sizeof(uint32_t)) == 0


cdef void repeat(uint8_t *out, size_t size, uint32_t pattern) noexcept nogil:
    """The page that `is_filled` said this of; `size` is a power of two, and what is there is doubled until it is all."""
    cdef size_t done = sizeof(uint32_t)
    memcpy(out, &pattern, sizeof(uint32_t))
    while done < size:
        memcpy(out + done, out, done)
        done *= 2


cdef int store_page(
    Arena *a, Handle *t, uint64_t offset, const uint8_t *data, Patience *patience, uint64_t *stored, uint64_t *counts
) noexcept nogil:
    """Makes `data` the slot's value, visible to all: OK, and in `stored` the word that names it; FULL or ENDED:
    nothing changed; BUSY: nor then, others have changed the slot all the time. Without `patience` it waits for nothing and touches no
    file: FULL when no page is at hand, or others change the slot.
    """
    cdef Slot *slot = slot_of(a, t, offset)
    cdef uint64_t before
    cdef int64_t page
    cdef uint32_t pattern
    cdef int tries = SWINGS_HELD if patience == NULL else TRIES_MAX, status
    if is_filled(data, a.page_size, &pattern):
        status = swing(a, t, slot, FILLED if pattern else ZERO, pattern, &before, stored, tries)  # @store.filled
        if status != OK:
            return FULL if status == BUSY and patience == NULL else status
        tick(&counts[C_STORES_FILLED if pattern else C_STORES_ZERO])
    else:
        page = grant_at_hand(a, t) if patience == NULL else grant(a, t, patience)
        if page < 0:
            return FULL if living(a, t) else ENDED
        store_relaxed(&a.key[page], key_of(t, offset))                                   # @store.fill
        store_byte(&a.visited[page], 0)
        copy_in(page_bytes(a, page), data, a.page_size)
        # The CAS releases key and bytes to whoever acquires the word.
        status = swing(a, t, slot, CACHED, DIRTY | <uint64_t>page, &before, stored, tries)  # @store.swing
        if status != OK:
            abandon(a, page)
            return FULL if status == BUSY and patience == NULL else status
        keep_place(a, page, before)
        publish(a, page)
        if t.shares:
            note_own(a, t, page)
    tick(&counts[C_STORES])
    if before & DIRTY:
        tick(&counts[C_OVERWRITES_SAVED])
    return OK


cdef int load_cached(Arena *a, uint64_t key, Slot *slot, uint64_t word, uint8_t *out, uint64_t *counts) noexcept nogil:
    """OK; or BUSY: start over."""
    cdef uint64_t page = word & PAYLOAD
    cdef uint64_t life, state, claim = 0
    cdef uint64_t *claimed = NULL
    if page >= a.pages:
        return DAMAGED
    life = load_acquire(&a.life[page])                                    # @load.life
    # The word once more: it named the page when `life` was read, so this sequence of the page holds the slot's value,
    # and the value was current at this moment. Whatever happens to the word from here on does not matter.
    if load_acquire(&slot.word) != word:                                  # @load.again
        return BUSY
    state = life_state(life)
    if page >= a.nursery and life_owner(life):  # in a reservation, of which a claim touches nothing but the claim word
        claimed = claim_of(a, life_owner(life))
        claim = load_acquire(claimed) if claimed != NULL else CLAIM_CLIENT  # @load.claim
    if (
        load_relaxed(&a.key[page]) != key
        or not (state == PUBLISHED or (state == GRANTED and page < a.nursery))
        or claim & CLAIM_CLIENT
    ):
        # In an area: the page was taken for a buffer, which touches no slot word. The value is in the file, since no
        # page enters an area before it is. In the nursery the word must have moved since: a page is never freed while
        # a word names it.
        if page >= a.nursery and cas(&slot.word, word, next_word(word, SPILLED, shadow_now(a, key))):  # @load.heal
            count(a, C_HEALS)
        return BUSY
    racy_copy(out, page_bytes(a, page), a.page_size)                      # @load.copy
    # A seqlock's exit. The copy races with a writer by design; its bytes count only if the sequence has not moved. On
    # x86 loads are not reordered with loads, and the fence binds the compiler; on ARM it is a load barrier, and the
    # writer's half is the release fence between the new life and its first byte (`grant`, `promote`), or the full one
    # before a buffer is handed over. Publishing in between changes the state and not the sequence, so a busy writer
    # cannot make us start over for ever.
    fence_acquire()
    if RECHECK and (load_relaxed(&a.life[page]) ^ life) & SEQUENCE:       # @load.recheck
        return BUSY
    # A claimer writes its first byte after its claim and a full fence, and before the range is lent again every page's sequence
    # advances. So a copy that has a guest's byte finds one of the two moved on.
    if RECHECK and claimed != NULL and load_relaxed(claimed) != claim:    # @load.claim_again
        return BUSY
    note_visit(a, page)
    tick(&counts[C_HITS_NURSERY if page < a.nursery else C_HITS_AREA])
    return OK


cdef void refault(Arena *a, Handle *t, uint64_t key, Slot *slot, uint64_t word, uint64_t side, const uint8_t *data) noexcept nogil:
    """Puts a page that was read from the file into memory, clean, if a nursery page is at hand."""
    cdef int64_t page = grant(a, t, NULL)                                 # @load.refault
    if page < 0:
        return
    store_relaxed(&a.key[page], key)
    store_byte(&a.visited[page], BACK if recently_evicted(a, key, word) else 0)
    copy_in(page_bytes(a, page), data, a.page_size)
    # `data` is the caller's memory, and somebody may be writing it: what is published is what was checked, nothing
    # else.
    if crc32c_page(&a.crc, page_bytes(a, page)) == <uint32_t>(side & CRC) and cas(
        &slot.word, word, next_word(word, CACHED, page)
    ):
        publish(a, page)
        if t.shares:
            note_own(a, t, page)
        count(a, C_REFAULTS)
    else:
        abandon(a, page)


cdef int load_spilled(
    Arena *a, Handle *t, uint64_t offset, Slot *slot, uint64_t word, uint8_t *out, uint64_t *counts
) noexcept nogil:
    """OK; BUSY: start over; CORRUPT; or -errno."""
    cdef uint64_t side = load_acquire(&slot.side)                         # @load.file
    cdef int64_t got = read_place(a, t, offset, out)
    fence_acquire()
    # While the word says SPILLED nobody writes this place: a write under way holds the writer since before the word
    # became clean. So with the word unchanged, file and checksum belong together.
    if load_acquire(&slot.word) != word:                                  # @load.file_again
        return BUSY
    if got < 0:
        return <int>got
    if got < <int64_t>a.page_size or crc32c_page(&a.crc, out) != <uint32_t>(side & CRC):
        return CORRUPT
    tick(&counts[C_HITS_SPILL])
    refault(a, t, key_of(t, offset), slot, word, side, out)
    return OK


cdef int load_memory(
    Arena *a, Handle *t, uint64_t offset, uint64_t *word, uint8_t *out, uint64_t *counts
) noexcept nogil:
    """One look at the slot, in `word`: OK, MISS, ENDED or DAMAGED; IN_FILE: nothing was copied; or BUSY: start over. Waits for nobody and
    touches no file, so it may be called under the GIL.
    """
    cdef Slot *slot = slot_of(a, t, offset)
    cdef uint64_t state
    word[0] = load_acquire(&slot.word)                                    # @load.word
    state = state_of(word[0])
    if state == CLOSED or not living(a, t):
        return ENDED
    if state == CACHED:
        return load_cached(a, key_of(t, offset), slot, word[0], out, counts)
    if state == SPILLED:
        return IN_FILE
    if state == EMPTY:
        tick(&counts[C_MISSES])
        return MISS
    if state == ZERO:
        memset(out, 0, a.page_size)
        tick(&counts[C_HITS_ZERO])
        return OK
    if state == FILLED or state == FILLED_LAID:
        repeat(out, a.page_size, <uint32_t>(word[0] & PAYLOAD))
        tick(&counts[C_HITS_FILLED])
        return OK
    return DAMAGED


cdef int load_page(Arena *a, Handle *t, uint64_t offset, uint8_t *out, uint64_t *counts) noexcept nogil:
    """Copies the slot's value to `out`: OK, MISS, ENDED, BUSY (it never stood still), CORRUPT, DAMAGED or
    -errno. After anything but OK, `out` is
    undefined.
    """
    cdef Slot *slot = slot_of(a, t, offset)
    cdef uint64_t word
    cdef int status, tries
    for tries in range(TRIES_MAX):
        status = load_memory(a, t, offset, &word, out, counts)
        if status == IN_FILE:
            status = load_spilled(a, t, offset, slot, word, out, counts)
            if status < 0 and not living(a, t):
                return ENDED
        if status != BUSY:
            return status
        count(a, C_RETRIES)
    return DAMAGED if load_acquire(&slot.word) == word else BUSY


cdef int invalidate(Arena *a, Handle *t, uint64_t offset) noexcept nogil:
    """Nothing stored there from now on. The page is an orphan; freeing it here, before a sweep has looked, was a bug
    of the kernel patch.
    """
    cdef Slot *slot = slot_of(a, t, offset)
    cdef uint64_t before, after
    cdef int status
    if state_of(load_acquire(&slot.word)) == EMPTY and living(a, t):
        return OK
    status = swing(a, t, slot, EMPTY, 0, &before, &after, TRIES_MAX)      # @invalidate.swing
    if status != OK:
        return status
    count(a, C_INVALIDATIONS)
    return OK


cdef int64_t holds_page(Arena *a, Handle *t, uint64_t offset) noexcept nogil:
    cdef uint64_t state = state_of(load_acquire(&slot_of(a, t, offset).word))
    return state != EMPTY and state <= FILLED_LAID and state != CLOSED


cdef int64_t count_pages(Arena *a, Handle *t) noexcept nogil:
    """Slots that hold a page; one pass."""
    cdef int64_t held = 0
    cdef uint64_t offset
    for offset in range(t.slots):
        held += holds_page(a, t, offset)
    return held


cdef inline int graver(int one, int other) noexcept nogil:
    """Of two slots' ends, what a sync tells: that the life is over, else the first refusal of the file, else that one is busy."""
    return other if one == OK or other == ENDED or (one == BUSY and other < 0) else one


cdef int sync_some(Arena *a, Handle *t, uint64_t *offset, Patience *patience) noexcept nogil:
    """Cleans what is dirty in the next slots from `offset` on, all of it: OK, ENDED, the first -errno, or BUSY."""
    cdef Clean batch[BATCH_MAX]
    cdef uint64_t words[BATCH_MAX]
    cdef uint64_t word
    cdef int n = 0, i, result = OK
    while offset[0] < t.slots and n < BATCH_MAX:
        word = load_acquire(&slot_of(a, t, offset[0]).word)
        if word & DIRTY:
            batch[n].key = key_of(t, offset[0])
            words[n] = word
            n += 1
        offset[0] += 1
    if not living(a, t):
        return ENDED
    if n:
        clean_all(a, t, batch, words, n, patience)
    for i in range(n):
        result = graver(result, batch[i].status)
    return result


cdef int store_batch(
    Arena *a, Handle *t, const uint64_t *offsets, int n, const uint8_t *data, bint through, Patience *patience,
    uint64_t *counts, int *failed, bint *stored,
) noexcept nogil:
    """Stores n pages (at most BATCH_MAX) in order, then cleans them together: OK, or the first failure and the page
    that it hit.
    """
    cdef Clean batch[BATCH_MAX]
    cdef uint64_t words[BATCH_MAX]
    cdef uint64_t sorted_words[BATCH_MAX]
    cdef int order[BATCH_MAX]
    cdef int i, k, status = OK, done = 0, dirty = 0
    stored[0] = False
    while done < n:
        status = store_page(a, t, offsets[done], data + done * a.page_size, patience, &words[done], counts)
        if status != OK:
            break
        done += 1
    failed[0] = done
    if not through:
        return status
    for i in range(done):
        if not (words[i] & DIRTY):
            continue
        k = dirty  # of equal offsets the second claim fails, and finds its word superseded or clean when it is tried again
        while k and batch[k - 1].key > key_of(t, offsets[i]):
            batch[k].key = batch[k - 1].key
            sorted_words[k] = sorted_words[k - 1]
            order[k] = order[k - 1]
            k -= 1
        batch[k].key = key_of(t, offsets[i])
        sorted_words[k] = words[i]
        order[k] = i
        dirty += 1
    if dirty:
        clean_all(a, t, batch, sorted_words, dirty, patience)
    for k in range(dirty):
        if batch[k].status != OK and order[k] < failed[0]:
            failed[0] = order[k]
            status = batch[k].status
            stored[0] = True
    return status
