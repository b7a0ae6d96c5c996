# Reading the tables of an arena, which may be moving, without a step of the protocol and without a write: what check.py asks.
#
# A slot word and what it names are read like a load does, the word once more in the end: what is told of them was so at one moment.

# What a slot can be suspected of; `SUSPICIONS` names them in this order.
cdef enum:
    SOUND = 0
    NO_STATE
    DIRTY_NOTHING
    SAYS_TOO_MUCH
    NO_PAGE
    DIRTY_IN_AREA
    NOT_ITS_PAGE
    CLOSED_ALIVE
    OPEN_DEAD
    FILE_DIFFERS
    MEMORY_DIFFERS
    FILE_UNREADABLE
    FILE_KEEPS
    SUSPICIONS_COUNT
    VALUELESS           # its value is in no file, or there is none
    MOVING              # it never stood still

SUSPICIONS = (
    "sound", "no-state", "dirty-nothing", "says-too-much", "no-page", "dirty-in-area", "not-its-page", "closed-alive", "open-dead",
    "file-differs", "memory-differs", "file-unreadable", "file-keeps",
)  # fmt: skip
assert len(SUSPICIONS) == SUSPICIONS_COUNT

cdef enum:
    LOOKS_MAX = 64      # at one slot whose word changes meanwhile

cdef struct Suspect:
    int why
    uint64_t at         # slot or page
    uint64_t word
    uint64_t life
    uint64_t key


cdef int suspicion(Arena *a, int64_t type_, uint64_t slot, uint64_t word, Suspect *s) noexcept nogil:
    """What is wrong with a slot of the living type `type_`, -1: of none, whose word is `word`."""
    cdef uint64_t state = state_of(word), page = word & PAYLOAD
    if state > FILLED_LAID:
        return NO_STATE
    if word & DIRTY and state != CACHED:
        return DIRTY_NOTHING
    if page and (state == CLOSED or (page != LAID and (state == EMPTY or state == ZERO))):
        return SAYS_TOO_MUCH
    if state == CACHED and page >= a.pages:
        return NO_PAGE
    if word & DIRTY and page >= a.nursery:
        return DIRTY_IN_AREA
    if type_ < 0:
        return SOUND if state == CLOSED or word == 0 else OPEN_DEAD
    if state == CLOSED:
        return CLOSED_ALIVE
    if state == CACHED and page < a.nursery:
        # No nursery page is freed while a word names it, and its key is written before that. In an area the word may be stale.
        s.life = load_acquire(&a.life[page])
        s.key = load_relaxed(&a.key[page])
        if (life_state(s.life) != PUBLISHED and life_state(s.life) != GRANTED) or s.key != ((<uint64_t>type_ << KEY_SHIFT) | slot):
            return NOT_ITS_PAGE
    return SOUND


cdef int page_suspicion(Arena *a, uint64_t type_, uint64_t base, uint64_t slot, int fd, uint8_t *out, Suspect *s, uint64_t *bytes_) noexcept nogil:
    """What is wrong with the value of a slot, if it is clean; or VALUELESS, or MOVING."""
    cdef Slot *at = &a.slots[slot]
    cdef uint64_t word, page, life = 0, claim, side
    cdef uint64_t *claimed
    cdef bint in_memory, file_fits, memory_fits
    cdef int64_t got
    cdef int tries
    for tries in range(LOOKS_MAX):
        word = load_acquire(&at.word)
        page = word & PAYLOAD
        in_memory = state_of(word) == CACHED and not word & DIRTY and page < a.pages
        if not in_memory and state_of(word) != SPILLED:
            return VALUELESS
        claimed = NULL
        claim = 0
        if in_memory:  # else, where the word is stale, it leads to the file
            life = load_acquire(&a.life[page])
            if page >= a.nursery and life_owner(life):
                claimed = claim_of(a, life_owner(life))
                claim = load_acquire(claimed) if claimed != NULL else CLAIM_CLIENT
            in_memory = not claim & CLAIM_CLIENT and load_relaxed(&a.key[page]) == ((type_ << KEY_SHIFT) | slot) and (
                life_state(life) == PUBLISHED or (life_state(life) == GRANTED and page < a.nursery)
            )
        side = load_acquire(&at.side)
        got = spill_read(a, type_, fd, out, a.page_size, (slot - base) * a.page_size)
        file_fits = got == <int64_t>a.page_size and crc32c_page(&a.crc, out) == <uint32_t>(side & CRC)
        memory_fits = not in_memory or not file_fits or memcmp(out, page_bytes(a, page), a.page_size) == 0
        fence_acquire()
        if load_acquire(&at.word) != word:  # else nobody has written this place of the file meanwhile
            continue
        if in_memory and ((load_acquire(&a.life[page]) ^ life) & SEQUENCE or (claimed != NULL and load_acquire(claimed) != claim)):
            continue
        bytes_[0] += a.page_size
        s.word = word
        s.life = life
        s.key = <uint64_t>-got if got < 0 else 0
        if got < 0:
            return FILE_UNREADABLE
        return SOUND if file_fits and memory_fits else FILE_DIFFERS if not file_fits else MEMORY_DIFFERS
    return MOVING


cdef int hole_suspicion(Arena *a, uint64_t base, uint64_t slot, int fd, uint8_t *out, int64_t *data_at, Suspect *s) noexcept nogil:
    """Whether the file holds something at the place of a slot that has no value in it, and whose word does not say so.

    `data_at`: where the file's next data is, as far as the slots before have asked; what is written since was not there then.
    """
    cdef Slot *of = &a.slots[slot]
    cdef uint64_t word = load_acquire(&of.word), side = load_acquire(&of.side)
    cdef int64_t at = (slot - base) * a.page_size, got
    if not is_hollow(word) or is_laid(word) or side >> 32:
        return VALUELESS
    if data_at[0] < at:
        data_at[0] = lseek(fd, at, SEEK_DATA)
        if data_at[0] < 0:  # nothing behind
            data_at[0] = NEVER
    if data_at[0] >= at + <int64_t>a.page_size:
        return VALUELESS
    got = spill_read(a, 0, fd, out, a.page_size, at)
    if got <= 0 or (out[0] == 0 and memcmp(out, out + 1, got - 1) == 0):
        return VALUELESS
    fence_acquire()
    if load_acquire(&of.word) != word or load_acquire(&of.side) != side:
        return VALUELESS
    s.word = word
    return FILE_KEEPS


cdef class Survey:
    """The tables of an arena in memory that may be read-only. `limit`: how many suspects of a kind one call lists; all are counted."""

    cdef Arena *a
    cdef Py_buffer memory
    cdef Suspect *suspects
    cdef uint64_t found
    cdef uint64_t limit

    def __cinit__(self, memory, geometry, uint64_t limit):
        cdef uint8_t *base
        cdef Arena *a = <Arena *>calloc(1, sizeof(Arena))
        self.suspects = <Suspect *>calloc(limit, sizeof(Suspect))
        self.a = a
        if a == NULL or self.suspects == NULL:
            raise MemoryError
        self.limit = limit
        PyObject_GetBuffer(memory, &self.memory, PyBUF_SIMPLE)
        if self.memory.len != geometry.size:
            raise ArenaError(f"mapped {self.memory.len} bytes of an arena of {geometry.size}")
        base = <uint8_t *>self.memory.buf
        a.allocations = <AllocationEntry *>(base + <size_t>geometry.allocations_at)
        a.slots = <Slot *>(base + <size_t>geometry.slots_at)
        a.life = <uint64_t *>(base + <size_t>geometry.life_at)
        a.key = <uint64_t *>(base + <size_t>geometry.key_at)
        a.data = base + <size_t>geometry.pages_at
        a.page_size = geometry.page_size
        a.pages = geometry.pages
        a.nursery = geometry.nursery_pages
        a.slots_count = geometry.slots
        a.allocations_count = geometry.allocations_max
        crc32c_init(&a.crc, a.page_size, True)

    def __dealloc__(self):
        if self.memory.buf != NULL:
            PyBuffer_Release(&self.memory)
        free(self.suspects)
        free(self.a)

    cdef void suspect(self, Suspect *s) noexcept nogil:
        if self.found < self.limit:
            self.suspects[self.found] = s[0]
        self.found += 1

    cdef list listed(self):
        cdef uint64_t i
        return [
            (SUSPICIONS[self.suspects[i].why], self.suspects[i].at, self.suspects[i].word, self.suspects[i].life, self.suspects[i].key)
            for i in range(min(self.found, self.limit))
        ]

    cdef int in_slots(self, uint64_t base, uint64_t count) except -1:
        if count > self.a.slots_count or base > self.a.slots_count - count:
            raise IndexError(f"slots {base} to {base + count} are not in the slot table")
        return 0

    cdef int in_pages(self, uint64_t first, uint64_t count) except -1:
        if count > self.a.pages or first > self.a.pages - count:
            raise IndexError(f"pages {first} to {first + count} are not in the arena")
        return 0

    def slots(self, uint64_t base, uint64_t count, int64_t type_):
        """Looks at the words of a range of slots, of the living type `type_`, or -1: of none.

        Returns how many there are in each state, how many are dirty, the end of the last clean slot, who is writing places in the file
        (client: slots, first slot), how many are suspect, and some of them.
        """
        cdef uint64_t states[8]
        cdef uint64_t dirty = 0, clean_end = 0, i, word = 0, side, writer
        cdef uint64_t *writers
        cdef Suspect s
        cdef int tries
        self.in_slots(base, count)
        writers = <uint64_t *>calloc(2 * 4096, sizeof(uint64_t))
        if writers == NULL:
            raise MemoryError
        memset(states, 0, sizeof(states))
        self.found = 0
        with nogil:
            for i in range(base, base + count):
                for tries in range(LOOKS_MAX):
                    memset(&s, 0, sizeof(s))
                    word = load_acquire(&self.a.slots[i].word)
                    s.why = suspicion(self.a, type_, i, word, &s)
                    if s.why == SOUND:
                        break
                    fence_acquire()
                    if load_acquire(&self.a.slots[i].word) == word:
                        s.at = i
                        s.word = word
                        self.suspect(&s)
                        break
                states[state_of(word)] += 1
                if word & DIRTY:
                    dirty += 1
                elif state_of(word) == CACHED or state_of(word) == SPILLED:
                    clean_end = i + 1 - base
                side = load_acquire(&self.a.slots[i].side)
                if side >> 32:
                    writer = side >> 52
                    if not writers[2 * writer]:
                        writers[2 * writer + 1] = i
                    writers[2 * writer] += 1
        try:
            writing = {n: (writers[2 * n], writers[2 * n + 1]) for n in range(4096) if writers[2 * n]}
        finally:
            free(writers)
        return tuple(states[i] for i in range(8)), dirty, clean_end, writing, self.found, self.listed()

    def nursery(self):
        """Looks at the nursery's lives: how many pages are in each state, who was granted some (client: pages, first page), and
        which are suspect.
        """
        cdef uint64_t states[4]
        cdef uint64_t page, life, key, owner
        cdef Suspect s
        granted = {}
        memset(states, 0, sizeof(states))
        self.found = 0
        for page in range(self.a.nursery):
            life = load_acquire(&self.a.life[page])
            states[life_state(life)] += 1
            owner = life_owner(life)
            memset(&s, 0, sizeof(s))
            s.at = page
            s.life = life
            if life_state(life) == GRANTED:
                pages, first = granted.get(owner, (0, page))
                granted[owner] = pages + 1, first
            elif life_state(life) == BUFFER or owner:
                s.why = NO_STATE
                self.suspect(&s)
            elif life_state(life) == PUBLISHED:
                key = load_relaxed(&self.a.key[page])
                # The page may have changed hands, and its key with it.
                if ((key & SLOT) >= self.a.slots_count or key >> KEY_SHIFT > 255) and load_acquire(&self.a.life[page]) == life:
                    s.why = NO_PAGE
                    s.key = key
                    self.suspect(&s)
        return tuple(states[i] for i in range(4)), granted, self.found, self.listed()

    def lives(self, uint64_t first, uint64_t count, uint64_t owner, uint64_t allowed):
        """Looks at the lives of a range of area pages, which should have that owner and one of the states in the set of bits
        `allowed`: how many are suspect, and some of them.
        """
        cdef uint64_t page, life
        cdef Suspect s
        self.in_pages(first, count)
        memset(&s, 0, sizeof(s))
        self.found = 0
        with nogil:
            for page in range(first, first + count):
                life = load_acquire(&self.a.life[page])
                if life_owner(life) != owner or not (allowed >> life_state(life)) & 1:
                    s.at = page
                    s.life = life
                    self.suspect(&s)
        return self.found, self.listed()

    def published(self, uint64_t first, uint64_t count, uint64_t owner):
        """How many pages of the range are published under that owner."""
        cdef uint64_t page, found = 0, life
        self.in_pages(first, count)
        with nogil:
            for page in range(first, first + count):
                life = load_acquire(&self.a.life[page])
                found += life_state(life) == PUBLISHED and life_owner(life) == owner
        return found

    def pages(self, uint64_t type_, uint64_t base, uint64_t first, uint64_t count, int fd):
        """Compares the clean values of a range of slots with their checksums, their places in the file `fd` and, if they are in
        memory, with each other. `base`: where the slots of the type begin.

        Returns how many bytes of values were looked at, how many slots never stood still, how many are suspect, and some of them.
        """
        cdef uint64_t i, bytes_ = 0, moving = 0
        cdef int64_t data_at = -1
        cdef Suspect s
        cdef uint8_t *out
        self.in_slots(first, count)
        if first < base:
            raise IndexError(f"slot {first} is below the type's first, {base}")
        out = <uint8_t *>malloc(self.a.page_size)
        if out == NULL:
            raise MemoryError
        self.found = 0
        with nogil:
            for i in range(first, first + count):
                memset(&s, 0, sizeof(s))
                s.at = i
                s.why = page_suspicion(self.a, type_, base, i, fd, out, &s, &bytes_)
                if s.why == VALUELESS:
                    s.why = hole_suspicion(self.a, base, i, fd, out, &data_at, &s)
                if s.why == MOVING:
                    moving += 1
                elif s.why != SOUND and s.why != VALUELESS:
                    self.suspect(&s)
        free(out)
        return bytes_, moving, self.found, self.listed()
