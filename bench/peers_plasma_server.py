"""A client of plasma for `peers_plasma.py`; needs nothing but pyarrow 11, in an environment of its own.

Reads lines of JSON from standard input, a list of an operation, page numbers and perhaps a page; answers each with one when it is done: null, or
the pages in hexadecimal where they are asked for.
"""

import json
import sys
from typing import Any

from pyarrow import plasma


class Pages:
    """Objects by the number of the page. An object is never changed: what is stored again is deleted and created."""

    def __init__(self, socket: str, page: bytes) -> None:
        self._client = plasma.connect(socket)
        self._page = page

    def load(self, numbers: list[int]) -> None:
        """One by one."""
        for n in numbers:
            self._client.get_buffers([name(n)])[0].to_pybytes()

    def load_many(self, numbers: list[int]) -> None:
        """All in one request."""
        for buffer in self._client.get_buffers([name(n) for n in numbers]):
            buffer.to_pybytes()

    def store(self, numbers: list[int]) -> None:
        """One by one."""
        for n in numbers:
            self.put([n], self._page)

    def put(self, numbers: list[int], page: bytes) -> None:
        """The same with a page of one's own."""
        for n in numbers:
            self._client.delete([name(n)])
            self._client.create_and_seal(name(n), page)

    def see(self, numbers: list[int]) -> list[str]:
        """What is there, in hexadecimal."""
        return [self._client.get_buffers([name(n)])[0].to_pybytes().hex() for n in numbers]


def name(n: int) -> Any:
    """Of a page's object."""
    return plasma.ObjectID(n.to_bytes(20, "big"))


def main() -> None:
    """Serves until the input ends."""
    pages = Pages(sys.argv[1], bytes.fromhex(sys.stdin.readline()))
    print("null", flush=True)
    for line in sys.stdin:
        operation, numbers, *page = json.loads(line)
        answer = getattr(pages, operation)(numbers, *map(bytes.fromhex, page))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
