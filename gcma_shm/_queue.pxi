# The order of the pages in the areas, as the broker's reclaim thread keeps it for itself: eight bytes of links and two of a name for
# each page. A queue holds the pages of one type that has a share, COMMON those of all the others.
#
# SIEVE and S3-FIFO: a hand goes from the oldest page to the newest and over again. It clears a visited page and leaves it where it is;
# the first one that is not visited goes. New pages come in at the newest end, ahead of the hand, so what is not read soon goes soon,
# however much is kept. CLOCK: a visited page goes to the newest end (FIFO with reinsertion), the oldest that is not visited goes.
#
# A buffer, a claim, an overwrite may take a page at any moment, and nobody tells: such a page is found when it is looked at. A page
# that is cache and in no queue (a broker that begins, a claim that was given up) comes in at the oldest end when the hand by place
# meets it (`seek`).

cdef enum:
    NO_QUEUE = 0
    COMMON = 1
    QUEUE_OF_TYPE = 2   # that of type 0
    QUEUES = QUEUE_OF_TYPE + 256


cdef inline uint64_t queue_for(Arena *a, uint64_t key) noexcept nogil:
    """Also of a key that a peer has damaged."""
    cdef uint64_t type_ = key >> KEY_SHIFT
    return QUEUE_OF_TYPE + type_ if type_ < 256 and has_share(a, type_) else COMMON


cdef void leave_queue(Arena *a, uint64_t page) noexcept nogil:
    cdef Queue *queue = &a.queues[a.queue_of[page]]
    cdef uint32_t newer = a.newer[page], older = a.older[page]
    if a.queue_of[page] == NO_QUEUE:
        return
    if queue.hand == page:
        queue.hand = newer
    if newer:
        a.older[newer] = older
    else:
        queue.newest = older
    if older:
        a.newer[older] = newer
    else:
        queue.oldest = newer
    queue.pages -= 1
    a.queue_of[page] = NO_QUEUE


cdef void join_queue(Arena *a, uint64_t page, uint64_t number, bint newest) noexcept nogil:
    """At its newest end, or at its oldest. (No area page has number 0, which ends the links.)"""
    cdef Queue *queue = &a.queues[number]
    cdef uint32_t at = <uint32_t>page
    leave_queue(a, page)
    a.newer[page] = 0 if newest else queue.oldest
    a.older[page] = queue.newest if newest else 0
    if not queue.pages:
        queue.newest = queue.oldest = at
    elif newest:
        a.newer[queue.newest] = at
        queue.newest = at
    else:
        a.older[queue.oldest] = at
        queue.oldest = at
        queue.hand = 0  # or all that came since would go before it
    queue.pages += 1
    a.queue_of[page] = <uint16_t>number


cdef inline bint may_grow(Arena *a, uint64_t number) noexcept nogil:
    """Whether one more page is within the share of the type that has the queue."""
    return number < QUEUE_OF_TYPE or a.queues[number].pages < share_of(a, number - QUEUE_OF_TYPE, a.lendable)


cdef void find_crowded(Arena *a) noexcept nogil:
    """Which type has more than its share of the areas, as after a large buffer was allocated."""
    cdef uint64_t number
    a.crowded = NO_QUEUE
    for number in range(QUEUE_OF_TYPE, QUEUES):
        if a.queues[number].pages and a.queues[number].pages > share_of(a, number - QUEUE_OF_TYPE, a.lendable):
            a.crowded = number


cdef inline void pass_by(Arena *a, uint64_t page, uint64_t number) noexcept nogil:
    """The hand goes on, and `page` stays."""
    if a.policy == CLOCK:
        join_queue(a, page, number, True)
    else:
        a.queues[number].hand = a.newer[page]


cdef uint64_t next_to_go(Arena *a, uint64_t number) noexcept nogil:
    """The page that the queue gives up next, cache or FREE when we looked; 0: none was found. The hand has passed it."""
    cdef Queue *queue = &a.queues[number]
    cdef uint64_t page, life, step
    for step in range(LAP_MAX):
        page = queue.hand if queue.hand else queue.oldest
        if not page:
            return 0
        life = load_acquire(&a.life[page])
        if life_state(life) == BUFFER or is_claimed(a, life):
            leave_queue(a, page)
        elif is_taken(a, page):  # by the next look it is a buffer's, or FREE
            pass_by(a, page, number)
        elif life_state(life) == FREE or not load_byte(&a.visited[page]) or step == LAP_MAX - 1:
            pass_by(a, page, number)
            return page
        else:
            store_byte(&a.visited[page], 0)
            pass_by(a, page, number)
    return 0
