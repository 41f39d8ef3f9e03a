"""Damage inside manifests and shards: what is intact stays, the rest is encoded again."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.folders import (
    FakeEncoder,
    assert_holds,
    assert_same,
    encode,
    expected,
    photo,
    photos,
)
from vitrt import FeatureStore
from vitrt.store import compaction, durable
from vitrt.store.check import check_folder
from vitrt.store.compaction import compact
from vitrt.store.durable import OutputError
from vitrt.store.feature_shard import read_header
from vitrt.store.lock import FolderLock
from vitrt.store.recovery import recover
from vitrt.store.shard_numbers import ShardNumbers
from vitrt.tensor_file import TensorFileError

SHARD = "features-00000-00000.safetensors"
MANIFEST = "manifest-00000.jsonl"
COUNT = 9


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photos(tmp_path / "in", COUNT)


@pytest.fixture
def output(folder: Path, tmp_path: Path) -> Path:
    encode(folder, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("features-*"))) >= 3
    return tmp_path / "out"


def resumed(folder: Path, output: Path) -> int:
    """How many images the next run encodes; all must be there and right then."""
    encoder = FakeEncoder()
    encode(folder, output, encoder=encoder)
    assert_holds(output, expected(folder))
    return sum(encoder.batches)


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a shard's header and leave its tensors."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize("bad", [b"\n", b"\0" * 80 + b"\n", b'{"id": 3}\n'])
@pytest.mark.parametrize("place", [0, 1, 5])
def test_a_bad_line_costs_its_own_image(
    folder: Path, output: Path, bad: bytes, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = output / MANIFEST
    lines = manifest.read_bytes().splitlines(keepends=True)
    lost = json.loads(lines[place])["id"]
    lines[place] = bad
    manifest.write_bytes(b"".join(lines))
    wanted = expected(folder)
    store = FeatureStore(output)
    assert "1 line amid its entries" in caplog.text
    assert set(store) == wanted.keys() - {lost}
    assert any("amid" in problem for problem in check_folder(output).problems)
    recover(output)
    del wanted[lost]
    assert_holds(output, wanted)
    assert resumed(folder, output) == 1


def test_a_blank_line_costs_nothing(folder: Path, output: Path) -> None:
    manifest = output / MANIFEST
    whole = manifest.read_bytes()
    manifest.write_bytes(whole.replace(b"\n", b"\n\n", 3))
    assert resumed(folder, output) == 0
    assert manifest.read_bytes() == whole


def test_a_torn_line_leaves_the_images_before_it(folder: Path, output: Path) -> None:
    manifest = output / MANIFEST
    manifest.write_bytes(manifest.read_bytes()[:-5])
    assert resumed(folder, output) == 1


@pytest.mark.parametrize("doubled", ["line", "lines", "manifest"])
def test_second_listings_are_dropped(folder: Path, output: Path, doubled: str) -> None:
    manifest = output / MANIFEST
    whole = manifest.read_bytes()
    if doubled == "line":
        manifest.write_bytes(whole + whole.splitlines(keepends=True)[0])
    elif doubled == "lines":
        manifest.write_bytes(whole + whole)
    else:
        (output / "manifest-00001.jsonl").write_bytes(whole)
    shards = {path.name for path in output.glob("features-*")}
    assert resumed(folder, output) == 0
    assert manifest.read_bytes() == whole
    assert {path.name for path in output.glob("features-*")} == shards


def test_a_second_listing_in_another_shard_is_dropped(folder: Path, output: Path) -> None:
    wanted = expected(folder)
    encode(folder, output.with_name("other"), rank=1)
    for path in output.with_name("other").glob("*-00001*"):
        path.rename(output / path.name)
    assert list(FeatureStore(output)) == list(wanted)
    assert FeatureStore(output).entry("000.png").shard == SHARD
    assert resumed(folder, output) == 0
    assert not list(output.glob("features-00001-*"))


@pytest.mark.parametrize("kind", ["embeddings", "deepstack", "grid_thw"])
@pytest.mark.parametrize("form", ["000.png/{}x", "001x.png/{}", "000.png-{}"])
def test_a_renamed_tensor_is_repaired(folder: Path, output: Path, kind: str, form: str) -> None:
    def rename(header: dict[str, Any]) -> None:
        header[form.format(kind)] = header.pop(f"000.png/{kind}")

    edit_header(output / SHARD, rename)
    assert check_folder(output).problems
    assert resumed(folder, output) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["000.png/grid_thw"].update(data_offsets=[24, 48]),  # a gap
        lambda header: header.pop("000.png/grid_thw"),
        lambda header: header["000.png/embeddings"].update(shape=[-1, -6]),
        lambda header: header["000.png/embeddings"].update(shape=[True, 6]),
        lambda header: header["000.png/embeddings"].update(data_offsets=["0", "24"]),
        lambda header: header["000.png/embeddings"].update(dtype="F64"),
        lambda header: header["__metadata__"].update(merge_size="0"),
        lambda header: header["__metadata__"].update(merge_size=2),
        lambda header: header["__metadata__"].update(layers="nonf"),
    ],
)
def test_headers_that_cannot_be(
    folder: Path, output: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit_header(output / SHARD, change)
    with pytest.raises(TensorFileError, match=SHARD):
        read_header(output / SHARD)
    held = sum(SHARD in line for line in (output / MANIFEST).read_text().splitlines())
    assert len(check_folder(output).problems) == 1
    assert resumed(folder, output) == held


def test_a_shard_that_cannot_be_read_now_is_not_removed(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def refuse(path: Path, *args: Any, **named: Any) -> Any:
        if path.name == SHARD:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *args, **named)

    before = (output / MANIFEST).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(OutputError, match="Input/output error"):
            recover(output)
    assert (output / SHARD).exists() and (output / MANIFEST).read_bytes() == before


class SmallDisk:
    """Stands in for `os` inside vitrt.store.durable: takes so many bytes, in all files together."""

    def __init__(self, folder: Path, spare: int) -> None:
        self._folder = folder
        self._size = self.used() + spare
        self.copies = 0  # most unlisted shards at a time

    def used(self) -> int:
        return sum(path.stat().st_size for path in self._folder.iterdir())

    def free(self, folder: Path) -> int:
        return self._size - self.used()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def write(self, handle: int, data: memoryview) -> int:
        self.copies = max(self.copies, len(list(self._folder.glob("features-*"))))
        if self.used() + len(data) > self._size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(handle, data)


def replaced(folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that replaced an image of each shard, and was killed before it compacted."""
    for shard in sorted(output.glob("features-*")):
        held = [line for line in (output / MANIFEST).open() if shard.name in line]
        if len(held) > 1:
            photo(folder / json.loads(held[0])["id"], 1000 + len(held))
    with monkeypatch.context() as patch:
        patch.setattr("tests.support.folders.compact", lambda *args: None)
        encode(folder, output)


def test_compaction_needs_room_for_one_shard(
    folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced(folder, output, monkeypatch)
    largest = max(path.stat().st_size for path in output.glob("features-*"))
    disk = SmallDisk(output, largest + (output / MANIFEST).stat().st_size)
    shards = len(list(output.glob("features-*")))
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", disk)
        patch.setattr(compaction, "free_bytes", disk.free)
        compact(output, ())
    assert disk.copies == shards + 1
    assert_holds(output, expected(folder))
    assert resumed(folder, output) == 0


def test_what_is_replaced_entirely_makes_room_first(
    folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shards of which nothing is left need no copy: the disk may be full."""
    for seed, path in enumerate(sorted(folder.rglob("*.png"))[1:]):
        photo(path, 500 + seed)  # the first shard keeps an image
    with monkeypatch.context() as patch:
        patch.setattr("tests.support.folders.compact", lambda *args: None)
        encode(folder, output)
    disk = SmallDisk(output, (output / MANIFEST).stat().st_size)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", disk)
        patch.setattr(compaction, "free_bytes", disk.free)
        compact(output, ())
    assert_holds(output, expected(folder))


def test_replaced_features_are_no_problem_while_a_job_runs(
    folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced(folder, output, monkeypatch)
    problems = check_folder(output).problems
    assert any("older features" in text for text in problems)
    assert any("listed 2 times" in text for text in problems)
    with FolderLock(output, rank=1):
        assert check_folder(output).problems == []


def test_a_disk_too_full_to_compact(
    folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the start of a run that is a warning: readers see no replaced features."""
    replaced(folder, output, monkeypatch)
    wanted = expected(folder)
    disk = SmallDisk(output, (output / MANIFEST).stat().st_size)
    shards = {path.name for path in output.glob("features-*")}
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", disk)
        patch.setattr(compaction, "free_bytes", lambda folder: 1 << 40)
        with pytest.raises(OutputError, match="No space left"):
            compact(output, ())
        assert {path.name for path in output.glob("features-*")} == shards
        recover(output)
    assert "keeps features that nothing names" in caplog.text
    assert {path.name for path in output.iterdir() if "features" in path.name} == shards
    store = FeatureStore(output)
    assert set(store) == wanted.keys() and len(store) == COUNT
    for name, feature in wanted.items():
        assert_same(store[name], feature)
    assert resumed(folder, output) == 0


def test_shard_numbers_are_above_all_that_is_named(output: Path) -> None:
    line = json.loads((output / MANIFEST).read_text().splitlines()[0])
    with (output / MANIFEST).open("a") as file:
        file.write(json.dumps(line | {"replaces": "features-00000-00041.safetensors"}) + "\n")
    numbers = ShardNumbers(output)
    assert [numbers.take(0), numbers.take(0), numbers.take(3)] == [42, 43, 0]
