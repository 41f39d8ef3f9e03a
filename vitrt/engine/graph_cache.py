"""Which recorded graphs are kept within a limit of memory, and which are recorded again."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from dataclasses import dataclass

from vitrt.engine.buckets import GraphKey
from vitrt.engine.eager_runner import RunnerStats
from vitrt.engine.graph_pool import GraphPool
from vitrt.engine.recording import Pieces
from vitrt.models.packed_plan import PlanLayout

logger = logging.getLogger(__name__)

_SIGHTINGS = 2  # a shape class is recorded when it comes the second time


@dataclass(slots=True)
class Recording:
    """The graphs of one shape class."""

    pieces: Pieces
    layout: PlanLayout
    nbytes: int  # device memory of its own, beside the pool


class GraphCache:
    """Recordings by shape class; over the limit, the least recently used are dropped."""

    def __init__(self, limit_bytes: int, stats: RunnerStats) -> None:
        """`stats` counts what is recorded and dropped here."""
        self.limit_bytes = limit_bytes
        self.pool: GraphPool | None = None  # that all recordings share
        self.refused: set[GraphKey] = set()  # shape classes that could not be recorded
        self.recordings: OrderedDict[GraphKey, Recording] = OrderedDict()  # by last use
        self._stats = stats
        self._sightings: Counter[GraphKey] = Counter()
        self._evicted: Counter[GraphKey] = Counter()  # times, of each class

    def knows(self, key: GraphKey) -> bool:
        """Whether the class was recorded, or cannot be."""
        return key in self.recordings or key in self.refused

    def use(self, key: GraphKey) -> Recording | None:
        """The recording of a class, if there is one."""
        if key in self.recordings:
            self.recordings.move_to_end(key)
        return self.recordings.get(key)

    def reason_to_wait(self, key: GraphKey) -> str | None:
        """Why a class that comes once more is not recorded yet; None: it is to be.

        A working set over the limit would be recorded anew at every miss: a class that was evicted
        must come twice as often each time before it is recorded again.
        """
        self._sightings[key] += 1
        if self._sightings[key] >= _SIGHTINGS << self._evicted[key]:
            return None
        return "evicted before" if self._evicted[key] else "first of its bucket"

    def add(self, key: GraphKey, recording: Recording, pool: GraphPool) -> Recording | None:
        """Keep what was recorded into `pool`; None where it is over the limit by itself."""
        self.pool = pool
        self.recordings[key] = recording
        self._stats.captures += 1
        logger.debug("recorded a graph of %s", key)
        if pool.nbytes + recording.nbytes > self.limit_bytes:
            self.refused.add(key)
            self._drop(key)
        while self._nbytes() > self.limit_bytes:
            self._drop(next(iter(self.recordings)))
        self._stats.graph_bytes = self._nbytes()
        return self.recordings.get(key)

    def _drop(self, key: GraphKey) -> None:
        del self.recordings[key]
        self._sightings[key] = 0
        self._evicted[key] += 1
        self._stats.evictions += 1
        if self._evicted[key] == 2 and key not in self.refused:
            logger.warning(
                "graphs of the shapes that come do not fit %.0f MiB together: those evicted run "
                "eagerly for longer each time; graph_memory_mib sets the limit",
                self.limit_bytes / 2**20,
            )
        if not self.recordings:
            self.pool = None  # no graph holds it any more: the allocator takes it back

    def _nbytes(self) -> int:
        if self.pool is None:
            return 0
        return self.pool.nbytes + sum(held.nbytes for held in self.recordings.values())
