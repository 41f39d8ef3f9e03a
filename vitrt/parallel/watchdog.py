"""The ranks of a job live and die together: a failure on one ends all of them within seconds.

Each rank shows that it is alive, and watches the others, through the store that they met at. A rank
that fails says why there; one that was killed falls silent. (torchrun notices a dead process
sooner, and other launchers need not.)
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

logger = logging.getLogger(__name__)

_INTERVAL = 0.5  # seconds between looks
_SILENT = 45.0  # seconds without a sign of life: a compiler may hold the interpreter for long
_GRACE = 15.0  # seconds for what is encoded to reach the disk
_ENDED = "ended"


class PeerFailedError(RuntimeError):
    """Another rank failed; the message names it and says why."""


class Watchdog:
    """A context manager around a rank's work: an exception that leaves it is the rank's failure."""

    def __init__(
        self, store: Store, rank: int, world: int, *, on_failure: Callable[[], None]
    ) -> None:
        """`on_failure` asks this rank's work to end, from another thread.

        If it has not ended after _GRACE seconds, or at once where that raises, the process ends.
        """
        self.failure: str | None = None  # of another rank
        self._store = store
        self._rank = rank
        self._world = world
        self._on_failure = on_failure
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vitrt-watchdog", daemon=True)

    def check(self) -> None:
        """Raise PeerFailedError where another rank has failed."""
        if self.failure is not None:
            raise PeerFailedError(self.failure)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stopped.set()
        self._thread.join()
        try:
            if error is not None and not isinstance(error, PeerFailedError):
                message = f"rank {self._rank} failed: {error or type(error).__name__}"
                self._store.compare_set("failed", "", message)  # the first one is the cause
            self._store.set(f"alive/{self._rank}", _ENDED)
            self._wait_for_readers()
        except RuntimeError:  # the store is gone, and with it the ranks that would have read this
            logger.debug("cannot say how this rank ended", exc_info=True)

    def _wait_for_readers(self) -> None:
        """Where the store lives in this process, until nobody needs it any more."""
        if self._rank > 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and not all(map(self._has_ended, range(self._world))):
            time.sleep(_INTERVAL / 10)

    def _has_ended(self, rank: int) -> bool:
        key = f"alive/{rank}"
        return self._store.check([key]) and self._store.get(key).decode() == _ENDED

    def _run(self) -> None:
        seen: dict[int, tuple[str, float]] = {}
        beat = 0
        while not self._stopped.wait(_INTERVAL):
            beat += 1
            try:
                self._store.set(f"alive/{self._rank}", str(beat))
                failure = self._look(seen)
            except RuntimeError as error:
                failure = (
                    f"the job's store is gone, so its first rank or torchrun has ended: {error}"
                )
            if failure is not None:
                self._end(failure)
                return

    def _look(self, seen: dict[int, tuple[str, float]]) -> str | None:
        """What ended the job, if anything did."""
        if self._store.check(["failed"]):
            return self._store.get("failed").decode()
        now = time.monotonic()
        for rank in range(self._world):
            key = f"alive/{rank}"
            sign = self._store.get(key).decode() if self._store.check([key]) else ""
            if seen.get(rank, ("", 0.0))[0] != sign:
                seen[rank] = sign, now
            silent = now - seen.setdefault(rank, (sign, now))[1]
            if sign != _ENDED and silent > _SILENT:
                return f"rank {rank} has shown no sign of life for {silent:.0f} seconds"
        return None

    def _end(self, failure: str) -> None:
        self.failure = failure
        logger.error("%s; ending", failure)
        try:
            self._on_failure()
            ended = self._stopped.wait(_GRACE)
        except Exception:
            ended = False
        if not ended:
            os._exit(1)  # a rank that waits for a lost peer inside a collective cannot be reached
