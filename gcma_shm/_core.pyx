# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, freethreading_compatible=False, binding=False, embedsignature=True, embedsignature.format=clinic
"""The data plane: slots, pages and spill files of one mapped arena; outside the GIL whatever may wait or touches a file.

`Plane` is one process's view of an arena; `Slots` one life of one swap type on it; `Span` a contiguous buffer's memory.
The protocol is in docs/data-plane.md, its steps in the .pxi files included here.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBUF_WRITE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING, PyByteArray_CheckExact, PyByteArray_GET_SIZE
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.float cimport PyFloat_CheckExact
from cpython.list cimport PyList_CheckExact
from cpython.long cimport PyLong_CheckExact
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.number cimport PyNumber_AsSsize_t
from cpython.object cimport PyObject
from cpython.tuple cimport PyTuple_CheckExact
from cpython.unicode cimport PyUnicode_CheckExact
from libc.errno cimport EINTR, EIO, ENOENT, ENOMEM, ENOSPC, ENOSYS, EOPNOTSUPP, ESTALE, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset, strdup

from gcma_shm._atomics cimport *

import os

from gcma_shm import layout
from gcma_shm.errors import ArenaError, Closed, NurseryFull, SlotBusy, SpillCorrupt, SpillError, StaleHandle

cdef extern from "Python.h":  # borrowed, as cpython.tuple's are not
    PyObject *PyTuple_GET_ITEM(object, Py_ssize_t)
    PyObject *PyList_GET_ITEM(object, Py_ssize_t)

cdef extern from "fcntl.h" nogil:
    int O_RDONLY, O_RDWR, O_CLOEXEC, O_DIRECT, O_DIRECTORY, O_NOCTTY, O_NOFOLLOW
    int FALLOC_FL_PUNCH_HOLE, FALLOC_FL_KEEP_SIZE, POSIX_FADV_DONTNEED, SYNC_FILE_RANGE_WRITE
    int open_ "open"(const char *, int, ...)
    int openat(int, const char *, int, ...)
    int fallocate(int, int, int64_t, int64_t)
    int posix_fadvise(int, int64_t, int64_t, int)
    int sync_file_range(int, int64_t, int64_t, unsigned int)

cdef extern from "stdlib.h" nogil:
    void *aligned_alloc(size_t, size_t)

cdef extern from "sys/stat.h" nogil:
    struct stat_t "stat":
        uint64_t st_ino
        uint64_t st_dev
        int64_t st_blksize
    int fstat(int, stat_t *)

cdef extern from "unistd.h" nogil:
    int close(int)
    int dup3(int, int, int)
    int ftruncate(int, int64_t)
    int64_t lseek(int, int64_t, int)
    int SEEK_DATA
    ssize_t pread(int, void *, size_t, int64_t)

cdef extern from "sys/uio.h" nogil:
    ssize_t preadv(int, const iovec *, int, int64_t)
    ssize_t preadv2(int, const iovec *, int, int64_t, int)

cdef extern from "_direct.h" nogil:
    int GCMA_DONTCACHE
    bint direct_alignment_of "direct_alignment"(int fd, uint32_t *memory, uint32_t *offset)

cdef extern from "sys/mman.h" nogil:
    int madvise(void *, size_t, int)

cdef enum:
    MADV_POPULATE_WRITE = 23  # since Linux 5.14; older headers have no name for it

include "_arena.pxi"
include "_spill.pxi"
include "_clean.pxi"
include "_policy.pxi"
include "_nursery.pxi"
include "_shares.pxi"
include "_readahead.pxi"
include "_slots.pxi"
include "_claim.pxi"
include "_retry.pxi"
include "_punch.pxi"
include "_queue.pxi"
include "_promote.pxi"
include "_sweep.pxi"
include "_ranges.pxi"
include "_recover.pxi"
include "_survey.pxi"

copy_init()

# The tables have a size in layout.py and a shape here.
assert sizeof(TypeEntry) == layout.TYPE_BYTES
assert sizeof(AreaEntry) == layout.AREA_BYTES
assert sizeof(ClientRecord) == layout.CLIENT_BYTES
assert sizeof(AllocationEntry) == layout.ALLOCATION_BYTES
assert sizeof(Slot) == layout.SLOT_BYTES
assert layout.TYPES_MAX == 256 and layout.CLIENTS_MAX < 1 << 12

cdef uint64_t NEVER = <uint64_t>-1 >> 1  # in nanoseconds; added to any time of day it does not overflow


cdef uint64_t nanoseconds(timeout) except? 0:
    """A timeout in seconds; None: for ever."""
    cdef double ns
    if timeout is None:
        return NEVER
    ns = float(timeout) * 1e9
    return <uint64_t>min(ns, <double>NEVER / 2) if ns > 0 else 0  # 0 also for what is not a number


def scheduler_slice(double seconds):
    """Asks for scheduler slices of that length for the calling thread and those that it starts from now on; 0: the default. Returns
    what they were.

    A thread that wakes with shorter slices need not wait for one that runs with longer ones. Where the kernel has no such wish
    (before Linux 6.12), or refuses it, nothing changes.
    """
    return set_slice(<uint64_t>(seconds * 1e9)) / 1e9


def address_of(memory):
    """Where the memory of a contiguous bytes-like object begins in this process."""
    cdef Py_buffer view
    PyObject_GetBuffer(memory, &view, PyBUF_SIMPLE)
    at = <uint64_t><uint8_t *>view.buf
    PyBuffer_Release(&view)
    return at


def direct_alignment(int fd):
    """What O_DIRECT asks of memory, and of offset and length, in bytes (0: there is no such thing); None: nobody tells of this file."""
    cdef uint32_t memory, offset
    return (memory, offset) if direct_alignment_of(fd, &memory, &offset) else None


cdef class Plane:
    """One process's view of a mapped arena.

    Safe to use from several threads. After a fork the child calls `become` before anything else.
    """

    cdef Arena *a
    cdef Py_buffer memory
    cdef readonly object geometry
    cdef readonly Py_ssize_t page_size
    cdef readonly bint closed
    cdef uint8_t *populated  # by block of pages: whether this process's page table has them
    cdef int users      # operations under way in threads of this process; changed under the GIL
    cdef object __weakref__

    def __cinit__(self, memory, geometry, int number, spill_dir, *, bint crc_hardware=True):
        """`memory`: the whole arena, writable. `number`: this client's record. `spill_dir`: where the spill files
        are.
        """
        cdef uint8_t *base
        cdef Arena *a = <Arena *>calloc(1, sizeof(Arena))
        if a == NULL:
            raise MemoryError
        self.a = a
        a.spill_dir = a.presence = -1
        for i in range(256):
            a.spill[i].fd = -1  # before anything can fail: 0 is a descriptor
        PyObject_GetBuffer(memory, &self.memory, PyBUF_SIMPLE | PyBUF_WRITABLE)
        if self.memory.len != geometry.size:
            raise ArenaError(f"mapped {self.memory.len} bytes of an arena of {geometry.size}")
        base = <uint8_t *>self.memory.buf
        self.geometry = geometry
        self.page_size = geometry.page_size
        a.base = base
        a.head = <uint64_t *>(base + <size_t>layout.HEAD_AT)
        a.hand = <uint64_t *>(base + <size_t>layout.HAND_AT)
        a.clock = <uint64_t *>(base + <size_t>layout.CLOCK_AT)
        a.cache_pages = <uint64_t *>(base + <size_t>layout.CACHE_PAGES_AT)
        a.counted = <uint64_t *>(base + <size_t>layout.COUNTED_AT)
        a.filling = <uint64_t *>(base + <size_t>layout.FILLING_AT)
        a.taking = <uint64_t *>(base + <size_t>layout.TAKING_AT)
        a.wake = <uint32_t *>(base + <size_t>layout.WAKE_AT)
        a.areas = <AreaEntry *>(base + <size_t>geometry.areas_at)
        a.types = <TypeEntry *>(base + <size_t>geometry.types_at)
        a.clients = <ClientRecord *>(base + <size_t>geometry.clients_at)
        a.allocations = <AllocationEntry *>(base + <size_t>geometry.allocations_at)
        a.slots = <Slot *>(base + <size_t>geometry.slots_at)
        a.life = <uint64_t *>(base + <size_t>geometry.life_at)
        a.key = <uint64_t *>(base + <size_t>geometry.key_at)
        a.visited = base + <size_t>geometry.visited_at
        a.data = base + <size_t>geometry.pages_at
        a.page_size = geometry.page_size
        a.pages = geometry.pages
        a.nursery = geometry.nursery_pages
        a.policy = geometry.policy
        a.visits_max = PROVEN if a.policy == S3FIFO else 1
        a.spill_io = geometry.spill_io
        a.slots_count = geometry.slots
        a.allocations_count = geometry.allocations_max
        a.pins_max = geometry.grants_max
        a.sweeper_pins = max(a.pins_max, <int32_t>min(<uint64_t>BATCH_MAX, a.nursery // SWEEPER_SHARE))
        a.run_max = RUN_BUFFERED if a.spill_io == BUFFERED else BATCH_MAX
        a.direct_memory = DIRECT_MEMORY
        if number == BROKER:
            a.lent_map = <uint32_t *>calloc(a.pages // LENT_BLOCK + 1, sizeof(uint32_t))
            a.refused = <uint64_t *>calloc(a.nursery, sizeof(uint64_t))
            a.newer = <uint32_t *>calloc(a.pages, sizeof(uint32_t))
            a.older = <uint32_t *>calloc(a.pages, sizeof(uint32_t))
            a.queue_of = <uint16_t *>calloc(a.pages, sizeof(uint16_t))
            a.queues = <Queue *>calloc(QUEUES, sizeof(Queue))
            a.nursery_of = <uint16_t *>calloc(a.nursery, sizeof(uint16_t))
            if (
                a.lent_map == NULL or a.refused == NULL or a.newer == NULL or a.older == NULL or a.queue_of == NULL or a.queues == NULL
                or a.nursery_of == NULL
            ):
                raise MemoryError
        self.populated = <uint8_t *>calloc(a.pages // LENT_BLOCK + 1, 1)
        if self.populated == NULL:
            raise MemoryError
        crc32c_init(&a.crc, a.page_size, crc_hardware)
        self.become(number)
        a.spill_path = strdup(<bytes?>spill_dir)
        if a.spill_path == NULL:
            raise MemoryError
        a.spill_dir = open_(a.spill_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)
        if a.spill_dir < 0:
            raise SpillError(errno, f"{os.strerror(errno)}: the spill directory {os.fsdecode(spill_dir)} cannot be opened")

    def __dealloc__(self):
        if self.a == NULL:
            return
        for i in range(256):
            if self.a.spill[i].fd >= 0:
                close(self.a.spill[i].fd)
        if self.a.spill_dir >= 0:
            close(self.a.spill_dir)
        if self.memory.buf != NULL:
            PyBuffer_Release(&self.memory)
        free(self.a.spill_path)
        free(self.a.nursery_of)
        free(self.a.queues)
        free(self.a.queue_of)
        free(self.a.older)
        free(self.a.newer)
        free(self.a.refused)
        free(self.a.lent_map)
        free(self.populated)
        free(self.a)

    def become(self, int number):
        """Acts as client `number` from now on. In a forked child: the parent's other threads, with their locks and
        grants, are not here.
        """
        if not 1 <= number <= self.geometry.clients_max:
            raise ValueError(f"client number {number}: expected 1 to {self.geometry.clients_max}")
        self.a.number = number
        self.a.me = &self.a.clients[number]
        self.users = 0
        self.a.pins = 0
        self.a.spill_lock = 0
        memset(self.populated, 0, self.a.pages // LENT_BLOCK + 1)
        for i in range(256):
            self.a.spill[i].users = 0

    def tell_presence(self, int fd):
        """Of the open file that has this client's lock, for as long as the plane is used; -1: none. By it others are asked for
        theirs.
        """
        self.a.presence = fd

    def close(self, double timeout):
        """Refuses new operations, then waits for those under way in other threads; whether all have ended within
        `timeout` seconds.

        Only then may the client say goodbye: the broker takes back what a client was granted as soon as it has.
        """
        cdef uint64_t deadline = now_ns() + nanoseconds(timeout)
        cdef unsigned step = 64
        self.closed = True
        while self.users and now_ns() < deadline:
            with nogil:
                back_off(step)
            step += 1
        return self.users == 0

    @cython.final
    cdef inline int enter(self) except -1:
        """An operation begins that may hold pages or claims; to be ended with `leave`, also under the GIL."""
        if self.closed:
            raise Closed("this client is closed")
        self.users += 1
        return 0

    @cython.final
    cdef inline void leave(self, Tally *tally) noexcept:
        self.users -= 1
        add_tally(self.a, tally)

    @property
    def number(self):
        """This client's number."""
        return self.a.number

    # --- single words of the tables, for Python code that decides

    cdef uint64_t *word_at(self, Py_ssize_t at) except NULL:
        if at & 7 or not 0 <= at <= self.memory.len - 8:
            raise IndexError(f"no word at byte {at} of the arena")
        return <uint64_t *>(self.a.base + at)

    def read(self, Py_ssize_t at):
        """The word at byte `at` of the arena, with acquire order."""
        return load_acquire(self.word_at(at))

    def read_many(self, Py_ssize_t at, Py_ssize_t count, Py_ssize_t step=8):
        """`count` words, as `read`, one every `step` bytes from byte `at` on."""
        cdef Py_ssize_t i
        if count < 1:
            return []
        if step < 8 or step > self.memory.len or count > self.memory.len:
            raise IndexError(f"no {count} words of {step} bytes each in the arena")
        self.word_at(at)
        self.word_at(at + (count - 1) * step)
        return [load_acquire(<uint64_t *>(self.a.base + at + i * step)) for i in range(count)]

    def write(self, Py_ssize_t at, uint64_t value):
        """Writes the word at byte `at`, with release order: what was written before is seen by whoever reads this
        value.
        """
        store_release(self.word_at(at), value)

    def swap_word(self, Py_ssize_t at, uint64_t expected, uint64_t desired):
        """Compare-and-swap of the word at byte `at`; whether it took place."""
        return cas(self.word_at(at), expected, desired)

    def add(self, Py_ssize_t at, uint64_t value):
        """Adds to the word at byte `at`, modulo 2^64; returns what it was."""
        return fetch_add(self.word_at(at), value)

    def checksum(self, page):
        """CRC32C of `page`, exactly one page of bytes."""
        cdef Py_buffer source
        PyObject_GetBuffer(page, &source, PyBUF_SIMPLE)
        try:
            if source.len != self.page_size:
                raise ValueError(f"page of {source.len} bytes: expected exactly {self.page_size}")
            return crc32c_page(&self.a.crc, <uint8_t *>source.buf)
        finally:
            PyBuffer_Release(&source)

    # --- the broker's part

    def set_area(self, int index, uint64_t first, uint64_t pages):
        """Tells where area `index` is; 0 pages: nowhere. Pages that it loses have been taken before."""
        if not 0 <= index < AREAS_MAX:
            raise IndexError(f"no area {index}")
        if pages and (first < self.a.nursery or pages > self.a.pages or first > self.a.pages - pages):
            raise IndexError(f"pages {first} to {first + pages} are not behind the nursery")
        store_release(&self.a.ranges[index], (first << 32) | pages)

    cdef AreaEntry *area(self, int index, uint64_t first, uint64_t pages) except NULL:
        cdef uint64_t begin, count
        if not 0 <= index < AREAS_MAX:
            raise IndexError(f"no area {index}")
        begin, count = self.a.ranges[index] >> 32, self.a.ranges[index] & PAYLOAD
        if first < begin or not 1 <= pages <= count or first - begin > count - pages:
            raise IndexError(f"pages {first} to {first + pages} are not in area {index}")
        if self.a.lent_map == NULL:
            raise ValueError("only the broker's plane takes and gives ranges")
        return &self.a.areas[index]

    def take(self, int area, uint64_t first, uint64_t pages, uint64_t owner=0):
        """Makes the range a buffer, or keeps it from the cache; `owner`: its entry's number, counted from 1. Returns how many of
        its pages held cache. Waits for one page's copy at the most.
        """
        cdef AreaEntry *entry = self.area(area, first, pages)
        cdef uint64_t discards
        with nogil:
            discards = set_range(self.a, entry, first, pages, BUFFER, owner)
        return discards

    def give(self, int area, uint64_t first, uint64_t pages, uint64_t owner=0):
        """Lends the range to the cache, from a buffer or anew; `owner`: of a reservation. Waits as `take`."""
        cdef AreaEntry *entry = self.area(area, first, pages)
        cdef uint64_t discards
        with nogil:
            discards = set_range(self.a, entry, first, pages, FREE, owner)
        return discards

    def entries_used(self, uint64_t count):
        """Of the table of allocations: the sweep looks at so many for reservations."""
        store_relaxed(&self.a.entries_used, min(count, self.a.allocations_count))

    def lent_near(self, uint64_t first, uint64_t pages):
        """About how many pages of the range hold cache: counted exactly for the blocks of LENT_BLOCK pages that it touches."""
        cdef uint64_t block, lent = 0
        if self.a.lent_map == NULL or not pages or first >= self.a.pages or pages > self.a.pages - first:
            raise IndexError(f"pages {first} to {first + pages}: not counted here")
        for block in range(first // LENT_BLOCK, (first + pages - 1) // LENT_BLOCK + 1):
            lent += load32(&self.a.lent_map[block])
        return lent

    # --- reservations

    cdef int entry(self, uint64_t index, uint64_t first, uint64_t pages) except -1:
        if index >= self.a.allocations_count:
            raise IndexError(f"no entry {index}")
        if not pages or first < self.a.nursery or pages > self.a.pages or first > self.a.pages - pages:
            raise IndexError(f"pages {first} to {first + pages} are in no area")
        return 0

    def claim(self, uint64_t index, uint64_t state, uint64_t first, uint64_t pages):
        """Claims the reservation in entry `index` with the state word `state`. Returns the claim word in place, and the memory; None
        in its stead: another has claimed it. 0, None: the reservation is gone. The memory is ours once `claim_settled`.
        """
        cdef uint64_t claim
        cdef bint made = False
        if self.closed:
            raise Closed("this client is closed")
        self.entry(index, first, pages)
        claim = claim_range(self.a, index, state, &made)
        return claim, Span(self, first, pages * self.a.page_size) if made else None

    def claim_settled(self, uint64_t first, uint64_t pages, double timeout):
        """Whether nobody fills a page of the range any more; False after `timeout` seconds."""
        cdef uint64_t deadline = now_ns() + nanoseconds(timeout)
        cdef bint settled
        self.entry(0, first, pages)
        if claim_settled(self.a, first, pages, 0):
            return True
        with nogil:
            settled = claim_settled(self.a, first, pages, deadline)
        return settled

    def seize(self, uint64_t index, uint64_t claim, uint64_t state=0):
        """Takes over exactly the claim word `claim`, whose holder is dead, or nobody: our claim word; 0: it has changed.

        `state`: the entry's, when a client does this. Raises StaleHandle when the entry is another by now.
        """
        cdef uint64_t seized
        self.entry(index, self.a.nursery, 1)
        if not seize_claim(self.a, index, claim, &seized):
            return 0
        # After the CAS: a release that is not over by this look has to take the claim from us first. One that is over may have
        # rented the range to somebody else; then the word is of no entry in use, and is left as it is.
        if state and load_acquire(&self.a.allocations[index].state) != state:
            raise StaleHandle("this reservation was released")
        return seized

    def unclaim(self, uint64_t index, uint64_t claim, uint64_t first, uint64_t pages):
        """Lends our claimed range again; False: it is shared, or not ours any more: the broker has to be told."""
        cdef bint lent
        self.entry(index, first, pages)
        with nogil:
            lent = lend_claimed(self.a, index, claim, first, pages)
        return lent

    def yield_claim(self, uint64_t index, uint64_t claim):
        """Gives up a claim that has not settled, under which nothing was written; False: it is shared, or not ours any more."""
        self.entry(index, self.a.nursery, 1)
        return yield_claim(self.a, index, claim)

    def share_claim(self, uint64_t index, uint64_t claim):
        """Marks exactly the claim word `claim` as several processes'; whether it did."""
        self.entry(index, self.a.nursery, 1)
        return share_claim(self.a, index, claim)

    # --- waiting in line: for the broker's word that something was served

    def wake(self, uint64_t number):
        """Wakes the threads of client `number` that wait in `wait`."""
        cdef uint64_t *word
        if not 1 <= number <= <uint64_t>self.geometry.clients_max:
            raise IndexError(f"no client {number}")
        word = &self.a.clients[number].wake
        fetch_add(word, 1)
        futex_wake_all(<uint32_t *>word)

    def wake_count(self):
        """How often we were woken; to be read before the look that `wait` is to follow."""
        return load_acquire(&self.a.me.wake)

    def wait(self, uint64_t seen, double timeout):
        """Sleeps until we are woken for more than `seen` times, or `timeout` seconds."""
        cdef uint64_t timeout_ns = nanoseconds(timeout)
        with nogil:
            futex_wait(<uint32_t *>&self.a.me.wake, <uint32_t>seen, timeout_ns)

    def sweep(self, double timeout):
        """One round of the reclaim thread: sweeps the nursery as far as it needs, then sleeps `timeout` seconds or
        until woken.

        Returns the nursery's head, to be given to `clean_until` once it is old enough.
        """
        cdef uint64_t timeout_ns = <uint64_t>(timeout * 1e9)
        with nogil:
            sweep_nursery(self.a)
            sweeper_sleep(self.a, timeout_ns)
        return load_relaxed(self.a.head)

    def wake_sweep(self):
        """Ends the sleep of whoever is in `sweep`, at once; one that has not fallen asleep yet may miss it."""
        wake_sweeper(self.a)

    def clean_until(self, uint64_t until):
        """Cleans the dirty pages that were granted before ticket `until`: the writer's part for write-behind types.

        It looks at all of them each time, so whatever was in somebody's hands the last time, or was refused by its file to another
        process, is tried. What was refused to us is left to `retry_refused`.
        """
        cdef uint64_t head = load_relaxed(self.a.head), ticket
        cdef int n
        with nogil:
            ticket = head - self.a.nursery if head > self.a.nursery else 0
            while ticket < until:
                n = <int>min(<uint64_t>BATCH_MAX, until - ticket)
                clean_tickets(self.a, ticket, n, NULL)
                ticket += n

    @property
    def refused(self):
        """About how many pages wait in the nursery because their files refused them to the sweep or to `clean_until`."""
        return load_relaxed(&self.a.refused_count)

    def retry_refused(self):
        """Tries those pages again: all of them as long as the files take them, of each type RETRIES_MAX that are refused once more.

        Returns how many are left, by type, and the errno of the last refusal; 0: there was none yet. To be called by the thread that
        sweeps.
        """
        cdef uint64_t by_type[256]
        cdef int type_
        memset(by_type, 0, sizeof(by_type))
        with nogil:
            retry_refused(self.a)
            count_refused(self.a, by_type)
        return {type_: by_type[type_] for type_ in range(256) if by_type[type_]}, load32(&self.a.refused_errno)

    def punch(self):
        """One turn of the search for places in spill files that no value needs any more, whose disk space is given back. True: it has come
        to the end, and the next turn begins anew. To be called by the thread that sweeps.
        """
        cdef bint ended
        with nogil:
            ended = punch_some(self.a)
        return ended

    def drop_cached(self):
        """Has the page cache let go of what it holds of the living types' files, but for what has not reached the disk yet."""
        with nogil:
            drop_cached(self.a)

    def bury(self, numbers):
        """Takes back the nursery grants and the writer's claims of clients that are dead or have said goodbye: one pass for all."""
        cdef uint64_t dead[CLIENT_WORDS]
        cdef uint64_t number
        memset(dead, 0, sizeof(dead))
        for number in numbers:
            if not 1 <= number <= <uint64_t>self.geometry.clients_max:
                raise IndexError(f"no client {number}")
            dead[number // 64] |= 1ull << (number % 64)
        with nogil:
            bury(self.a, dead)

    # --- after the death of another broker

    def close_words(self, uint64_t first, uint64_t slots):
        """Closes these words of the slot table, which no living type has."""
        self.type_entry(0, first, slots)
        with nogil:
            close_words(self.a, first, slots)

    def put_right(self, int area, uint64_t first, uint64_t pages, bint lent, uint64_t owner=0, bint claimed=False):
        """Makes the range a buffer's, or lent (with what it holds in place), where it is not. `owner`: its entry's number, counted
        from 1. `claimed`: a reservation's, and the claimer's to change, but for the page that a dead broker was copying into.
        """
        cdef AreaEntry *entry = self.area(area, first, pages)
        with nogil:
            put_right(self.a, entry, first, pages, FREE if lent else BUFFER, owner, claimed)

    def count_lent(self, uint64_t index, uint64_t first, uint64_t pages):
        """Counts anew how many pages of a reservation hold cache."""
        self.entry(index, first, pages)
        with nogil:
            count_lent(self.a, index, first, pages)

    cdef TypeEntry *type_entry(self, uint64_t type_, uint64_t base, uint64_t slots) except NULL:
        if type_ >= <uint64_t>layout.TYPES_MAX:
            raise IndexError(f"no type {type_}")
        if slots > self.a.slots_count or base > self.a.slots_count - slots:
            raise IndexError(f"slots {base} to {base + slots} are not in the slot table")
        return &self.a.types[type_]

    def begin_type(self, uint64_t type_, uint64_t base, uint64_t slots, uint64_t flags, uint64_t share=100):
        """A new life of a type on these slots, which no living type has; its file exists. Returns the life. Raises SpillError."""
        cdef TypeEntry *entry = self.type_entry(type_, base, slots)
        cdef int failed = note_file(self.a, type_, entry.life + 1)
        if failed:
            raise SpillError(-failed, f"{os.strerror(-failed)}: the spill file of type {type_} cannot be opened")
        store_relaxed(&entry.flags, flags)
        store_relaxed(&entry.share, share)
        with nogil:
            begin_type(self.a, entry, base, slots)
        return entry.life

    cdef int keep_open(self, uint64_t type_, uint64_t life) except -1:
        """Opens that life's file for the sweep, before it is needed: it may be gone by then."""
        cdef bint private_ = False
        cdef int fd = spill_open(self.a, type_, life, &private_)
        if fd >= 0:
            spill_done(self.a, type_, fd, private_)
        return 0

    def end_type(self, uint64_t type_, uint64_t base, uint64_t slots):
        """Ends a type's life: its handles are refused from now on, its words closed."""
        cdef TypeEntry *entry = self.type_entry(type_, base, slots)
        with nogil:
            end_type(self.a, entry, base, slots)

    def slots(self, uint64_t type_, uint64_t life, timeout):
        """A handle on one life of a type; `timeout` bounds a store's waiting, in seconds."""
        return Slots(self, type_, life, timeout)

    def populate(self, uint64_t first, uint64_t nbytes):
        """Fills this process's page table for the memory of `nbytes` from page `first`, as far as that was not done before: one call
        costs a third of the faults that it saves. A few pages are left to their faults.
        """
        cdef uint64_t block = first // LENT_BLOCK, end, run, page, stop
        cdef int failed = 0
        if not nbytes or first >= self.a.pages or nbytes > (self.a.pages - first) * self.a.page_size:
            raise IndexError(f"{nbytes} bytes from page {first} are not in the arena")
        if nbytes < LENT_BLOCK * self.a.page_size:
            return
        end = (first + (nbytes - 1) // self.a.page_size) // LENT_BLOCK + 1
        with nogil:
            while block < end and not failed:
                if load_byte(&self.populated[block]):
                    block += 1
                    continue
                run = block
                while block < end and not load_byte(&self.populated[block]):
                    store_byte(&self.populated[block], 1)
                    block += 1
                page, stop = run * LENT_BLOCK, min(block * LENT_BLOCK, self.a.pages)
                failed = madvise(page_bytes(self.a, page), (stop - page) * self.a.page_size, MADV_POPULATE_WRITE)
        # Not every kernel has it (Linux 5.14): the pages are faulted in one by one then.

    def place_of(self, uint64_t address, uint64_t nbytes):
        """The offset of that memory of this process from the arena's first page, in bytes; -1: it is not all in the arena's pages."""
        cdef uint64_t at = address - <uint64_t>self.a.data  # of memory below the first page it wraps to far above the last
        cdef uint64_t size = self.a.pages * self.a.page_size
        return at if nbytes <= size and at <= size - nbytes else -1

    def span(self, uint64_t first, uint64_t nbytes):
        """The memory of a buffer that begins at page `first`."""
        if first >= self.a.pages or nbytes > (self.a.pages - first) * self.a.page_size:
            raise IndexError(f"{nbytes} bytes from page {first} are not in the arena")
        return Span(self, first, nbytes)


include "_span.pxi"
include "_handle.pxi"
include "_plain.pxi"
