# The memory of a buffer in Python's hands, and a lock that finalizers may try.


@cython.final
cdef class Trying:
    """`with Trying(lock) as got`: takes a lock if it is free, and no signal comes between taking it and the block that gives it back."""

    cdef object lock
    cdef bint got

    def __cinit__(self, lock):
        self.lock = lock

    def __enter__(self):
        self.got = self.lock.acquire(False)
        return self.got

    def __exit__(self, kind, error, traceback):
        if self.got:
            self.got = False
            self.lock.release()


@cython.final
cdef class Span:
    """A contiguous buffer's memory, exported by the buffer protocol; knows how many views of it are alive."""

    cdef Plane plane
    cdef uint8_t *start
    cdef readonly uint64_t first
    cdef readonly bint sealed
    cdef readonly Py_ssize_t nbytes
    cdef readonly Py_ssize_t exports
    cdef public object held     # its buffer's Reference, for handles
    cdef object __weakref__

    def __cinit__(self, Plane plane, uint64_t first, uint64_t nbytes):
        self.plane = plane
        self.start = page_bytes(plane.a, first)
        self.first = first
        self.nbytes = nbytes

    def __getbuffer__(self, Py_buffer *view, int flags):
        if self.sealed:
            raise StaleHandle("this buffer was freed")
        self.exports += 1  # first: the next line gives the interpreter up to other threads
        try:
            self.plane.populate(self.first, self.nbytes)
            PyBuffer_FillInfo(view, self, self.start, self.nbytes, 0, flags)
        except BaseException:
            self.exports -= 1
            raise

    def __releasebuffer__(self, Py_buffer *view):
        self.exports -= 1

    def seal(self):
        """No view can be made any more; False, and nothing has changed: there is one. Of two threads, one that frees and one that makes
        a view, only one succeeds.
        """
        if self.exports:
            return False
        self.sealed = True
        return True

    def unseal(self):
        """Views can be made again."""
        self.sealed = False

    def zero(self):
        """Clears the memory. Counts as a view meanwhile: what another thread frees or closes is not cleared when somebody else has it."""
        if self.sealed:
            raise StaleHandle("this buffer was freed")
        self.exports += 1
        try:
            self.plane.populate(self.first, self.nbytes)
            with nogil:
                memset(self.start, 0, self.nbytes)
        finally:
            self.exports -= 1


cdef class Exporter:
    """What exports the memory of the Span that its `_living` gives. A base for classes written in Python, which can export nothing
    themselves before Python 3.12.
    """

    def __getbuffer__(self, Py_buffer *view, int flags):
        # Of a memoryview of its own: who keeps view.obj, and gives the view itself back at once (torch.frombuffer), keeps the
        # memory, and is counted by the span.
        PyObject_GetBuffer(memoryview(self._living()), view, flags)

    def __releasebuffer__(self, Py_buffer *view):
        # Never called, as view.obj is the memoryview. That it is there tells NumPy to keep a view, not just a reference to us.
        pass
