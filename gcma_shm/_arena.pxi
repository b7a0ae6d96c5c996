# The arena as the core sees it: words, tables, counters.
#
# docs/data-plane.md is the protocol's text; `@step` marks the line that takes the step of that name. Every function
# here and in the other .pxi files can run without the GIL and never touches a Python object. `Slots` calls some of them
# with it, which wait for nobody and touch no file: `load_memory`, `store_page` without patience, `holds_page`.
#
# Who may write what: nursery pages, the client that was granted them, until published. Area pages as cache, the broker
# alone. Area pages as buffer, the buffer's holders alone. Slot words, anyone, by CAS. A slot's place in the file, who
# holds its writer.

# --- slot word: version:28 · state:3 · DIRTY:1 · payload:32
cdef enum:
    VERSION_SHIFT = 36
    STATE_SHIFT = 33
    EMPTY = 0
    CACHED = 1
    SPILLED = 2
    ZERO = 3
    CLOSED = 4
    FILLED = 5          # the payload, four bytes as they lie in memory, over and over: stored nowhere else
    FILLED_LAID = 6     # the same, and LAID, for which the payload has no room

# What the payload of an EMPTY or ZERO word says: 0, or LAID: the file may hold a page at the slot's place, which nobody needs.
cdef enum:
    LAID = 1

# --- how spill files are read and written; the order of layout.SPILL_IO
cdef enum:
    BUFFERED = 0
    UNCACHED = 1
    DIRECT = 2

cdef uint64_t DIRTY = 1ull << 32
cdef uint64_t PAYLOAD = 0xffffffffull
cdef uint64_t CRC = 0xffffffffull

# --- life word: state:2 · owner:16 · sequence:46
cdef enum:
    LIFE_SHIFT = 62
    OWNER_SHIFT = 46
    FREE = 0
    GRANTED = 1
    PUBLISHED = 2
    BUFFER = 3

cdef uint64_t SEQUENCE = (1ull << 46) - 1

# The owner of a nursery page is the client that was granted it. The owner of an area page is the number, counted from 1, of the
# entry in the table of allocations whose range it lies in, a buffer's or a reservation's; 0: none. It changes only together with
# the sequence.

# --- claim word of a reservation: generation:47 · shared:1 · client:16; client 0: lent
cdef enum:
    CLAIM_CLIENT = 0xffff
    CLAIM_SHARED = 1 << 16
    CLAIM_SHIFT = 17
    BROKER = 1
    RESERVATION = 2     # kind in an entry's state word
    KIND = 0xff

# --- flags of an area
cdef enum:
    LENT = 1        # policy
    DRAINED = 1     # state

# --- visited: what is known of the use of a page
cdef enum:
    VISITS = 3      # mask: loads since it came, counted up to `visits_max`; the hand of an area clears them
    BACK = 4        # it came back from the ghosts, or replaces a page of an area: it belongs there

# --- policies, in the order of layout.POLICIES
cdef enum:
    S3FIFO = 0
    SIEVE = 1
    CLOCK = 2

# --- key: type:16 · slot:48
cdef enum:
    KEY_SHIFT = 48

cdef uint64_t SLOT = (1ull << 48) - 1

# What an operation came to; negative: the spill file's errno.
cdef enum:
    OK = 0
    MISS = 1
    ENDED = 2       # the type's life is over
    FULL = 3        # no nursery page within the bound
    BUSY = 4        # another is writing this slot's place in the file
    CORRUPT = 5     # the file's page does not fit its checksum
    DAMAGED = 6     # the tables contradict themselves
    IN_FILE = 7     # not in memory

cdef enum:
    TRIES_MAX = 1 << 20     # of a load or swing that keeps losing; each loss is somebody else's progress
    SWINGS_HELD = 64        # of a swing under the GIL, or on the broker's control thread
    OWN_RING = 4096         # pages that a handle on a type with a share remembers as its own
    BATCH_MAX = 64          # pages that one call cleans or sweeps at once
    RUN_BUFFERED = 4        # neighbours in one buffered write: longer runs lay the file in folios that make overwrites dearer
    SWEEPER_SHARE = 8       # the broker's reclaim thread may claim so much of the nursery at once, BATCH_MAX pages at the most
    PUNCH_SLOTS = 1 << 16   # slots that one turn of the search for places to give back looks at, and ...
    PUNCH_RANGES = 64       # ... ranges that it gives back
    AHEAD_FROM = 2          # loads from the file, each behind the one before, after which the next ones are read ahead ...
    AHEAD_GAP = 8           # slots that are passed over may lie between two of them
    AHEAD_FIRST = 4         # ... so many pages at first, twice as many each time that they were asked for ...
    AHEAD_MAX = 16          # ... and no more than this
    LOOK_EVERY = 16         # tries between two looks at the clock
    GRANT_TRIES = 8         # tickets that a load from the file may draw: it must never cost more than the read that it saves
    SEEK_MAX = 1024         # pages of an area that one promotion passes on its way to a FREE one
    SCRUB_MAX = 2           # pages of a full area that a promotion looks at in search of an orphan
    LAP_MAX = 4096          # pages that one promotion looks at in the order of a queue; of more visited ones in a row the next goes
    VICTIMS_MAX = 4         # pages that a promotion tries to replace
    RESERVE = 16            # of the nursery one page in so many is kept from a type that has all others
    COUNT_LAG = 32          # one ticket in so many of the nursery is not counted yet
    OWN_PASS = 4096         # nursery pages among which a sweep looks for those of types that have their part
    OWN_LOOK = 64           # nursery pages among which a type looks for one of its own
    OWN_REFUSALS = 4        # of them that its file may refuse
    PROVEN = 2              # loads in the nursery that prove a page: more than one, as in the paper
    GHOST_QUARTERS = 5      # of the cache's size: the refault distance below which a page comes back from the ghosts
    PREFETCH_LOAD = 4       # of a single load's page, as many as arrive before the copy begins
    PREFETCH_BATCH = 16     # of the page after next in a batch; the hardware fetches the rest of a page in order
    AHEAD_WORD = 6          # slots ahead of the copy in a batch, of which the word is fetched
    AHEAD_PAGE = 2          # and of which the page is
    LOW_WATER = 8           # the broker is woken when less than 1/8 of the nursery is free ...
    HIGH_WATER = 4          # ... and sweeps until 1/4 is
    RETRIES_MAX = 16        # pages of one type that its file may refuse once more in one round of retries
    AREAS_MAX = 64
    YIELD = 79              # the step of a bounded wait that gives the processor to another thread, and sleeps not yet
    CLIENT_WORDS = 64       # of a set of client numbers, 0 to 4095
    LENT_BLOCK = 64         # pages of which the broker counts together how many hold cache

# Counters of one client, in its record; `COUNTERS` names them in this order. The first HOT of them are counted up by
# `Slots` alone, under the GIL, by plain stores: a locked instruction would wait until all of a page's copy has left the
# store buffer. The others may be counted up by any thread.
cdef enum:
    HOT = 10
    C_STORES = 0
    C_STORES_ZERO
    C_OVERWRITES_SAVED
    C_HITS_NURSERY
    C_HITS_AREA
    C_HITS_ZERO
    C_HITS_SPILL
    C_MISSES
    C_STORES_FILLED
    C_HITS_FILLED
    C_INVALIDATIONS
    C_CLEANED
    C_SPILL_FAILURES
    C_REFAULTS
    C_PROMOTIONS
    C_EVICTIONS
    C_DISCARDS
    C_ORPHANS
    C_HEALS
    C_RETRIES
    C_DIRECT_RECLAIMS
    C_REFUSED_CLOSED
    C_REFUSED_NURSERY_FULL
    C_REFUSED_SLOT_BUSY
    C_REFUSED_SPILL_ERROR
    C_REFUSED_SPILL_CORRUPT
    C_REFUSED_DAMAGED
    C_PUNCHED
    C_READ_AHEAD
    COUNTERS_COUNT

COUNTERS = (
    "stores", "stores_zero", "overwrites_saved", "hits_nursery", "hits_area", "hits_zero", "hits_spill", "misses",
    "stores_filled", "hits_filled", "invalidations", "cleaned", "spill_failures", "refaults", "promotions", "evictions", "discards", "orphans_freed", "heals", "retries",
    "direct_reclaims", "refused_closed", "refused_nursery_full", "refused_slot_busy", "refused_spill_error",
    "refused_spill_corrupt", "refused_damaged", "punched", "read_ahead",
)  # fmt: skip
assert len(COUNTERS) == COUNTERS_COUNT

cdef struct TypeEntry:  # in the arena, two cache lines
    uint64_t life
    uint64_t base
    uint64_t slots
    uint64_t flags
    uint64_t share      # percent of the cache that the type may have
    uint64_t inode      # of this life's spill file, and its device: what else has its name is not it
    uint64_t device
    uint64_t spare[1]
    # Second line: gauges.
    uint64_t clock      # evictions of the type so far, if it has a share of its own
    uint64_t nursery    # its pages in the nursery, as the sweep counted them last
    uint64_t held       # if it has a share: its pages in the nursery, counted by whoever publishes and frees them
    uint64_t gauges[5]

cdef struct AreaEntry:  # in the arena
    uint8_t name[48]
    uint64_t first
    uint64_t pages
    uint64_t policy
    uint64_t share
    uint64_t alignment
    uint64_t state
    uint64_t clock      # steps of the clock hand
    uint64_t lent       # pages that hold cache, also orphans
    uint64_t held       # pages that buffers hold
    uint64_t base

cdef struct ClientRecord:  # in the arena
    uint64_t state
    uint64_t pid
    uint64_t start
    uint64_t tag        # counts this client's claims of a place in the file
    uint64_t pidns
    uint64_t claims     # counts the reservations that this client has claimed
    uint64_t wake
    uint64_t inherited  # of a forked child: its parent's claims at the fork
    uint64_t counters[48]
    uint64_t locked
    uint64_t inherits
    uint64_t quota
    uint64_t spare[5]

cdef struct Slot:
    uint64_t word
    uint64_t side

cdef struct AllocationEntry:  # in the arena: a buffer or a reservation
    uint64_t state      # generation:56 · kind:8
    uint64_t first
    uint64_t pages
    uint64_t area
    uint64_t client
    uint64_t request
    uint64_t claim
    uint64_t deadline
    uint8_t name[48]
    uint64_t lent       # pages of a reservation that hold cache
    uint64_t ordinal    # of the claim, among those of its client

cdef struct SpillFile:  # of this process
    uint64_t life
    int fd
    int32_t users

cdef struct Queue:      # area pages in the order in which they came
    uint32_t newest
    uint32_t oldest
    uint32_t hand       # SIEVE's; 0: at the oldest
    uint64_t pages

cdef struct Arena:  # of this process: addresses of the tables, and what it holds
    uint8_t *base
    uint64_t *head
    uint64_t *hand
    uint64_t *clock
    uint64_t *cache_pages   # pages that cache may be in, as the last sweep began; 0: not known
    uint64_t *counted   # nursery tickets whose pages are in the gauges of their types
    uint64_t *filling
    uint64_t *taking
    uint32_t *wake
    AreaEntry *areas
    TypeEntry *types
    ClientRecord *clients
    AllocationEntry *allocations
    Slot *slots
    uint64_t *life
    uint64_t *key
    uint8_t *visited
    uint8_t *data
    ClientRecord *me
    uint64_t number         # this client's
    uint64_t page_size
    uint64_t pages
    uint64_t nursery
    uint64_t policy         # index into layout.POLICIES
    uint8_t visits_max      # so far are loads of a page counted: what the policy asks for
    uint64_t spill_io       # index into layout.SPILL_IO
    uint64_t slots_count
    uint64_t allocations_count
    # The broker's own. Ranges of the areas, first page:32 · pages:32, not read from the arena: what a peer may write there is not
    # trusted. One word each: the control thread changes them while the reclaim thread reads.
    uint64_t ranges[AREAS_MAX]
    uint64_t promised[AREAS_MAX]  # pages of each area in reservations that are claimed or lent, as the last sweep began
    uint64_t next_area      # whose turn it is to take a promoted page
    # Of its reclaim thread alone, see _queue.pxi: neighbours of each area page in its queue, which that is, and the queues.
    uint32_t *newer
    uint32_t *older
    uint16_t *queue_of
    Queue *queues
    uint64_t lendable       # pages of areas that cache may be in, as the last sweep began
    uint64_t crowded        # queue of a type that has more of them than its share; 0: none
    bint counts_nursery
    uint16_t *nursery_of    # as which type's, plus one, each nursery page is counted
    uint64_t entries_used   # of the table of allocations, all that were ever used
    uint32_t *lent_map      # how many pages of each block hold cache, reservations left out
    # Of the broker's reclaim thread, others read: the sequence under which each nursery page was refused by its file; 0: it was not.
    uint64_t *refused
    uint64_t refused_count  # how many those are, about
    uint64_t retry_at       # nursery page at which the next round of retries begins
    uint64_t in_vain        # tickets that the hand has passed since the sweep last freed a page
    uint64_t vain_laps      # how often that has been a whole nursery
    uint32_t refused_errno  # of the last refusal
    int32_t pins_max
    int32_t pins            # nursery pages that this process keeps from being reclaimed: granted, or claimed to be cleaned
    uint32_t spill_lock
    int spill_dir           # directory descriptor
    int presence            # open file with this client's lock on its record; -1: none
    char *spill_path        # the same by name, should it be removed and made again
    SpillFile spill[256]
    uint8_t plain[256]      # by type: its file does not know how to keep out of the page cache (RWF_DONTCACHE)
    uint32_t direct_memory  # alignment of memory into which a file is read past the page cache
    int run_max             # neighbours in one write
    # Of the broker's reclaim thread.
    int sweeper_pins        # claims that it may hold at once
    uint64_t punch_type     # where the search for places to give back goes on
    uint64_t punch_offset
    uint64_t unpunchable[256]   # by type: the life whose file cannot give back a part of itself
    uint64_t own_at[256]    # nursery page at which each type's search for one of its own goes on
    uint64_t held_at        # nursery page at which the search for pages of types that have their part goes on
    uint64_t recounted      # the sweep's hand when `held` of all types was last counted anew
    crc32c_t crc

cdef struct Handle:  # one life of one type
    uint64_t type
    uint64_t life
    uint64_t base
    uint64_t slots
    uint64_t nursery_part   # pages of the nursery that the type may have
    bint shares             # it has a share: 99 percent or less
    uint32_t *own           # then: the nursery pages that were last filled through this handle, a ring of `own_size`
    uint64_t own_size
    uint64_t own_next
    int fd              # its spill file
    uint64_t expected   # the offset behind the last that was loaded from the file, or read ahead
    uint64_t streak     # how many loads from the file were of the expected offset

cdef struct Tally:      # what one call, without the GIL, adds to the hot counters
    uint64_t counts[HOT]

cdef struct Patience:   # how long an operation may wait
    uint64_t limit_ns
    uint64_t deadline   # 0: it has not begun to wait
    int refusal         # errno of the last file that did not take a page which the operation wanted to reclaim; 0: none


cdef inline bint has_ended(Arena *a, uint64_t number) noexcept nogil:
    """Whether the process of another client, which was seen to hold something, is dead: its lock on its record has gone. The
    kernel takes that away after the last system call of its last thread.
    """
    if a.presence < 0 or number == a.number or number >= 64 * CLIENT_WORDS:
        return False
    return not is_locked(a.presence, <uint8_t *>&a.clients[number] - a.base)


cdef inline void count(Arena *a, int counter) noexcept nogil:
    fetch_add(&a.me.counters[counter], 1)


cdef inline bint is_over(Patience *patience) noexcept nogil:
    """Whether the time is up. It begins with the first asking: whoever need not wait reads no clock."""
    if not patience.deadline:
        patience.deadline = now_ns() + patience.limit_ns
        return not patience.limit_ns
    return now_ns() >= patience.deadline


cdef inline void tick(uint64_t *counter) noexcept nogil:
    """One more, by a plain store: of a tally of our own, or of the hot counters under the GIL."""
    store_relaxed(counter, load_relaxed(counter) + 1)


cdef inline void add_tally(Arena *a, Tally *tally) noexcept:
    """Under the GIL."""
    cdef int i
    for i in range(HOT):
        if tally.counts[i]:
            store_relaxed(&a.me.counters[i], load_relaxed(&a.me.counters[i]) + tally.counts[i])


cdef inline uint64_t state_of(uint64_t word) noexcept nogil:
    return (word >> STATE_SHIFT) & 7


cdef inline uint64_t next_word(uint64_t word, uint64_t state, uint64_t rest) noexcept nogil:
    """The successor of `word`: next version, `state`, and `rest` (DIRTY and payload). The version wraps by overflow."""
    return (((word >> VERSION_SHIFT) + 1) << VERSION_SHIFT) | (state << STATE_SHIFT) | rest


cdef inline bint is_hollow(uint64_t word) noexcept nogil:
    """Whether no value needs the slot's place in the file, once nobody writes there any more."""
    cdef uint64_t state = state_of(word)
    return state == EMPTY or state == ZERO or state == FILLED or state == FILLED_LAID


cdef inline bint is_laid(uint64_t word) noexcept nogil:
    """Whether a hollow word says that the file may hold a page at its place."""
    cdef uint64_t state = state_of(word)
    return state == FILLED_LAID or ((state == EMPTY or state == ZERO) and word & LAID != 0)


cdef inline uint64_t hollow_word(uint64_t before, uint64_t state, uint64_t pattern) noexcept nogil:
    """The word that comes after `before` when the slot has no page any more: EMPTY, ZERO, or FILLED with a pattern. LAID where the file
    may hold a page that nobody needs then.
    """
    cdef bint laid = not is_hollow(before) or is_laid(before)
    if state == FILLED:
        return next_word(before, FILLED_LAID if laid else FILLED, pattern)
    return next_word(before, state, LAID if laid else 0)


cdef inline uint64_t punched_word(uint64_t word) noexcept nogil:
    """The successor of a hollow word when its place was given back."""
    return next_word(word, FILLED, word & PAYLOAD) if state_of(word) == FILLED_LAID else next_word(word, state_of(word), 0)


cdef inline bint names(uint64_t word, uint64_t page) noexcept nogil:
    return state_of(word) == CACHED and (word & PAYLOAD) == page


cdef inline uint64_t life_state(uint64_t life) noexcept nogil:
    return life >> LIFE_SHIFT


cdef inline uint64_t life_owner(uint64_t life) noexcept nogil:
    return (life >> OWNER_SHIFT) & 0xffff


cdef inline uint64_t next_life(uint64_t life, uint64_t state, uint64_t owner) noexcept nogil:
    """`state` under `owner`, sequence + 1: the page changes hands."""
    return (state << LIFE_SHIFT) | (owner << OWNER_SHIFT) | ((life + 1) & SEQUENCE)


cdef inline uint64_t published(uint64_t life) noexcept nogil:
    """The same page in the same hands' sequence, now for all to read."""
    return (<uint64_t>PUBLISHED << LIFE_SHIFT) | (life & SEQUENCE)


cdef inline uint64_t *claim_of(Arena *a, uint64_t owner) noexcept nogil:
    """The claim word of the entry that an area page's owner says, or NULL."""
    return &a.allocations[owner - 1].claim if 0 < owner <= a.allocations_count else NULL


cdef inline bint is_lent(AreaEntry *area) noexcept nogil:
    return load_relaxed(&area.policy) & LENT and not load_relaxed(&area.state) & DRAINED


cdef inline uint64_t next_claim(uint64_t claim, uint64_t client) noexcept nogil:
    """The range changes hands: next generation."""
    return (((claim >> CLAIM_SHIFT) + 1) << CLAIM_SHIFT) | client


cdef inline uint8_t *page_bytes(Arena *a, uint64_t page) noexcept nogil:
    return a.data + page * a.page_size


# A page that is granted, or claimed to be cleaned, cannot be reclaimed by anybody else. Each process pins at most
# `pins_max` pages at once, and all of them together at most half of the nursery: so no one starves the others by
# stopping.

cdef inline int pin(Arena *a, int wanted) noexcept nogil:
    """Takes up to `wanted` pins; returns how many, perhaps 0."""
    cdef int over = add32(&a.pins, wanted) - a.pins_max
    if over <= 0:
        return wanted
    over = min(over, wanted)
    add32(&a.pins, -over)
    return wanted - over


cdef inline void unpin(Arena *a, int pins) noexcept nogil:
    add32(&a.pins, -pins)
