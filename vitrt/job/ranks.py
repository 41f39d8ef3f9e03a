"""A command line run by several ranks: where this process stands, and that all end together."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from vitrt.cores import shared_by
from vitrt.job.stop import Stop
from vitrt.parallel.context import AllReduce, ParallelContext
from vitrt.parallel.shared_parts import SharedParts
from vitrt.parallel.shared_work import SharedWork
from vitrt.parallel.watchdog import Watchdog

logger = logging.getLogger(__name__)


class Ranks(Protocol):
    """This process's part of a job that several ranks do."""

    rank: int  # of those that write, from 0
    size: int

    @property
    def parts(self) -> SharedParts | None:
        """Parts of what is too long for one rank; None where nothing is divided."""
        ...

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, in their order; returns when all have called this.

        After an interrupt it may be what fewer of them gave.
        """
        ...

    def tell(self, value: Any) -> list[Any]:
        """Let the others know a value, without waiting; what each told last, where it told any."""
        ...

    def share(self, items: Iterable[Any]) -> Iterable[Any]:
        """The part of the items, JSON values, that falls to this rank; each goes to exactly one."""
        ...


class Alone:
    """The only rank."""

    rank = 0
    size = 1
    parts: SharedParts | None = None

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def tell(self, value: Any) -> list[Any]:
        return [value]

    def share(self, items: Iterable[Any]) -> Iterable[Any]:
        return items


@dataclass(frozen=True, slots=True)
class Job:
    """What this process is in a job."""

    parallel: ParallelContext
    shared: SharedWork | None  # None: alone, or a rank that only follows its leader

    @property
    def follows(self) -> bool:
        return self.parallel.tp_rank > 0

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.parallel.tp_rank == self.parallel.dp_rank == 0


@contextmanager
def open_job(tp: int, *, device: str, stop: Stop, all_reduce: AllReduce = "auto") -> Iterator[Job]:
    """The job that torchrun started, or this process alone.

    Leaving it waits for the other ranks; leaving it by an exception ends them.

    Raises ValueError where the ranks cannot be arranged; PeerFailedError where another one failed.
    """
    parallel = ParallelContext.from_env(tp, all_reduce=all_reduce, device=device)
    if parallel.store is None:
        yield Job(parallel, None)
        return
    rank, world = parallel.dp_rank * tp + parallel.tp_rank, parallel.dp_size * tp

    def on_failure() -> None:
        if parallel.tp_rank:
            os._exit(1)  # it has nothing to save, and waits for its leader
        stop.request()

    with Watchdog(parallel.store, rank, world, on_failure=on_failure) as watchdog:
        if parallel.tp_rank:
            yield Job(parallel, None)
        else:
            shared = SharedWork(
                parallel.store,
                parallel.dp_rank,
                parallel.dp_size,
                check=watchdog.check,
                leaving=lambda: stop.requested,
            )
            # Of a group's ranks the first decodes for all.
            with shared_by(max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // tp, 1)):
                yield Job(parallel, shared)
            watchdog.check()
            shared.gather(None)
    parallel.close()
