"""A folder encoded by several ranks: shared work, one fate, and a rerun with another world size."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed import HashStore

from tests.support.ranks import run_ranks, start_ranks
from vitrt import FeatureStore, VisionEncoder
from vitrt.job import shared_work
from vitrt.job import watchdog as watchdog_module
from vitrt.job.shared_work import SharedWork
from vitrt.job.watchdog import PeerFailedError, Watchdog
from vitrt.sources.record import Record
from vitrt.store.manifest import iter_manifest, manifests

IMAGES = 70


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(3)
    for index in range(IMAGES):
        height, width = rng.integers(40, 240, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        (folder / f"{index % 3}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index % 3}" / f"{index:03}.png")
    return folder


def encode(ranks: int, model: Path, photos: Path, output: Path, *more: str) -> tuple[int, str]:
    return run_ranks(ranks, *command(model, photos, output), *more)


def command(model: Path, photos: Path, output: Path) -> list[str]:
    choices = ["--device", "cpu", "--shard-mib", "0.1", "--max-batch-tokens", "300"]
    return ["-m", "vitrt", "encode", str(model), str(photos), "--output", str(output), *choices]


def listed(output: Path) -> Counter[str]:
    """How often each image is in a manifest."""
    return Counter(entry.id for path in manifests(output) for entry in iter_manifest(path))


def assert_whole(output: Path, model: Path, photos: Path) -> None:
    """Every image exactly once, with the features of one process."""
    ids = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    assert listed(output) == Counter(ids)
    encoder = VisionEncoder.from_pretrained(model, device="cpu")
    store = FeatureStore(output)
    for image_id in ids[:: len(ids) // 10]:
        (expected,) = encoder.encode([photos / image_id])
        actual = store[image_id].embeddings
        assert float((actual - expected.embeddings).norm() / expected.embeddings.norm()) < 1e-5


def test_killed_rank_ends_the_job_and_another_world_completes_it(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path
):
    """kill -9 of a data-parallel rank; then tensor parallel; then alone."""
    output = tmp_path / "features"
    job = start_ranks(2, *command(tiny_qwen3_vl, photos, output))
    wait_for(lambda: output.exists() and len(listed(output)) >= 5)
    os.kill(rank_process(job.pid, 1), signal.SIGKILL)
    text, _ = job.communicate(timeout=60)
    assert job.returncode != 0, text
    first = listed(output)
    assert 5 <= len(first) < IMAGES and set(first.values()) == {1}

    code, text = encode(2, tiny_qwen3_vl, photos, output, "--tp", "2")
    assert code == 0, text
    assert_whole(output, tiny_qwen3_vl, photos)

    code, text = encode(3, tiny_qwen3_vl, photos, output)
    assert code == 0 and f"{IMAGES} were there already" in text
    assert_whole(output, tiny_qwen3_vl, photos)


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_of_a_group(victim: int, tiny_qwen3_vl: Path, photos: Path, tmp_path: Path):
    """The others are inside a collective, and end as well."""
    output = tmp_path / "features"
    job = start_ranks(2, *command(tiny_qwen3_vl, photos, output), "--tp", "2")
    wait_for(lambda: output.exists() and len(listed(output)) >= 5)
    os.kill(rank_process(job.pid, victim), signal.SIGKILL)
    text, _ = job.communicate(timeout=60)
    assert job.returncode != 0, text
    assert "this should not have happened" not in text
    assert set(listed(output).values()) == {1}


def test_error_of_one_rank_ends_all_and_is_named(tiny_qwen3_vl: Path, photos: Path, tmp_path: Path):
    output = tmp_path / "features"
    names = [str(path) for path in sorted(photos.rglob("*.png"))]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    names[20:20] = [str(broken)]
    (tmp_path / "list.txt").write_text("\n".join(names) + "\n")
    model = tiny_qwen3_vl
    code, text = run_ranks(
        2, *command(model, Path("@" + str(tmp_path / "list.txt")), output), "--on-error", "fail"
    )
    assert code != 0
    lines = [line for line in text.splitlines() if "error: " in line]
    assert "broken.png" in lines[0], text
    assert set(listed(output).values()) <= {1}


def test_ranks_that_cannot_be_arranged(tiny_qwen3_vl: Path, photos: Path, tmp_path: Path):
    code, text = encode(2, tiny_qwen3_vl, photos, tmp_path / "none", "--tp", "3")
    assert code == 1 and "tp = 3 does not divide the 2 rank(s)" in text
    assert not (tmp_path / "none").exists()


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def rank_process(launcher: int, rank: int) -> int:
    """The process id of a rank that the process `launcher` started."""
    for folder in Path("/proc").iterdir():
        try:
            status = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        if int(status[1]) == launcher and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"rank {rank} is not running")


# Shared work, with threads for ranks


def sources(count: int) -> list[Record]:
    return [
        Record(f"{index}.png", f"/x/{index}\udcff.png", index, index / 3) for index in range(count)
    ]


def share_among(
    size: int,
    listing: Callable[[], Iterator[Record]],
    work: Callable[[int, Record], None] = lambda rank, source: None,
    leaving: Callable[[int], bool] = lambda rank: False,
) -> tuple[list[list[Record]], dict[int, BaseException]]:
    """What each of `size` ranks drew, and what ended it."""
    store = HashStore()
    drawn: list[list[Record]] = [[] for _ in range(size)]
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        shared = SharedWork(store, rank, size, check=lambda: None, leaving=lambda: leaving(rank))
        try:
            for source in shared.share(listing() if rank == 0 else iter(())):
                drawn[rank].append(source)
                work(rank, source)
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return drawn, errors


@pytest.mark.parametrize(("size", "count"), [(1, 10), (2, 0), (2, 1), (3, 101), (4, 1500)])
def test_each_source_goes_to_one_rank(size: int, count: int):
    drawn, errors = share_among(size, lambda: iter(sources(count)))
    assert not errors
    together = [source for part in drawn for source in part]
    assert sorted(together, key=lambda s: s.size) == sources(count)
    assert all(part == sorted(part, key=lambda s: s.size) for part in drawn)


def test_small_folder_is_spread():
    drawn, _ = share_among(4, lambda: iter(sources(64)), lambda *_: time.sleep(0.002))
    assert min(map(len, drawn)) >= 8


def test_slow_rank_draws_less():
    drawn, _ = share_among(
        2, lambda: iter(sources(600)), lambda rank, _: time.sleep(0.02 if rank else 0.001)
    )
    assert len(drawn[1]) < len(drawn[0]) / 2 and sum(map(len, drawn)) == 600


def test_listing_error_surfaces_once_the_rest_is_drawn():
    def listing() -> Iterator[Record]:
        yield from sources(9)
        raise OSError("the disk is gone")

    drawn, errors = share_among(2, listing)
    assert isinstance(errors[0], OSError) and set(errors) == {0}
    assert sum(map(len, drawn)) >= 8


def test_interrupted_ranks_stop():
    stopped = threading.Event()

    def work(rank: int, source: Record) -> None:
        if source.size == 40:
            stopped.set()

    drawn, errors = share_among(
        2, lambda: iter(sources(100_000)), work, leaving=lambda rank: stopped.is_set()
    )
    assert not errors and sum(map(len, drawn)) < 1000


def test_gather_waits_and_gives_up_after_an_interrupt(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal now
        waits.append(seconds)
        now += seconds

    clock = SimpleNamespace(monotonic=lambda: now, sleep=sleep)
    monkeypatch.setattr("vitrt.job.shared_work.time", clock)
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


def test_cpu_sums_have_no_symmetric_memory(monkeypatch: pytest.MonkeyPatch):
    from vitrt import ParallelContext

    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="'symmetric' needs GPUs, and device is 'cpu'"):
        ParallelContext.from_env(2, all_reduce="symmetric", device="cpu")
    assert not torch.distributed.is_initialized()
