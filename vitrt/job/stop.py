"""A request to end a run, which a signal handler may make."""

from __future__ import annotations

from collections.abc import Callable


class Stop:
    """Asks a run to end after what is on the device; may be set from a signal handler."""

    def __init__(self) -> None:
        self.requested = False
        self._asked = False
        self._then: list[Callable[[], None]] = []

    @property
    def heard(self) -> bool:
        """Whether a run listens: before one does, a request waits for it."""
        return bool(self._then)

    def request(self) -> None:
        self._asked = True
        for call in self._then:
            call()
        self.requested = True  # last: a loop that ends because of it finds the calls made

    def then(self, call: Callable[[], None]) -> None:
        """Have `call` made on a request; at once if there was one."""
        self._then.append(call)
        if self._asked:
            call()
