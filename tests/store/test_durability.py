"""Kills, power cuts and full disks: the folder stays readable and the next run completes it."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.support.folders import (
    IDENTITY,
    assert_holds,
    assert_same,
    encode,
    expected,
    file_size_limit,
    photo,
    photos,
)
from vitrt import FeatureStore
from vitrt.store import durable, lock
from vitrt.store.check import check_folder
from vitrt.store.durable import OutputError, make_folder
from vitrt.store.lock import FolderBusyError, FolderLock, running_job
from vitrt.store.manifest import Damage, iter_manifest

ROOT = Path(__file__).resolve().parents[2]
CALLS = ("open", "write", "fsync", "replace", "unlink", "ftruncate", "mkdir")


class Disk:
    """Stands in for `os` inside vitrt.store.durable: counts its calls and makes some fail."""

    def __init__(self, failing: Callable[[int, str], int | None] = lambda n, name: None) -> None:
        """`failing(number, name)` is the errno of that call, or None."""
        self.calls: list[tuple[str, str]] = []
        self._failing = failing
        self._paths: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return real if name not in CALLS else lambda *args: self._call(name, real, args)

    def _call(self, name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        path = self._paths.get(args[0], "?") if isinstance(args[0], int) else str(args[-1])
        path = str(args[0]) if name == "open" else path
        number = self._failing(len(self.calls), name)
        self.calls.append((name, Path(path).name))
        if number is not None:
            if name == "write" and len(args[1]) > 1:
                real(args[0], args[1][: len(args[1]) // 2])  # a disk takes what still fits
            raise OSError(number, os.strerror(number))
        result = real(*args)
        if name == "open":
            self._paths[result] = path
        return result


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where that is possible: what is tested here are thousands of flushes."""
    shared = Path("/dev/shm")
    with TemporaryDirectory(dir=shared if shared.is_dir() else None) as path:
        yield Path(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("photos") / "in", 7)


def count_calls(folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    disk = Disk()
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", disk)
        encode(folder, output)
    return len(disk.calls)


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_every_call_that_can_fail(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, sticky: bool
) -> None:
    wanted = expected(folder)
    total = count_calls(folder, tmp_path / "count", monkeypatch)
    failed = 0
    for call in range(total):
        output = tmp_path / str(call)

        def failing(n: int, name: str, call: int = call) -> int | None:
            return number if n == call or (sticky and n > call) else None

        with monkeypatch.context() as patch:
            patch.setattr(durable, "os", Disk(failing))
            try:
                encode(folder, output)
            except OutputError as error:
                failed += 1
                assert os.strerror(number) in str(error) and str(tmp_path) in str(error)
                assert error.errno == number
        if list(output.glob("manifest-*")):
            store = FeatureStore(output)
            for name in store:
                assert_same(store[name], wanted[name])
            if not sticky:
                # Whatever could be undone was: nothing that a check would name is left.
                assert check_folder(output).problems == []
        encode(folder, output)
        assert_holds(output, wanted)
    assert failed >= total - 2  # a call whose failure is harmless, at most


def test_failures_while_resuming(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recovery and compaction are interrupted at every call as well."""
    inputs = photos(tmp_path / "in", 6)

    def half_done(output: Path) -> None:
        encode(inputs, output)
        with (output / "manifest-00000.jsonl").open("ab") as file:
            file.write(b'{"id": "torn')
        (output / "features-00000-00077.safetensors").write_bytes(b"unlisted")
        (output / ".features-00000-00078.tmp").write_bytes(b"unfinished")

    def change(seed: int) -> None:
        photo(inputs / "001.png", seed)
        photo(inputs / "sub/002.png", seed + 1)

    half_done(tmp_path / "count")
    change(1000)
    total = count_calls(inputs, tmp_path / "count", monkeypatch)
    for call in range(total):
        output = tmp_path / str(call)
        half_done(output)
        change(2000 + call)
        with monkeypatch.context() as patch:
            disk = Disk(lambda n, name, call=call: errno.EIO if n >= call else None)
            patch.setattr(durable, "os", disk)
            with pytest.raises(OutputError):
                encode(inputs, output)
                raise OutputError("reach", output, OSError("nothing was left to fail"))
        store = FeatureStore(output)
        assert len(store) == len(set(store)) == 6
        for name in store:
            assert store[name].embeddings.isfinite().all()
        encode(inputs, output)
        assert_holds(output, expected(inputs))


def test_order_of_flushes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard's bytes, its name and then its manifest lines are flushed, in this order."""
    disk = Disk()
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", disk)
        encode(folder, tmp_path / "out")
    shards = [name for call, name in disk.calls if call == "replace" and "features" in name]
    assert len(shards) > 2
    calls = [call for call in disk.calls if call[0] in ("write", "fsync", "replace")]
    for shard in shards:
        temporary = f".{shard.removesuffix('.safetensors')}.tmp"
        renamed = calls.index(("replace", shard))
        last_write = max(i for i, call in enumerate(calls) if call == ("write", temporary))
        listed = next(
            i
            for i, call in enumerate(calls)
            if i > renamed and call == ("write", "manifest-00000.jsonl")
        )
        assert last_write < calls.index(("fsync", temporary)) < renamed
        assert ("fsync", "out") in calls[renamed:listed]
        assert calls[listed + 1] == ("fsync", "manifest-00000.jsonl")
    made = disk.calls.index(("mkdir", "out"))
    assert ("fsync", tmp_path.name) in disk.calls[made : made + 3]


@pytest.mark.parametrize("tail", [b'{"id": "torn', b"\0" * 300, b'{"id": 3}\n', b"\n\n", b"[]\n"])
def test_torn_manifest_is_repaired(folder: Path, tmp_path: Path, tail: bytes) -> None:
    output = tmp_path / "out"
    encode(folder, output)
    manifest = output / "manifest-00000.jsonl"
    whole = manifest.read_bytes()
    manifest.write_bytes(whole + tail)
    damage = Damage()
    assert len(list(iter_manifest(manifest, damage))) == 7 and damage.whole == len(whole)
    assert set(FeatureStore(output)) == set(expected(folder))
    assert any("torn" in problem for problem in check_folder(output).problems)
    encode(folder, output)
    assert manifest.read_bytes() == whole
    assert_holds(output, expected(folder))


def test_every_length_of_a_manifest(folder: Path, tmp_path: Path) -> None:
    """A crash can leave any part of the lines of a shard."""
    output = tmp_path / "out"
    encode(folder, output)
    manifest = output / "manifest-00000.jsonl"
    whole = manifest.read_bytes()
    for length in range(0, len(whole), 97):
        manifest.write_bytes(whole[:length])
        encode(folder, output)
        assert_holds(output, expected(folder))
        manifest.write_bytes(manifest.read_bytes())


@pytest.mark.parametrize("length", [0, 5, 300, -1])
def test_truncated_or_missing_shards_are_encoded_again(
    folder: Path, tmp_path: Path, length: int
) -> None:
    output = tmp_path / "out"
    encode(folder, output)
    shards = sorted(output.glob("features-*"))
    shards[1].write_bytes(shards[1].read_bytes()[:length])
    shards[2].unlink()
    assert len(check_folder(output).problems) == 2
    encode(folder, output)
    assert_holds(output, expected(folder))


def test_file_size_limit(folder: Path, tmp_path: Path) -> None:
    """A real refusal by the system, from within: the shard does not fit, the message says so."""
    with (
        file_size_limit(700),
        pytest.raises(OutputError, match="cannot write .*File too large"),
    ):
        encode(folder, tmp_path / "out", shard_mib=1)
    assert check_folder(tmp_path / "out").problems == []
    encode(folder, tmp_path / "out")
    assert_holds(tmp_path / "out", expected(folder))


def test_death_at_every_call(tmp_path: Path) -> None:
    """kill -9 right before, right after and in the middle of each file operation of a run."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.death", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    survived = re.findall(r"death (\w+) (\d+) calls survived", done.stdout)
    assert [mode for mode, calls in survived if int(calls) > 9] == ["before", "after", "half"]


def test_random_kills(tmp_path: Path, tiny_qwen3_vl: Path) -> None:
    sources = ("folder", "tar", "parquet", "memory")
    command = [sys.executable, str(ROOT / "scripts/stress/kill.py"), "--kills", "6"]
    command += ["--images", "60", "--folder", str(tmp_path), "--checkpoint", str(tiny_qwen3_vl)]
    command += ["--sources", *sources]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for source in sources:
        assert f"{source}: 6 kills" in done.stdout


def test_two_jobs_do_not_share_a_folder(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with (
        FolderLock(output),
        pytest.raises(FolderBusyError, match=f"process {os.getpid()} on .* since 20.*out"),
    ):
        encode(folder, output)
    encode(folder, output)
    with FolderLock(output, rank=2), pytest.raises(FolderBusyError, match="another job"):
        FolderLock(output)
    with FolderLock(output), FolderLock(output, rank=1):
        pass  # ranks of one job


def test_stale_locks_are_recognised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code = (
        "import os; from pathlib import Path; from vitrt.store.lock import FolderLock\n"
        f"FolderLock(Path({str(tmp_path)!r})); print(os.getpid(), flush=True); os._exit(9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    caplog.set_level("INFO")
    with FolderLock(tmp_path):
        pass
    assert f"process {done.stdout.strip()} on" in caplog.text and "stale" in caplog.text
    caplog.clear()
    with FolderLock(tmp_path):
        pass
    assert caplog.text == ""


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot create folder .*file/out"):
        encode(tmp_path, tmp_path / "file/out")

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(lock.FileLock, "acquire", lambda self, timeout: refuse(self.lock_file))
    with pytest.raises(OutputError, match="cannot lock .*Permission denied"):
        encode(tmp_path, tmp_path / "out")


def test_resume_with_another_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    from vitrt.sources.folder import walk

    output = tmp_path / "out"
    sources = list(walk(str(folder)))
    for rank in range(3):
        encode(folder, output, rank=rank, records=sources[rank:8:3])
    assert len(list(output.glob("manifest-*"))) == 3
    encode(folder, output)
    assert_holds(output, expected(folder))
    metadata = FeatureStore(output).metadata_of("features-00002-00000.safetensors")
    assert metadata["model"] == IDENTITY.model


def test_looking_for_a_job_keeps_none_from_starting(tmp_path: Path) -> None:
    """A check holds each lock for a moment."""
    with FolderLock(tmp_path):
        pass
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            running_job(tmp_path)
            time.sleep(0.001)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(50):
            FolderLock(tmp_path).release()
    finally:
        ended.set()
        thread.join()


def test_an_output_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(OutputError, match=r"cannot create folder .*file: a file of that name exis"):
        make_folder(tmp_path / "file")
