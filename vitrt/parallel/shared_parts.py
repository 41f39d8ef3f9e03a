"""Items too long for one rank: cut into parts, which ranks with nothing left of their own take.

The rank that drew such an item owns it and takes its parts from the front; other ranks take them
from the back, all by one counter in the store that they met at, so that each goes to one rank. An
owner waits for the parts that others took; who takes parts owns nothing unfinished, and waits for
nobody. Items are JSON values.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_POLL_SECONDS = 0.02
_BACK = 1 << 32  # a taken counter: parts taken from the front, and _BACK for each from the back


@dataclass(frozen=True, slots=True)
class Taken:
    """A part of another rank's item, to be done or left by this one."""

    offer: int
    part: int
    item: Any = field(compare=False)


class SharedParts:
    """The items that ranks offer each other. The ranks are those of a SharedWork."""

    def __init__(self, store: Store, size: int, *, leaving: Callable[[], bool]) -> None:
        """`leaving`: whether this rank was interrupted, or is to end because another one failed."""
        self.size = size
        self._store = store
        self._leaving = leaving
        self._own: set[int] = set()  # offers
        self._exhausted: set[int] = set()

    def offer(self, item: Any, parts: int) -> Offer:
        """Let others take of `parts` parts. By any thread."""
        number = self._store.add("offers", 1) - 1
        self._own.add(number)
        self._store.set(f"offer/{number}", json.dumps({"item": item, "parts": parts}))
        return Offer(self._store, number, parts, self._leaving)

    def take_others(
        self, is_free: Callable[[], bool], has_room: Callable[[], bool]
    ) -> Iterator[Taken]:
        """Parts of others' items, until no rank has unfinished ones. To be called once, by all.

        `is_free`: whether this rank has finished all of its own, `has_room`: whether it can take
        one more. A rank that leaves counts as one with nothing unfinished.
        """
        rests = False
        while not self._leaving():
            if not rests and is_free():
                self._store.add("resting", 1)
                rests = True
            everybody_rests = rests and self._store.add("resting", 0) >= self.size
            taken = self._take() if rests and has_room() else None
            if taken is not None:
                yield taken
            elif everybody_rests:
                return
            else:
                time.sleep(_POLL_SECONDS)
        if not rests:
            self._store.add("resting", 1)  # or the others would wait for it

    def _take(self) -> Taken | None:
        """A part of the item that was offered last, since its owner comes to that last."""
        for number in reversed(range(self._store.add("offers", 0))):
            key = f"offer/{number}"
            if number in self._own or number in self._exhausted or not self._store.check([key]):
                continue
            text = self._store.get(key)
            if text == b"":  # closed
                self._exhausted.add(number)
                continue
            offer = json.loads(text)
            part = _take_back(self._store, number, offer["parts"])
            if part is not None:
                return Taken(number, part, offer["item"])
            self._exhausted.add(number)
        return None

    def is_wanted(self, taken: Taken) -> bool:
        """Whether its owner still waits for it."""
        return self._store.get(f"offer/{taken.offer}") != b""

    def finish(self, taken: Taken, *, done: bool) -> None:
        """Tell the owner that a part is done, or left to it."""
        self._store.set(_outcome(taken.offer, taken.part), "done" if done else "left")


class Offer:
    """An item of this rank's. Its parts are asked for in their order."""

    def __init__(self, store: Store, number: int, parts: int, leaving: Callable[[], bool]) -> None:
        self.number = number
        self.parts = parts
        self._store = store
        self._leaving = leaving
        self._mine = 0  # the first ones
        self._all_taken = False

    def is_mine(self, part: int) -> bool:
        """Take it, unless another rank has. The same answer at each time."""
        assert part <= self._mine or self._all_taken, "parts are taken in their order"
        if part == self._mine and not self._all_taken:
            taken = self._store.add(f"taken/{self.number}", 1)
            if taken % _BACK + taken // _BACK <= self.parts:
                self._mine += 1
            else:
                self._all_taken = True
        return part < self._mine

    def close(self) -> None:
        """No rank takes any more of it."""
        self._all_taken = True
        self._store.add(f"taken/{self.number}", self.parts)
        self._store.set(f"offer/{self.number}", "")

    def is_done(self, part: int) -> bool:
        """Wait for another rank's part: False where it was left to this one, or this one leaves."""
        key = _outcome(self.number, part)
        while not self._store.check([key]):
            if self._leaving():
                return False
            time.sleep(_POLL_SECONDS)
        return self._store.get(key) == b"done"


def _take_back(store: Store, number: int, parts: int) -> int | None:
    taken = store.add(f"taken/{number}", _BACK)
    front, back = taken % _BACK, taken // _BACK
    return parts - back if front + back <= parts else None


def _outcome(offer: int, part: int) -> str:
    return f"part/{offer}/{part}"
