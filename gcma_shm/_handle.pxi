# The Python face of one life of one swap type.


cdef int refuse(Plane plane, Handle *t, int status, offset, stored, int refusal=0) except -1:
    """Raises what `status` means, and counts it. `refusal`: of a store that found no page, the errno of a file that took none."""
    if status < 0:
        count(plane.a, C_REFUSED_SPILL_ERROR)
        raise SpillError(
            -status,
            f"{os.strerror(-status)}: the spill file of type {t.type} could not be {'written' if stored else 'read'} at slot {offset}; "
            + ("the page is stored, readable, and pinned in memory until the file takes it" if stored else "nothing was changed"),
            bool(stored),
        )
    if status == ENDED:
        count(plane.a, C_REFUSED_CLOSED)
        raise Closed(f"the life of type {t.type} that this handle opened has ended; declare it again with client.swap()")
    if status == FULL:
        count(plane.a, C_REFUSED_NURSERY_FULL)
        raise NurseryFull(
            f"no page to store into became free in time: all {plane.a.nursery} nursery pages, or the {plane.a.pins_max} that one "
            f"process may have in hand, are in use or wait for the spill file; slot {offset} of type {t.type} is unchanged"
            + (f". A spill file takes no pages: {os.strerror(refusal)}" if refusal else "")
        )
    if status == BUSY:
        count(plane.a, C_REFUSED_SLOT_BUSY)
        if not stored:
            raise SlotBusy(f"slot {offset} of type {t.type} changed too fast to be loaded, or changed, {TRIES_MAX} times in a row")
        raise SlotBusy(
            f"slot {offset} of type {t.type} is stored and visible, but another process has been writing it to the spill file for longer "
            "than the bound"
        )
    if status == CORRUPT:
        count(plane.a, C_REFUSED_SPILL_CORRUPT)
        raise SpillCorrupt(0, f"slot {offset} of type {t.type}: the page in the spill file is not the page that was written", False)
    count(plane.a, C_REFUSED_DAMAGED)
    raise ArenaError(f"slot {offset} of type {t.type}: the arena's tables contradict themselves")


cdef inline void fetch_ahead(Arena *a, Slot *slot, int lines) noexcept nogil:
    """A hint: has what `load_page` will read of that slot on its way. It may be wrong, and costs nothing then."""
    cdef uint64_t word = load_relaxed(&slot.word), page = word & PAYLOAD
    if state_of(word) == CACHED and page < a.pages:
        prefetch(&a.life[page])
        prefetch(&a.key[page])
        prefetch(&a.visited[page])
        prefetch_lines(page_bytes(a, page), lines)


cdef class Slots:
    """Store, load and invalidate on one life of one swap type, in shared memory. Safe across threads; see `Plane`
    about fork.
    """

    cdef Plane plane
    cdef Handle t
    cdef readonly bint write_through
    cdef readonly int share     # percent of the cache that the type may have
    cdef uint64_t timeout_ns
    cdef bint closed
    cdef bint held      # whether pages are copied under the GIL: HELD_MAX
    cdef bint opened    # t.fd is ours to close: 0 is a descriptor, and a constructor that is refused its arguments never begins

    def __cinit__(self, Plane plane not None, uint64_t type_, uint64_t life, timeout, *_more):
        if type_ >= <uint64_t>layout.TYPES_MAX:
            raise IndexError(f"type {type_}: expected 0 to {layout.TYPES_MAX - 1}")
        self.plane = plane
        self.timeout_ns = nanoseconds(timeout)
        self.held = plane.page_size <= HELD_MAX
        self.t.type = type_
        self.t.life = life
        # Each before the look at the life: of a life that begins meanwhile nothing is taken for this one's.
        self.t.base = load_acquire(&plane.a.types[type_].base)
        self.t.slots = load_acquire(&plane.a.types[type_].slots)
        self.write_through = not load_acquire(&plane.a.types[type_].flags) & 1
        self.share = load_acquire(&plane.a.types[type_].share)
        self.t.nursery_part = nursery_part(plane.a, type_)
        self.t.shares = 0 < self.share < 100
        if not living(plane.a, &self.t):
            refuse(plane, &self.t, ENDED, None, False)
        if self.t.slots > plane.a.slots_count or self.t.base > plane.a.slots_count - self.t.slots:
            refuse(plane, &self.t, DAMAGED, "(any)", False)
        self.t.fd = open_life(plane.a, type_, life)
        if self.t.fd < 0:
            if not living(plane.a, &self.t):
                refuse(plane, &self.t, ENDED, None, False)
            count(plane.a, C_REFUSED_SPILL_ERROR)
            raise SpillError(
                -self.t.fd,
                f"{os.strerror(-self.t.fd)}: the spill file of type {type_} cannot be opened; nothing was changed"
                + ("; another file has its name" if self.t.fd == -ESTALE else ""),
            )
        self.opened = True
        if self.t.shares:
            self.t.own_size = min(self.t.nursery_part, <uint64_t>OWN_RING)
            self.t.own = <uint32_t *>calloc(self.t.own_size, sizeof(uint32_t))
            if self.t.own == NULL:
                raise MemoryError
        if plane.a.number == BROKER:
            plane.keep_open(type_, life)

    def __dealloc__(self):
        free(self.t.own)
        if self.opened:
            close(self.t.fd)

    @property
    def type(self):
        """The type's number."""
        return self.t.type

    @property
    def life(self):
        """The number of the type's life that this handle opened."""
        return self.t.life

    @property
    def slots(self):
        """How many slots the type has; offsets run from 0 to one less."""
        return self.t.slots

    @property
    def page_size(self):
        """Bytes of a page."""
        return self.plane.page_size

    def close(self):
        """Every later operation on this handle raises Closed. The type and its pages live on."""
        self.closed = True

    def empty_file(self):
        """Gives the disk back that the life's spill file takes. For the broker, when the life has ended; an error changes nothing."""
        ftruncate(self.t.fd, 0)

    @cython.final
    cdef inline int64_t offset_of(self, offset) except -1:
        cdef Py_ssize_t n = PyNumber_AsSsize_t(offset, IndexError)
        if self.closed or self.plane.closed:
            raise Closed(f"this handle on type {self.t.type} is closed")
        if n < 0 or <uint64_t>n >= self.t.slots:
            raise IndexError(f"offset {n}: type {self.t.type} has slots 0 to {self.t.slots - 1}")
        prefetch(slot_of(self.plane.a, &self.t, n))
        return n

    @cython.final
    cdef int open_buffer(self, object_, Py_buffer *buffer, bint writable, Py_ssize_t pages) except -1:
        PyObject_GetBuffer(object_, buffer, PyBUF_SIMPLE | (PyBUF_WRITABLE if writable else 0))
        try:
            return self.check_size(buffer.len, pages)
        except BaseException:
            PyBuffer_Release(buffer)
            raise

    @cython.final
    cdef inline int check_size(self, Py_ssize_t found, Py_ssize_t pages) except -1:
        if found != pages * self.plane.page_size:
            if pages == 1:
                raise ValueError(f"{found} bytes: expected one page, exactly {self.plane.page_size} bytes")
            raise ValueError(f"{found} bytes: expected {pages} pages of {self.plane.page_size} bytes in one buffer")
        return 0

    def load(self, offset, /):
        """The page stored at `offset` as new bytes, or None when nothing is stored there.

        Raises IndexError, TypeError, Closed, SpillError or SpillCorrupt.
        """
        cdef uint64_t n = self.offset_of(offset)
        cdef bytes out = PyBytes_FromStringAndSize(NULL, self.plane.page_size)
        return out if self.load_to(offset, n, <uint8_t *>PyBytes_AS_STRING(out)) == OK else None

    def load_into(self, offset, buffer, /):
        """Copies the page stored at `offset` into `buffer`, writable and one page long; False when nothing is stored
        there.

        After False or an error the content of `buffer` is undefined. Raises as `load`, ValueError for another length.
        """
        cdef uint64_t n = self.offset_of(offset), word
        cdef Arena *a = self.plane.a
        cdef Py_buffer out
        cdef int status
        # (The plane may have been closed since the look at the offset: taking a buffer's memory may run its owner's code.)
        if self.held and not self.plane.closed and PyByteArray_CheckExact(buffer):  # under the GIL nobody resizes it, so it need not be exported
            self.check_size(PyByteArray_GET_SIZE(buffer), 1)
            fetch_ahead(a, slot_of(a, &self.t, n), PREFETCH_LOAD)
            status = load_memory(a, &self.t, n, &word, <uint8_t *>PyByteArray_AS_STRING(buffer), a.me.counters)
            if status == OK or status == MISS:
                return status == OK
        self.open_buffer(buffer, &out, True, 1)
        try:
            return self.load_to(offset, n, <uint8_t *>out.buf) == OK
        finally:
            PyBuffer_Release(&out)

    @cython.final
    cdef int load_to(self, offset, uint64_t n, uint8_t *out) except -1:
        """OK or MISS; anything else is raised."""
        cdef Arena *a = self.plane.a
        cdef Tally tally
        cdef uint64_t word
        cdef int status = BUSY
        fetch_ahead(a, slot_of(a, &self.t, n), PREFETCH_LOAD)
        if self.held and not self.plane.closed:
            status = load_memory(a, &self.t, n, &word, out, a.me.counters)
        if status == BUSY or status == IN_FILE:
            memset(&tally, 0, sizeof(Tally))
            self.plane.enter()
            with nogil:
                status = load_page(a, &self.t, n, out, tally.counts)
            self.plane.leave(&tally)
        if status > MISS or status < 0:
            refuse(self.plane, &self.t, status, offset, False)
        return status

    def store(self, offset, page, /):
        """Stores `page`, bytes-like and exactly one page long, at `offset`, in place of what was there.

        A write-through type returns when the page is also in the spill file, a write-behind type as soon as every
        process can load it. Raises ValueError, IndexError, TypeError, Closed or NurseryFull (nothing has changed);
        SpillError or SlotBusy (stored and visible, but not yet in the file).
        """
        cdef uint64_t n = self.offset_of(offset)
        cdef Py_buffer source
        if PyBytes_CheckExact(page):  # never changes, and our caller holds it: the buffer protocol has nothing to add
            self.check_size(PyBytes_GET_SIZE(page), 1)
            self.store_from(offset, n, <const uint8_t *>PyBytes_AS_STRING(page))
            return
        self.open_buffer(page, &source, False, 1)
        try:
            self.store_from(offset, n, <const uint8_t *>source.buf)
        finally:
            PyBuffer_Release(&source)

    @cython.final
    cdef int store_from(self, offset, uint64_t n, const uint8_t *data) except -1:
        cdef Arena *a = self.plane.a
        cdef Patience patience = Patience(self.timeout_ns, 0, 0)
        cdef Tally tally
        cdef uint64_t word = 0
        cdef int status = FULL
        cdef bint stored = False
        if self.held and not self.plane.closed:
            status = store_page(a, &self.t, n, data, NULL, &word, a.me.counters)
            if status == OK and not (self.write_through and word & DIRTY):
                return 0
        memset(&tally, 0, sizeof(Tally))
        self.plane.enter()
        with nogil:
            if status == FULL:
                status = store_page(a, &self.t, n, data, &patience, &word, tally.counts)
            if status == OK and self.write_through and word & DIRTY:
                stored = True
                status = clean_wait(a, &self.t, key_of(&self.t, n), word, &patience)
        self.plane.leave(&tally)
        if status != OK:
            refuse(self.plane, &self.t, status, offset, stored, patience.refusal)
        return 0

    def invalidate_page(self, offset, /):
        """Forgets what is stored at `offset`; loads miss until the next store. Nothing stored there: no error."""
        cdef uint64_t n = self.offset_of(offset)
        cdef int status
        with nogil:
            status = invalidate(self.plane.a, &self.t, n)
        if status != OK:
            refuse(self.plane, &self.t, status, offset, False)

    def sync(self, timeout=None):
        """Returns when all that was stored before is in the spill file.

        `timeout`: seconds that other processes' writes of the same slots may be waited for in all; None: each no longer than
        the handle's own timeout. Our own writes take as long as the file takes. Raises SlotBusy; SpillError when the file did
        not take a page, after all others were tried; Closed.
        """
        cdef uint64_t end = now_ns() + nanoseconds(timeout), offset = 0
        cdef Patience patience = Patience(0, 0, 0)
        cdef Tally tally
        cdef int status = OK, some
        self.offset_of(0)
        memset(&tally, 0, sizeof(Tally))
        while offset < self.t.slots and status != ENDED:
            PyErr_CheckSignals()
            self.plane.enter()
            patience.deadline = min(end, now_ns() + self.timeout_ns)
            with nogil:
                some = sync_some(self.plane.a, &self.t, &offset, &patience)
            self.plane.leave(&tally)
            status = graver(status, some)
        if status != OK:
            refuse(self.plane, &self.t, status, "(any)", True)

    def __len__(self):
        """How many slots hold a page: counted exactly, in one pass."""
        cdef int64_t held
        self.offset_of(0)
        with nogil:
            held = count_pages(self.plane.a, &self.t)
            if not living(self.plane.a, &self.t):
                held = -1
        if held < 0:
            refuse(self.plane, &self.t, ENDED, None, False)
        return held

    def __contains__(self, offset):
        """Whether a page is stored at `offset`; False for offsets that the type does not have."""
        cdef bint held
        self.offset_of(0)
        try:
            n = self.offset_of(offset)
        except IndexError:
            return False
        held = holds_page(self.plane.a, &self.t, n)
        if not living(self.plane.a, &self.t):
            refuse(self.plane, &self.t, ENDED, None, False)
        return held

    def __bool__(self):
        """A handle is true, also when nothing is stored; `len` counts."""
        return True

    @cython.final
    cdef uint64_t *offsets_of(self, list wanted) except NULL:
        """The checked offsets, to be freed."""
        cdef Py_ssize_t i
        cdef uint64_t *offsets = <uint64_t *>malloc(max(len(wanted), 1) * sizeof(uint64_t))
        if offsets == NULL:
            raise MemoryError
        try:
            for i in range(len(wanted)):
                offsets[i] = self.offset_of(wanted[i])
        except BaseException:
            free(offsets)
            raise
        return offsets

    def load_many(self, offsets, out, /):
        """Loads page after page into `out`, one contiguous writable buffer of `len(offsets)` pages.

        Returns the mask of hits, a list of bool; the pages of misses are undefined. Each page is atomic by itself. An
        error tells in `.done` how many pages were loaded before it.
        """
        cdef list wanted = list(offsets), hits = [False] * len(wanted)
        cdef Py_ssize_t i, k, first, n = len(wanted)
        cdef Py_buffer target
        cdef Tally tally
        cdef int status[BATCH_MAX]
        cdef Slot *ahead
        cdef uint64_t *slots = self.offsets_of(wanted)
        try:
            self.open_buffer(out, &target, True, n)
        except BaseException:
            free(slots)
            raise
        try:
            for first in range(0, n, BATCH_MAX):
                memset(&tally, 0, sizeof(Tally))
                self.plane.enter()
                with nogil:
                    for k in range(min(BATCH_MAX, n - first)):
                        if first + k + AHEAD_WORD < n:
                            prefetch(slot_of(self.plane.a, &self.t, slots[first + k + AHEAD_WORD]))
                        if first + k + AHEAD_PAGE < n:
                            ahead = slot_of(self.plane.a, &self.t, slots[first + k + AHEAD_PAGE])
                            fetch_ahead(self.plane.a, ahead, PREFETCH_BATCH)
                        status[k] = load_page(
                            self.plane.a, &self.t, slots[first + k],
                            <uint8_t *>target.buf + (first + k) * self.plane.page_size, tally.counts,
                        )  # fmt: skip
                        if status[k] > MISS or status[k] < 0:
                            break
                self.plane.leave(&tally)
                for k in range(min(BATCH_MAX, n - first)):
                    if status[k] > MISS or status[k] < 0:
                        with done(first + k):
                            refuse(self.plane, &self.t, status[k], wanted[first + k], False)
                    hits[first + k] = status[k] == OK
        finally:
            PyBuffer_Release(&target)
            free(slots)
        return hits

    def store_many(self, offsets, pages, /):
        """Stores page after page from `pages`, one contiguous buffer of `len(offsets)` pages; of equal offsets the
        last wins.

        Each page is atomic by itself. Neighbours go to the spill file in one write. An error tells in `.done` how many
        pages, from the first on, were stored as the type's way of writing demands.
        """
        cdef list wanted = list(offsets)
        cdef Py_ssize_t first, n = len(wanted)
        # A batch must not fill the nursery with pages that only its own end would clean.
        cdef Py_ssize_t batch_max = max(1, min(BATCH_MAX, <Py_ssize_t>self.plane.a.nursery // 4))
        cdef Patience patience = Patience(self.timeout_ns, 0, 0)
        cdef Py_buffer source
        cdef Tally tally
        cdef int status, failed, size
        cdef bint stored
        cdef uint64_t *slots = self.offsets_of(wanted)
        try:
            self.open_buffer(pages, &source, False, n)
        except BaseException:
            free(slots)
            raise
        try:
            for first in range(0, n, batch_max):
                size = <int>min(batch_max, n - first)
                patience.refusal = 0
                memset(&tally, 0, sizeof(Tally))
                self.plane.enter()
                with nogil:
                    status = store_batch(
                        self.plane.a, &self.t, slots + first, size, <uint8_t *>source.buf + first * self.plane.page_size,
                        self.write_through, &patience, tally.counts, &failed, &stored,
                    )  # fmt: skip
                self.plane.leave(&tally)
                if status != OK:
                    with done(first + failed):
                        refuse(self.plane, &self.t, status, wanted[first + failed], stored, patience.refusal)
        finally:
            PyBuffer_Release(&source)
            free(slots)

    def load_at_hand(self, offset, /):
        """As `load`, but never reads a file, and holds the GIL: for a thread that must not wait. False: ask `load`."""
        cdef uint64_t n = self.offset_of(offset), word
        cdef Arena *a = self.plane.a
        cdef bytes out
        cdef int status
        if state_of(load_acquire(&slot_of(a, &self.t, n).word)) == SPILLED:
            return False
        out = PyBytes_FromStringAndSize(NULL, self.plane.page_size)
        status = load_memory(a, &self.t, n, &word, <uint8_t *>PyBytes_AS_STRING(out), a.me.counters)
        return out if status == OK else None if status == MISS else False

    def store_at_hand(self, offset, page, /):
        """As `store`, but never writes a file, nor waits for a page to store into, and holds the GIL. False: nothing was stored,
        ask `store`.
        """
        cdef uint64_t n = self.offset_of(offset), word = 0
        cdef Arena *a = self.plane.a
        cdef Py_buffer source
        cdef int status
        if self.write_through:
            return False
        self.open_buffer(page, &source, False, 1)
        try:
            status = store_page(a, &self.t, n, <uint8_t *>source.buf, NULL, &word, a.me.counters)
        finally:
            PyBuffer_Release(&source)
        return status == OK

    def load_batch(self, offsets, /):
        """As `load_many`, for a message: the mask as bytes, 1 for a hit, and the pages of the hits as new bytes, one after another."""
        cdef Py_ssize_t size = self.plane.page_size, n = len(offsets), held = 0, i
        cdef bytes pages = PyBytes_FromStringAndSize(NULL, n * size)  # not cleared: what a miss leaves there is not passed on
        cdef char *at = PyBytes_AS_STRING(pages)
        cdef list hits = self.load_many(offsets, PyMemoryView_FromMemory(at, n * size, PyBUF_WRITE))
        for i in range(n):
            if hits[i]:
                if held != i:
                    memcpy(at + held * size, at + i * size, size)
                held += 1
        return bytes(hits), pages if held == n else pages[: held * size]


class done:
    """Notes in an error how much of a batch was served before it."""

    def __init__(self, pages):
        self.pages = pages

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None:
            error.done = self.pages
