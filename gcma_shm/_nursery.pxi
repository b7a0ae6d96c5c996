# Nursery pages: taking one, giving one back, and making one where none is free.
#
# The nursery is a ring. `head` counts tickets given out, ticket t standing for page t mod N; `hand` counts those that
# the sweep has passed, which makes pages FREE in the order in which they were granted: first in, first out. `hand + N
# - head` is how much is left.


cdef void abandon(Arena *a, uint64_t page) noexcept nogil:
    """Gives a granted page back unpublished. Only we change its life while it is granted to us, so a plain store
    does.
    """
    store_release(&a.life[page], next_life(load_relaxed(&a.life[page]), FREE, 0))  # @store.abandon
    unpin(a, 1)


cdef void publish(Arena *a, uint64_t page) noexcept nogil:
    """After the swing, never before: a sweep frees a PUBLISHED page whose slot word points elsewhere."""
    store_release(&a.life[page], published(load_relaxed(&a.life[page])))  # @store.publish
    unpin(a, 1)


cdef bint free_orphan(Arena *a, uint64_t page, uint64_t life) noexcept nogil:
    """Frees a page that no word names. Once PUBLISHED, a word that left a page never comes back to it under this
    sequence.
    """
    cdef uint64_t key = load_relaxed(&a.key[page])
    if not cas(&a.life[page], life, next_life(life, FREE, life_owner(life))):  # @orphan.free
        return False
    count(a, C_ORPHANS)
    if page < a.nursery:
        count_held(a, key >> KEY_SHIFT, -1)
    return True


cdef bint evict(Arena *a, uint64_t page, uint64_t life, uint64_t key, uint64_t word) noexcept nogil:
    """Drops a clean page. The word leaves the page before the page becomes FREE, or a load could be sent to somebody
    else's bytes.
    """
    if not cas(&a.slots[key & SLOT].word, word, next_word(word, SPILLED, shadow_evicted(a, key, page))):  # @evict.word
        return False
    count_evicted(a, key, page)
    return cas(&a.life[page], life, next_life(life, FREE, life_owner(life)))  # @evict.free


cdef bint look_up(Arena *a, uint64_t page, uint64_t *life, uint64_t *key, uint64_t *word) noexcept nogil:
    """Whether `page` is PUBLISHED; then its life, key, and that slot's word, all of one sequence."""
    life[0] = load_acquire(&a.life[page])
    if life_state(life[0]) != PUBLISHED:
        return False
    key[0] = load_relaxed(&a.key[page])
    if (key[0] & SLOT) >= a.slots_count or (key[0] >> KEY_SHIFT) >= 256:
        return False
    word[0] = load_acquire(&a.slots[key[0] & SLOT].word)
    fence_acquire()
    return load_relaxed(&a.life[page]) == life[0]


cdef inline bint was_refused(Arena *a, uint64_t page, uint64_t life) noexcept nogil:
    """Whether the broker knows that the file did not take what is on that page. Only the broker does."""
    return a.refused != NULL and load_relaxed(&a.refused[page]) == life & SEQUENCE


cdef int reclaim(Arena *a, uint64_t page, uint64_t seen) noexcept nogil:
    """Makes a nursery page that was PUBLISHED under the life `seen` FREE, cleaning it if need be: OK; -errno: its file refused it. The
    caller has a pin. Waits for nobody: BUSY when another has its hands on it.
    """
    cdef uint64_t life, key, word
    cdef Clean one
    if not look_up(a, page, &life, &key, &word) or life != seen:
        return BUSY
    if names(word, page) and word & DIRTY:
        if was_refused(a, page, life):  # the retries are the reclaim thread's, at its pace
            return -<int>load32(&a.refused_errno)
        one.key = key
        clean_batch(a, &one, 1, 1, NULL)
        if one.status < 0:
            return one.status
        if one.status != OK or not look_up(a, page, &life, &key, &word) or life != seen:
            return BUSY
    if not names(word, page):
        return OK if free_orphan(a, page, life) else BUSY
    if word & DIRTY:
        return BUSY
    return OK if evict(a, page, life, key, word) else BUSY


cdef bint may_reclaim(Arena *a, uint64_t page, bint insist, uint64_t tries) noexcept nogil:
    """Policy: whether a client, which has overtaken the sweep, reclaims `page` itself. What is proven is left to the sweep, which promotes it;
    but a store does not look for another page for long. A load from the file reclaims only what costs no write.
    """
    cdef uint64_t life, key, word
    if a.policy == S3FIFO and is_proven(a, page) and (not insist or tries < LOOK_EVERY):
        return False
    return insist or (look_up(a, page, &life, &key, &word) and not (names(word, page) and word & DIRTY))


cdef inline void wake_sweeper(Arena *a) noexcept nogil:
    """The broker's reclaim thread sets the word to 1 before it sleeps, then looks at the nursery once more; see
    sweeper_sleep.
    """
    if load32(a.wake) and exchange32(a.wake, 0):
        futex_wake(a.wake)


cdef int64_t grant_at_hand(Arena *a, const Handle *t) noexcept nogil:
    """The nursery page of the next ticket, pinned until `publish` or `abandon`, if it is FREE; else -1, and the ticket is left to whoever
    may wait. Waits for nobody and touches no file, so it may be called under the GIL.
    """
    cdef uint64_t ticket, page = load_relaxed(a.head) % a.nursery, life = load_relaxed(&a.life[page])
    if life_state(life) != FREE or is_above_part(a, t) or not pin(a, 1):
        return -1
    ticket = fetch_add(a.head, 1)
    if ticket % a.nursery != page:  # somebody drew it first; another ticket is lost by this, as one is that meets a page in use
        page = ticket % a.nursery
        life = load_relaxed(&a.life[page])
    if <int64_t>(load_relaxed(a.hand) + a.nursery - ticket) < <int64_t>(a.nursery // LOW_WATER):
        wake_sweeper(a)
    if life_state(life) == FREE and cas(&a.life[page], life, next_life(life, GRANTED, a.number)):  # @store.grant
        fence_release()  # as in `grant`
        return page
    unpin(a, 1)
    return -1


cdef int64_t grant(Arena *a, const Handle *t, Patience *patience) noexcept nogil:
    """A nursery page of ours for a page of `t`, pinned until `publish` or `abandon`; or -1: none within the bound, and in `patience` why.
    NULL: none at hand.
    """
    cdef uint64_t ticket, page, life
    cdef int64_t room
    cdef uint64_t tries = 0, refusals = 0, laps = load_relaxed(&a.vain_laps)
    cdef unsigned step = 0
    cdef int status
    cdef int64_t own
    cdef bint insist = patience != NULL
    while not pin(a, 1):  # for other threads of this process, whose stores come to an end by themselves
        if not insist or is_over(patience):
            return -1
        back_off(step)
        step += 1
    # Before a ticket is drawn: a type that has its part takes one of its own pages' place, and everybody else's stay as long as before.
    if (insist or t.shares) and is_above_part(a, t):
        own = grant_own(a, t, patience)
        if own >= 0:
            return own
        if own == GIVE_UP:
            unpin(a, 1)
        if own != TAKE_FREE:
            return -1
    step = 64
    while True:
        ticket = fetch_add(a.head, 1)
        page = ticket % a.nursery
        room = <int64_t>(load_relaxed(a.hand) + a.nursery - ticket)
        if room < <int64_t>(a.nursery // LOW_WATER):
            wake_sweeper(a)
        life = load_relaxed(&a.life[page])
        if room <= 0 and life_state(life) == PUBLISHED and may_reclaim(a, page, insist, tries):
            status = reclaim(a, page, life)
            if status == OK:
                count(a, C_DIRECT_RECLAIMS)
                life = load_relaxed(&a.life[page])
            elif status < 0 and insist:
                patience.refusal = -status
                refusals += 1
                if refusals % LOOK_EVERY == 0 and a.refused == NULL:  # each has cost a write: a full disk is not to be hammered
                    back_off(step)
                    step += 1
        if life_state(life) == FREE and cas(&a.life[page], life, next_life(life, GRANTED, a.number)):  # @store.grant
            # The new sequence is seen before the first byte that we write (a seqlock's entry).
            fence_release()
            return page
        tries += 1
        if not insist:
            if tries >= GRANT_TRIES:
                break
        elif tries % LOOK_EVERY == 0 and is_over(patience):
            break
        if tries % a.nursery == 0:  # a whole lap: every page is granted, pinned, being cleaned by somebody, or refused by its file
            # The broker stores for those that send messages, and others wait for the same worker: it does not wait for a file that
            # has refused half of the nursery (no more than the other half may be in clients' hands), once the sweep has gone all
            # around since we came (a lap under way may have missed what was freed before) and found nothing.
            if insist and 2 * load_relaxed(&a.refused_count) >= a.nursery and load_relaxed(&a.vain_laps) - laps > 1:
                patience.refusal = <int>load32(&a.refused_errno)  # also where the sweep was so far ahead that none of our tickets led to such a page
                break
            back_off(step)
            step += 1
    unpin(a, 1)
    return -1
