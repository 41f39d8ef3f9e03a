"""How ranks share a list of work: who does what, and when to wait for each other.

One rank lists it and publishes it in small blocks in the store that they met at; every rank draws
the next block by a shared counter when it has room for it. No collective is involved, so ranks
differ in speed as they like, and each item goes to exactly one of them. Items are JSON values.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from vitrt.parallel.shared_parts import SharedParts

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_BLOCK_ITEMS = 4  # few, so that ranks end at about the same time
_BLOCKS_AHEAD = 64  # published and not yet drawn, for each rank
_POLL_SECONDS = 0.02
_PATIENCE_SECONDS = 0.02  # how long a rank lets others draw that have drawn less
_LEAVE_SECONDS = 3.0  # how long an interrupted rank waits for the others


class SharedWork:
    """This rank's part of the work. The ranks here are those that take any: one for each tower."""

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        check: Callable[[], None],
        leaving: Callable[[], bool],
    ) -> None:
        """`check` raises where another rank failed; `leaving`: whether this one was interrupted."""
        self.rank = rank
        self.size = size
        self.parts = SharedParts(store, size, leaving=leaving)
        self._store = store
        self._check = check
        self._leaving = leaving
        self._steps = 0  # calls that every rank makes, in one order
        self._left = False  # without the others
        self._listing_error: BaseException | None = None

    # Waiting

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, JSON values in the order of the ranks.

        If this rank was interrupted, only of those that gave something within a few seconds.
        """
        self._steps += 1
        keys = [f"step/{self._steps}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], json.dumps(value))
        since: float | None = None
        while not self._store.check(keys):
            self._check()
            if self._leaving():
                since = since or time.monotonic()
                if self._left or time.monotonic() - since > _LEAVE_SECONDS:
                    self._left = True  # a rank that is not here comes to no later step either
                    break
            time.sleep(_POLL_SECONDS)
        return [json.loads(self._store.get(key)) for key in keys if self._store.check([key])]

    def tell(self, value: Any) -> list[Any]:
        """Give the others a JSON value in place of this rank's last, and wait for nobody.

        Returns what each rank told last, of those that told anything.
        """
        keys = [f"told/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], json.dumps(value))
        return [json.loads(self._store.get(key)) for key in keys if self._store.check([key])]

    # Sharing

    def share(self, items: Iterable[Any]) -> Iterator[Any]:
        """This rank's part of what the first rank's `items` are. To be called once, by all."""
        self.gather(None)  # start together: of a short list the first to come would take it all
        if self.rank == 0:
            threading.Thread(
                target=self._publish, args=(items,), name="vitrt-share", daemon=True
            ).start()
        return self._draw()

    def _publish(self, items: Iterable[Any]) -> None:
        block: list[Any] = []
        published = 0
        try:
            for item in items:
                block.append(item)
                if len(block) == _BLOCK_ITEMS:
                    self._put(published, block)
                    block, published = [], published + 1
                    self._wait_for_room(published)
                if self._leaving():
                    break
            if block:
                self._put(published, block)
                published += 1
        except BaseException as error:
            self._listing_error = error
        self._store.set("published", str(published))

    def _put(self, number: int, block: list[Any]) -> None:
        self._store.set(f"block/{number}", json.dumps(block))

    def _wait_for_room(self, published: int) -> None:
        while published - self._store.add("drawn", 0) > _BLOCKS_AHEAD * self.size:
            if self._leaving():
                return
            time.sleep(_POLL_SECONDS)

    def _draw(self) -> Iterator[Any]:
        mine = 0
        while not self._leaving():
            self._let_others_draw(mine)
            mine += 1
            number = self._store.add("drawn", 1) - 1
            block = self._wait_for_block(number)
            if block is None:
                break
            yield from block
        if self._listing_error is not None:
            raise self._listing_error

    def _let_others_draw(self, mine: int) -> None:
        """Near the end, wait a moment for ranks that have drawn less.

        No rank should sit on the last images while another one has nothing to do.
        """
        if not self._store.check(["published"]):
            return
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while mine * self.size > self._store.add("drawn", 0) and time.monotonic() < deadline:
            time.sleep(_PATIENCE_SECONDS / 5)

    def _wait_for_block(self, number: int) -> list[Any] | None:
        """The block, or None where there are fewer."""
        key = f"block/{number}"
        while not self._leaving():
            # In this order: what was published before the end was announced is there.
            ended = self._store.check(["published"])
            if self._store.check([key]):
                block: list[Any] = json.loads(self._store.get(key))
                self._store.delete_key(key)
                return block
            if ended:
                return None
            self._check()
            time.sleep(_POLL_SECONDS)
        return None
