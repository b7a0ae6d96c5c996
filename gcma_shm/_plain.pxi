# What takes but a look to be seen to be small: numbers, short text, and tuples and lists of numbers, or of tuples and lists of numbers. Each
# task of a pool is looked at, and a chunk of a hundred of them; in Python that took a tenth of what such a chunk takes.

cdef enum:
    PLAIN_ITEMS_MAX = 1000  # of a tuple or list, and of all those in it
    PLAIN_TEXT_MAX = 256


cdef inline bint is_number(object value):
    return value is None or PyLong_CheckExact(value) or PyFloat_CheckExact(value) or value is True or value is False


cdef Py_ssize_t room_after(object items, Py_ssize_t room, bint nested):
    """How many numbers more there may be; negative: too many, or others than numbers. (No code of others runs meanwhile, so that a list
    keeps its length.)
    """
    cdef Py_ssize_t index, count = len(items)
    cdef bint is_tuple = PyTuple_CheckExact(items)
    cdef PyObject *item
    if count > PLAIN_ITEMS_MAX:
        return -1
    for index in range(count):
        item = PyTuple_GET_ITEM(items, index) if is_tuple else PyList_GET_ITEM(items, index)
        if is_number(<object>item):
            room -= 1
        elif nested and (PyTuple_CheckExact(<object>item) or PyList_CheckExact(<object>item)):
            room = room_after(<object>item, room, False)
        else:
            return -1
        if room < 0:
            break
    return room


def not_plain(values):
    """The indices of those that are not plainly small, of any sequence."""
    cdef Py_ssize_t index = 0
    found = []
    for value in values:
        if PyTuple_CheckExact(value) or PyList_CheckExact(value):
            if room_after(value, PLAIN_ITEMS_MAX, True) < 0:
                found.append(index)
        elif not is_number(value):
            if not (PyUnicode_CheckExact(value) or PyBytes_CheckExact(value)) or len(value) > PLAIN_TEXT_MAX:
                found.append(index)
        index += 1
    return found
