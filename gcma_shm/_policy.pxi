# What stays in memory, as clients and broker see it: how a page's use is noted, and how an evicted one is remembered.
#
# S3-FIFO (Yang et al., SOSP 2023): the nursery is the small queue, the areas are the main queue, the shadow in a SPILLED word is the
# ghost queue. A new page has its time in the nursery to prove itself, by PROVEN loads. What comes back soon after it was evicted from
# there goes to an area without that (BACK). The main queue is swept by SIEVE's hand (Zhang et al., NSDI 2024), see _queue.pxi. With the
# policies `sieve` and `clock` the nursery is a buffer in front of one queue: every page goes on to an area.
#
# Nothing here is needed for the protocol: every word may be wrong or late, and only hits are lost by it.


cdef inline bint has_share(Arena *a, uint64_t type_) noexcept nogil:
    """Whether the type may have a part of the cache only."""
    return 0 < load_relaxed(&a.types[type_].share) < 100


cdef inline uint64_t share_of(Arena *a, uint64_t type_, uint64_t pages) noexcept nogil:
    """How many of those the type may have; at least one."""
    if not has_share(a, type_):
        return pages
    return max(pages * load_relaxed(&a.types[type_].share) // 100, 1)


# --- ghosts: refault by distance, as in the kernel's mm/workingset.c. The clock counts evictions from the nursery; those since a page's
# own are the pages that more memory would have kept beside it. A type with a share has a clock of its own, and its evictions do not
# make the other types' distances look longer than they are.

cdef inline uint64_t *clock_of(Arena *a, uint64_t key) noexcept nogil:
    cdef uint64_t type_ = key >> KEY_SHIFT
    return &a.types[type_].clock if has_share(a, type_) else a.clock


cdef inline uint64_t shadow_now(Arena *a, uint64_t key) noexcept nogil:
    """What a SPILLED word remembers of a page that was not evicted but lost, to a buffer: that it belongs back."""
    return load_relaxed(clock_of(a, key)) & PAYLOAD


cdef inline uint64_t shadow_evicted(Arena *a, uint64_t key, uint64_t page) noexcept nogil:
    """What a SPILLED word remembers of its eviction from `page`. Who had his time in the main queue is no ghost: half a turn of the
    clock ago.
    """
    if page >= a.nursery:
        return (load_relaxed(clock_of(a, key)) - (1ull << 31)) & PAYLOAD
    return load_relaxed(clock_of(a, key)) & PAYLOAD


cdef inline void count_held(Arena *a, uint64_t type_, int by) noexcept nogil:
    """One page of the type more, or less, is in the nursery. Counted of types with a share only; the sweep counts anew each lap, for what
    a death, or a page whose count somebody else was quicker to change, leaves wrong.
    """
    if type_ < 256 and has_share(a, type_):
        fetch_add(&a.types[type_].held, <uint64_t>by)


cdef inline void count_evicted(Arena *a, uint64_t key, uint64_t page) noexcept nogil:
    """After an eviction."""
    count(a, C_EVICTIONS)
    if page < a.nursery:
        fetch_add(clock_of(a, key), 1)
        count_held(a, key >> KEY_SHIFT, -1)


cdef inline bint recently_evicted(Arena *a, uint64_t key, uint64_t word) noexcept nogil:
    """Whether the page of that SPILLED word is a ghost still. A quarter more than the cache's size: measured, see docs/benchmarks.md."""
    cdef uint64_t cache = load_relaxed(a.cache_pages)
    if not cache or cache > a.pages:
        cache = a.pages
    cache = share_of(a, key >> KEY_SHIFT, cache)
    return ((load_relaxed(clock_of(a, key)) - (word & PAYLOAD)) & PAYLOAD) < cache * GHOST_QUARTERS // 4


# --- use

cdef inline void note_visit(Arena *a, uint64_t page) noexcept nogil:
    """A load of `page`. Most write nothing, so the line stays shared between the processors' caches. Two loads at once may count as
    one.
    """
    cdef uint8_t seen = load_byte(&a.visited[page])
    if (seen & VISITS) < a.visits_max:
        store_byte(&a.visited[page], seen + 1)


cdef inline void keep_place(Arena *a, uint64_t page, uint64_t before) noexcept nogil:
    """`page` replaces what the word `before` named: an overwritten page keeps its loads, and its queue. A store by itself proves
    nothing: it is loads that hits serve. To be called before `page` is published.
    """
    cdef uint64_t old = before & PAYLOAD
    cdef uint8_t seen
    if state_of(before) != CACHED or old >= a.pages:
        return
    seen = load_byte(&a.visited[old]) | (BACK if old >= a.nursery else 0)
    if seen:
        store_byte(&a.visited[page], seen)


cdef inline bint is_proven(Arena *a, uint64_t page) noexcept nogil:
    """Whether a nursery page belongs into an area also where that is full."""
    cdef uint8_t seen = load_byte(&a.visited[page])
    return a.policy != S3FIFO or seen & BACK or (seen & VISITS) >= PROVEN
