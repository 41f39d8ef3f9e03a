"""How far a run is, of one rank and of several."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest

from vitrt.job import progress_display
from vitrt.job.progress import Progress, Snapshot
from vitrt.job.progress_display import ProgressDisplay
from vitrt.job.ranks import Alone


def state(**values: Any) -> dict[str, Any]:
    """What a rank says that did nothing, but for `values`."""
    return asdict(Progress().snapshot()) | {"seconds": 10.0} | values


def test_ranks_add_up() -> None:
    first = state(
        listed=50, all_listed=True, resumed=10, images=18, skipped=2, images_per_second=1.8,
        busy_share=0.5, decoded_waiting=3,
    )  # fmt: skip
    other = state(
        listed=40, all_listed=True, images=20, images_per_second=2.0, busy_share=0.9, seconds=7.0
    )
    total = Snapshot.total([first, other], 2)
    assert (total.listed, total.images, total.skipped, total.resumed) == (90, 38, 2, 10)
    assert total.images_per_second == 3.8 and total.busy_share == 0.7
    assert total.seconds == 10 and total.decoded_waiting == 3
    # 40 images took 10 seconds, and 40 are left.
    assert total.all_listed and total.seconds_left == 10.0
    assert "50/90 images, 3.8 images/s" in total.text()


@pytest.mark.parametrize("other", [[], [state(listed=3)]], ids=["silent", "listing"])
def test_how_long_it_takes_is_said_when_all_ranks_have_listed(other: list[dict[str, Any]]) -> None:
    first = state(listed=8, all_listed=True, images=4)
    assert Snapshot.total([first], 1).seconds_left == 10.0
    total = Snapshot.total([first, *other], 2)
    assert total.seconds_left is None and not total.all_listed


def test_nothing_to_do_takes_no_time_and_the_unknown_none() -> None:
    assert Snapshot.total([state(listed=5, resumed=5, all_listed=True)], 1).seconds_left == 0
    assert Snapshot.total([state(listed=5, all_listed=True)], 1).seconds_left is None


class _Pair(Alone):
    """This rank, and one that said its word before."""

    size = 2

    def __init__(self) -> None:
        self.own: list[Mapping[str, Any]] = []

    def tell(self, own: Mapping[str, Any]) -> list[Any]:
        self.own.append(own)
        return [own, state(listed=7, all_listed=True, images=7)]


def worked() -> Progress:
    progress = Progress()
    progress.listing = lambda: (5, True)
    progress.count_batch(5, 20, 0.1)
    return progress


def test_one_rank_shows_what_all_have_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with ProgressDisplay(worked(), "json", _Pair()):
        pass
    event = json.loads(sys.stderr.getvalue().splitlines()[-1])  # type: ignore[attr-defined]
    assert (event["event"], event["images"], event["listed"]) == ("progress", 12, 12)


def test_a_rank_that_did_nothing_shows_what_the_others_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with ProgressDisplay(Progress(), "json", _Pair()):
        pass
    event = json.loads(sys.stderr.getvalue().splitlines()[-1])  # type: ignore[attr-defined]
    assert event["images"] == 7


def test_the_others_tell_and_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress_display, "_TELL_SECONDS", 0.001)
    told = _Pair()
    with ProgressDisplay(worked(), "none", told):
        deadline = time.monotonic() + 30
        while not told.own and time.monotonic() < deadline:
            time.sleep(0.001)
    assert told.own[0]["images"] == 5
    assert not sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_ranks_that_are_not_heard_of_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(_Pair):
        def tell(self, own: Mapping[str, Any]) -> list[Any]:
            raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with ProgressDisplay(worked(), "lines", Broken()):
        pass
    assert "5/5 images" in sys.stderr.getvalue()  # type: ignore[attr-defined]
