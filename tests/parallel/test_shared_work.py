"""Ranks that share work through a store, and watch each other there: threads stand for ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import HashStore

from tests.support.ranks import wait_for
from vitrt.parallel import shared_work
from vitrt.parallel import watchdog as watchdog_module
from vitrt.parallel.shared_parts import SharedParts
from vitrt.parallel.shared_work import SharedWork
from vitrt.parallel.watchdog import PeerFailedError, Watchdog

Item = dict[str, Any]


class Racing(HashStore):
    """A store at which all ranks draw their first block at the same moment."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._together = threading.Barrier(size, timeout=30)
        self._drew: set[int] = set()

    def add(self, key: str, value: int) -> int:
        thread = threading.get_ident()
        if (key, value) == ("drawn", 1) and thread not in self._drew:
            self._drew.add(thread)
            self._together.wait()
        return super().add(key, value)


def items(count: int) -> list[Item]:
    return [
        {"path": f"/x/{index}\udcff.png", "size": index, "mtime": index / 3}
        for index in range(count)
    ]


def as_ranks(run: Callable[[int], None], size: int) -> None:
    """`run` by a thread for each rank, at once."""
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def share_among(
    size: int,
    listing: Callable[[], Iterator[Item]],
    work: Callable[[int, Item], None] = lambda rank, item: None,
    leaving: Callable[[int], bool] = lambda rank: False,
) -> tuple[list[list[Item]], dict[int, BaseException]]:
    """What each of `size` ranks drew, and what ended it."""
    store = Racing(size)
    drawn: list[list[Item]] = [[] for _ in range(size)]
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        shared = SharedWork(store, rank, size, check=lambda: None, leaving=lambda: leaving(rank))
        try:
            for item in shared.share(listing() if rank == 0 else iter(())):
                drawn[rank].append(item)
                work(rank, item)
        except Exception as error:
            errors[rank] = error

    as_ranks(run, size)
    return drawn, errors


@pytest.mark.parametrize(("size", "count"), [(1, 10), (2, 0), (2, 1), (3, 101), (4, 1500)])
def test_each_item_goes_to_one_rank(size: int, count: int):
    drawn, errors = share_among(size, lambda: iter(items(count)))
    assert not errors
    together = [item for part in drawn for item in part]
    assert sorted(together, key=lambda s: s["size"]) == items(count)
    assert all(part == sorted(part, key=lambda s: s["size"]) for part in drawn)
    assert all(drawn) or count < 4 * size  # a block each, drawn at one moment


def test_small_folder_is_spread():
    drawn, _ = share_among(4, lambda: iter(items(64)), lambda *_: time.sleep(0.002))
    assert min(map(len, drawn)) >= 8


def test_slow_rank_draws_less():
    drawn, _ = share_among(
        2, lambda: iter(items(600)), lambda rank, _: time.sleep(0.02 if rank else 0.001)
    )
    assert len(drawn[1]) < len(drawn[0]) / 2 and sum(map(len, drawn)) == 600


def test_listing_error_surfaces_once_the_rest_is_drawn():
    def listing() -> Iterator[Item]:
        yield from items(9)
        raise OSError("the disk is gone")

    drawn, errors = share_among(2, listing)
    assert isinstance(errors[0], OSError) and set(errors) == {0}
    assert sum(map(len, drawn)) >= 8


def test_interrupted_ranks_stop():
    stopped = threading.Event()

    def work(rank: int, item: Item) -> None:
        if item["size"] == 40:
            stopped.set()

    drawn, errors = share_among(
        2, lambda: iter(items(100_000)), work, leaving=lambda rank: stopped.is_set()
    )
    assert not errors and sum(map(len, drawn)) < 1000


def test_what_ranks_tell_is_their_last_word_and_nobody_waits() -> None:
    store = HashStore()
    ranks = [
        SharedWork(store, rank, 3, check=lambda: None, leaving=lambda: False) for rank in range(3)
    ]
    assert ranks[1].tell({"done": 1}) == [{"done": 1}]
    assert ranks[0].tell("a") == ["a", {"done": 1}]
    assert ranks[1].tell({"done": 2}) == ["a", {"done": 2}]


def test_gather_waits_and_gives_up_after_an_interrupt(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal now
        waits.append(seconds)
        now += seconds

    clock = SimpleNamespace(monotonic=lambda: now, sleep=sleep)
    monkeypatch.setattr("vitrt.parallel.shared_work.time", clock)
    store = HashStore()
    ranks = [
        SharedWork(store, rank, 2, check=lambda: None, leaving=lambda: True) for rank in range(2)
    ]
    assert ranks[0].gather({"a": 1}) == [{"a": 1}]
    assert sum(waits) >= shared_work._LEAVE_SECONDS
    waits.clear()
    assert ranks[0].gather("again") == ["again"]  # at once: the other one is not coming
    assert waits == []
    assert ranks[1].gather(2) == [{"a": 1}, 2]


# Parts of what is long


@pytest.mark.parametrize("size", [2, 4])
def test_each_part_goes_to_one_rank(size: int) -> None:
    """All ranks but the last own items, and take others' once they have none."""
    store = HashStore()
    done: dict[tuple[int, int], list[int]] = {}
    lock = threading.Lock()

    def work(rank: int, offer: int, part: int) -> None:
        time.sleep(0.001 * (rank + 1))
        with lock:
            done.setdefault((offer, part), []).append(rank)

    def run(rank: int) -> None:
        parts = SharedParts(store, size, leaving=lambda: False)
        offers = [parts.offer({"of": rank}, 9) for _ in range(3 if rank < size - 1 else 0)]
        for offer in offers:
            mine = [part for part in range(9) if offer.is_mine(part)]
            assert mine == list(range(len(mine))) == [p for p in range(9) if offer.is_mine(p)]
            for part in mine:
                work(rank, offer.number, part)
            for part in range(len(mine), 9):
                if not offer.is_done(part):
                    work(rank, offer.number, part)
            offer.close()
        for number, taken in enumerate(parts.take_others(lambda: True, lambda: True)):
            assert taken.item["of"] != rank
            if number % 3:  # some are left
                work(rank, taken.offer, taken.part)
            parts.finish(taken, done=bool(number % 3))

    as_ranks(run, size)
    assert len(done) == 27 * (size - 1) and all(len(ranks) == 1 for ranks in done.values())


def test_whoever_leaves_waits_for_no_part() -> None:
    store, leaving = HashStore(), threading.Event()
    owner, other = (SharedParts(store, 2, leaving=leaving.is_set) for _ in range(2))
    offer = owner.offer("clip", 2)
    taken = next(other.take_others(lambda: True, lambda: True))
    assert (taken.part, taken.item) == (1, "clip")
    assert offer.is_mine(0) and not offer.is_mine(1)
    threading.Timer(0.05, leaving.set).start()
    assert not offer.is_done(1)
    other.finish(taken, done=True)
    assert offer.is_done(1)


# Watching


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Faster watchdogs whose last resort is only noted."""
    exits: list[int] = []
    monkeypatch.setattr(watchdog_module, "_INTERVAL", 0.02)
    monkeypatch.setattr(watchdog_module, "_GRACE", 0.2)
    monkeypatch.setattr(watchdog_module, "_SILENT", 0.5)
    monkeypatch.setattr(watchdog_module.os, "_exit", exits.append)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return exits


def test_failure_reaches_the_others_with_its_message(quick: list[int]):
    store, asked = HashStore(), threading.Event()
    with (
        pytest.raises(PeerFailedError, match="rank 1 failed: no more ink"),
        Watchdog(store, 0, 2, on_failure=asked.set) as ours,
    ):
        with pytest.raises(ValueError, match="ink"), Watchdog(store, 1, 2, on_failure=print):
            raise ValueError("no more ink")
        assert asked.wait(5)
        ours.check()
    assert not quick
    # The first failure stands: what followed from it does not replace it.
    assert store.get("failed") == b"rank 1 failed: no more ink"


def test_rank_that_does_not_end_is_ended(quick: list[int]):
    store = HashStore()
    store.set("failed", "rank 1 failed: it says")
    with Watchdog(store, 0, 2, on_failure=lambda: None):
        wait_for(lambda: quick == [1], 5)


def test_silent_rank_is_noticed(quick: list[int]):
    store, asked = HashStore(), threading.Event()
    store.set("alive/1", "7")
    with Watchdog(store, 0, 2, on_failure=asked.set) as watchdog:
        assert asked.wait(5)
        assert "rank 1 has shown no sign of life" in (watchdog.failure or "")


def test_ranks_that_ended_are_not_missed(quick: list[int]):
    store, asked = HashStore(), threading.Event()
    with Watchdog(store, 1, 2, on_failure=print):
        pass
    with Watchdog(store, 0, 2, on_failure=asked.set) as watchdog:
        assert not asked.wait(1)
        watchdog.check()


def test_a_rank_that_left_is_not_waited_for() -> None:
    store = HashStore()
    gone, other = (SharedParts(store, 2, leaving=lambda leaves=leaves: leaves) for leaves in (1, 0))
    assert not list(gone.take_others(lambda: False, lambda: True))
    thread = threading.Thread(
        target=lambda: list(other.take_others(lambda: True, lambda: True)), daemon=True
    )
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
