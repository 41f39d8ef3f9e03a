"""The output folder: what is written, what a store reads, what a resumed run keeps."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from safetensors import safe_open

from tests.support.folders import (
    IDENTITY,
    LEVELS,
    SHARD_MIB,
    WIDTH,
    assert_holds,
    assert_same,
    encode,
    expected,
    photo,
    photos,
)
from tests.support.threads import Arrivals, in_threads
from vitrt import FeatureStore, ImageFeatures
from vitrt.sources.folder import walk
from vitrt.sources.record import Record
from vitrt.store.check import check_folder
from vitrt.store.feature_shard import encode_shard
from vitrt.store.recovery import FolderMismatchError
from vitrt.store.writer import SHARD_IMAGES, FeatureWriter


def features(tokens: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> ImageFeatures:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(tokens, WIDTH, generator=generator).to(dtype)
    deepstack = torch.randn(LEVELS, tokens, WIDTH, generator=generator).to(dtype)
    return ImageFeatures(embeddings, deepstack, (1, 2, 2 * tokens))


def pooled(feature: ImageFeatures) -> ImageFeatures:
    """As a pooled run hands them to the writer."""
    return ImageFeatures(feature.pooled()[None], None, feature.grid_thw)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_shard_may_be_as_large_as_a_number_can_say(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path, IDENTITY, shard_mib=1e308)  # in bytes past a float's range
    writer.add(Record("a.jpg", "/x/a.jpg"), features())
    writer.close()
    assert list(FeatureStore(tmp_path)) == ["a.jpg"]


def test_files_follow_the_contract(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path, replace(IDENTITY, dtype="bfloat16"), shard_mib=1)
    one = features(3, 1, torch.bfloat16)
    two = ImageFeatures(features(5, 2, torch.bfloat16).embeddings, None, (1, 10, 2))
    writer.add(Record("a.jpg", "/x/a.jpg", 123, 1.5), one)
    writer.add(Record("sub/b.png", "/x/sub/b.png", 7, 2.25), two)
    writer.add_error("c.png", "ImageError", "c.png: broken")
    writer.close()

    with safe_open(tmp_path / "features-00000-00000.safetensors", framework="pt") as shard:
        assert set(shard.keys()) == {
            "a.jpg/embeddings",
            "a.jpg/deepstack",
            "a.jpg/grid_thw",
            "sub/b.png/embeddings",
            "sub/b.png/grid_thw",
        }
        assert torch.equal(shard.get_tensor("a.jpg/embeddings"), one.embeddings)
        assert torch.equal(shard.get_tensor("a.jpg/deepstack"), one.deepstack)
        grid = shard.get_tensor("sub/b.png/grid_thw")
        assert grid.dtype == torch.int64 and grid.tolist() == [1, 10, 2]
        metadata = shard.metadata()
    assert metadata["format"] == "vitrt.features.v1"
    assert metadata["model"] == "some/model"
    assert metadata["model_type"] == "qwen3_vl"
    assert metadata["dtype"] == "bfloat16"
    assert metadata["vitrt_version"]
    data = (tmp_path / "features-00000-00000.safetensors").read_bytes()
    assert lines(tmp_path / "manifest-00000.jsonl") == [
        {
            "id": name,
            "shard": "features-00000-00000.safetensors",
            "grid_thw": grid,
            "tokens": tokens,
            "size": size,
            "mtime": mtime,
            "crc32": f"{crc32(data):08x}",
        }
        for name, grid, tokens, size, mtime in (
            ("a.jpg", [1, 2, 6], 3, 123, 1.5),
            ("sub/b.png", [1, 10, 2], 5, 7, 2.25),
        )
    ]
    assert lines(tmp_path / "errors-00000.jsonl") == [
        {"id": "c.png", "error": "ImageError", "message": "c.png: broken"}
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_store_gives_back_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    written = {f"{index}.png": features(1 + index, index, dtype) for index in range(9)}
    writer = FeatureWriter(
        tmp_path, replace(IDENTITY, dtype=str(dtype)[6:]), rank=3, shard_mib=SHARD_MIB
    )
    for name, feature in written.items():
        writer.add(Record(name, name), feature)
    writer.close()
    assert len(list(tmp_path.glob("features-00003-*.safetensors"))) > 1
    store = FeatureStore(tmp_path)
    assert list(store) == list(written) and len(store) == 9
    assert "3.png" in store and "other" not in store
    with pytest.raises(KeyError):
        store["other"]
    for name, feature in written.items():
        found = store[name]
        assert found.embeddings.dtype == dtype
        assert torch.equal(found.embeddings, feature.embeddings)
        assert torch.equal(found.deepstack, feature.deepstack)
        assert found.grid_thw == feature.grid_thw and found.merge_size == 2
        assert found.spatial().shape == (1, 1, feature.grid_thw[2] // 2, WIDTH)


def test_store_reads_all_ranks_from_several_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them want the first shard while one thread opens it: it is opened once."""
    for rank in range(3):
        writer = FeatureWriter(tmp_path, IDENTITY, rank=rank, shard_mib=SHARD_MIB)
        for index in range(20):
            name = f"{rank}/{index}"
            writer.add(Record(name, name), features(2, 100 * rank + index))
        writer.close()
    store = FeatureStore(tmp_path)
    assert len(store) == 60
    wrong: list[str] = []
    waiting, opened = Arrivals(4), Counter[Path]()
    shard = FeatureStore._shard

    def arrive(self: FeatureStore, name: str) -> Any:
        waiting.arrive()
        return shard(self, name)

    def slow_open(path: Path, framework: str) -> Any:
        assert waiting.all_came.wait(30)
        opened[path] += 1
        return safe_open(path, framework=framework)

    monkeypatch.setattr(FeatureStore, "_shard", arrive)
    monkeypatch.setattr("vitrt.store.feature_shard.safe_open", slow_open)

    def read() -> None:
        for rank in range(3):
            for index in range(20):
                wanted = features(2, 100 * rank + index).embeddings
                if not torch.equal(store[f"{rank}/{index}"].embeddings, wanted):
                    wrong.append(f"{rank}/{index}")

    in_threads(4, read)
    assert wrong == [] and opened and set(opened.values()) == {1}


def test_stores_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path, IDENTITY, shard_mib=1)
    writer.add(Record("a", "a"), features(4))
    writer.close()
    store = FeatureStore(tmp_path)
    assert torch.equal(store["a"].embeddings, features(4).embeddings)
    sent = pickle.loads(pickle.dumps(store))
    assert torch.equal(sent["a"].embeddings, features(4).embeddings)


def test_store_maps_instead_of_reading(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path, IDENTITY, shard_mib=1)
    writer.add(Record("a", "a"), features(4))
    writer.close()
    first = FeatureStore(tmp_path)["a"].embeddings
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(tmp_path) in mapped.read_text()
    assert torch.equal(first, features(4).embeddings)


def test_store_of_another_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest-\*\.jsonl"):
        FeatureStore(tmp_path)
    with pytest.raises(ValueError, match="no-such"):
        FeatureStore(tmp_path / "no-such")


def test_pooled_rows_are_one_table(tmp_path: Path) -> None:
    written = {f"{index}.png": features(1 + index, index) for index in range(7)}
    writer = FeatureWriter(tmp_path, replace(IDENTITY, pool="mean"), shard_mib=1)
    for name, feature in written.items():
        writer.add(Record(name, name), pooled(feature))
    writer.close()
    with safe_open(tmp_path / "features-00000-00000.safetensors", framework="pt") as shard:
        assert set(shard.keys()) == {f"{name}/pooled" for name in written}
        assert torch.equal(shard.get_tensor("2.png/pooled"), written["2.png"].pooled())
    store = FeatureStore(tmp_path)
    ((ids, table),) = store.pooled_tables()
    assert ids == list(written)
    assert torch.equal(table, torch.stack([feature.pooled() for feature in written.values()]))
    assert torch.equal(store["3.png"].pooled(), written["3.png"].pooled())
    assert store["3.png"].grid_thw == written["3.png"].grid_thw
    assert store.entry("3.png").tokens == 4


def test_whole_features_are_no_table(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path, IDENTITY, shard_mib=1)
    writer.add(Record("a", "a"), features())
    writer.close()
    with pytest.raises(ValueError, match="--pool mean"):
        next(FeatureStore(tmp_path).pooled_tables())


def test_shards_hold_a_bounded_number_of_images(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path, replace(IDENTITY, pool="mean"), shard_mib=100)
    feature = pooled(features(1))
    for index in range(SHARD_IMAGES + 1):
        writer.add(Record(str(index), str(index)), feature)
    writer.wait()
    assert writer.images == SHARD_IMAGES
    writer.close()
    assert writer.images == SHARD_IMAGES + 1
    assert [len(ids) for ids, _ in FeatureStore(tmp_path).pooled_tables()] == [SHARD_IMAGES, 1]


def test_names_of_all_kinds(tmp_path: Path) -> None:
    names = ['quo"te.png', "new\nline.png", "ünï/ко́д.png", "back\\slash.png", "a/b/c.png", " .png"]
    folder = tmp_path / "in"
    for index, name in enumerate(names):
        photo(folder / name, index)
    encode(folder, tmp_path / "out")
    assert set(FeatureStore(tmp_path / "out")) == set(names)
    assert_holds(tmp_path / "out", expected(folder))


@pytest.mark.parametrize("pool", ["none", "mean"])
def test_a_second_image_of_an_id_is_an_error(tmp_path: Path, pool: str) -> None:
    writer = FeatureWriter(tmp_path, replace(IDENTITY, pool=pool), shard_mib=1)
    of_run = pooled if pool == "mean" else ImageFeatures.clone
    writer.add(Record("caf?.png", "/one/caf?.png", 1, 1.0), of_run(features(3, 1)))
    writer.add(Record("caf?.png", "/two/caf?.png", 2, 2.0), of_run(features(5, 2)))
    writer.add(Record("b.png", "/one/b.png"), of_run(features(4, 3)))
    writer.close()
    assert writer.images == 2 and check_folder(tmp_path).problems == []
    store = FeatureStore(tmp_path)
    assert torch.equal(store["caf?.png"].pooled(), features(3, 1).pooled())
    (error,) = lines(tmp_path / "errors-00000.jsonl")
    assert error["id"] == "caf?.png" and "/two/caf?.png" in str(error["message"])
    writer.add(Record("b.png", "/one/b.png"), of_run(features(4, 3)))  # in another shard
    writer.close()
    assert list(FeatureStore(tmp_path)) == ["caf?.png", "b.png"]


def test_a_shard_of_two_tensors_with_one_name_is_refused() -> None:
    row = torch.zeros(3)
    with pytest.raises(ValueError, match="'a/pooled'"):
        encode_shard([("a/pooled", row), ("a/pooled", row)], {})


@pytest.mark.parametrize("pool", ["none", "mean"])
def test_an_open_store_survives_a_later_run(tmp_path: Path, pool: str) -> None:
    folder, output = photos(tmp_path / "in", 12), tmp_path / "out"
    identity = replace(IDENTITY, pool=pool)
    encode(folder, output, identity=identity)
    store = FeatureStore(output)
    wanted = {name: feature.pooled() for name, feature in expected(folder).items()}
    photo(folder / "003.png", 77)
    encode(folder, output, identity=identity)  # compacts the shard of 003.png
    changed = expected(folder)["003.png"].pooled()
    assert not torch.equal(changed, wanted["003.png"])
    wanted["003.png"] = changed
    for name, row in wanted.items():
        assert torch.equal(store[name].pooled(), row)
    photo(folder / "004.png", 78)
    encode(folder, output, identity=identity)
    wanted["004.png"] = expected(folder)["004.png"].pooled()
    if pool == "mean":
        found = {
            name: row
            for ids, table in store.pooled_tables()
            for name, row in zip(ids, table, strict=True)
        }
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], row) for name, row in wanted.items())
    for path in output.glob("features-*"):
        path.unlink()
    with pytest.raises(FileNotFoundError):
        FeatureStore(output)["003.png"]


def test_a_store_that_reads_anew_reads_all_anew(tmp_path: Path) -> None:
    """Shards of one name and other bytes: as if another folder had been moved here."""
    folder, output = photos(tmp_path / "in", 9), tmp_path / "out"
    encode(folder, output)
    store = FeatureStore(output)
    assert store["000.png"].embeddings.isfinite().all()  # its shard is open now
    for seed, path in enumerate(sorted(folder.rglob("*.png"))):
        photo(path, 300 + seed, 60, 60)
    encode(folder, tmp_path / "new", rank=1)
    encode(folder, tmp_path / "new-0", records=list(walk(str(folder)))[:3])
    for path in (*output.glob("features-*"), output / "manifest-00000.jsonl"):
        path.unlink()
    for path in (*(tmp_path / "new").glob("*-00001*"), *(tmp_path / "new-0").glob("*-00000*")):
        path.rename(output / path.name)
    last = list(store)[-1]
    assert_same(store[last], expected(folder)[last])  # its shard is gone: the folder is read anew
    assert_same(store["000.png"], expected(folder)["000.png"])


@pytest.mark.parametrize("way", ["overwritten", "all replaced", "dropped", "lost"])
def test_shard_numbers_never_come_again(tmp_path: Path, way: str) -> None:
    folder, output = photos(tmp_path / "in", 4), tmp_path / "out"
    encode(folder, output)
    before = {path.name for path in output.glob("features-*")}
    store = FeatureStore(output)  # none of its shards is open yet
    for seed, path in enumerate(sorted(folder.rglob("*.png"))):
        if way == "dropped":
            path.write_bytes(b"no image any more")
        elif way != "lost":
            photo(path, 300 + seed)
    if way == "lost":
        for name in before:
            (output / name).write_bytes(b"")
    encode(folder, output, overwrite=way == "overwritten")
    if way == "dropped":
        assert len(FeatureStore(output)) == 0
        for seed, path in enumerate(sorted(folder.rglob("*.png"))):
            photo(path, 300 + seed)
        encode(folder, output)
    assert before.isdisjoint(path.name for path in output.glob("features-*"))
    for name, feature in expected(folder).items():
        assert_same(store[name], feature)
    (output / ".shard-numbers.json").write_text("[]")
    encode(folder, output)
    assert_holds(output, expected(folder))


def test_second_run_encodes_nothing(tmp_path: Path) -> None:
    folder = photos(tmp_path / "in", 12)
    encode(folder, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    encode(folder, tmp_path / "out")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert before == after
    assert_holds(tmp_path / "out", expected(folder))


def test_new_and_changed_images_are_encoded(tmp_path: Path) -> None:
    folder, output = photos(tmp_path / "in", 12), tmp_path / "out"
    encode(folder, output)
    photo(folder / "zz.png", 99)
    photo(folder / "003.png", 77)
    photo(folder / "sub/005.png", 78, 64, 64)
    touched = folder / "000.png"
    os.utime(touched, (1, 1))
    encode(folder, output)
    assert_holds(output, expected(folder))
    assert FeatureStore(output).entry("000.png").mtime == 1.0


def test_a_changed_image_that_is_now_broken_loses_its_old_features(tmp_path: Path) -> None:
    folder, output = photos(tmp_path / "in", 5), tmp_path / "out"
    encode(folder, output)
    wanted = expected(folder)
    (folder / "003.png").write_bytes(b"no image")
    encode(folder, output)
    del wanted["003.png"]
    assert_holds(output, wanted)
    assert [line["id"] for line in lines(output / "errors-00000.jsonl")] == ["003.png"]
    photo(folder / "003.png", 3)
    encode(folder, output)
    assert_holds(output, expected(folder))
    assert not (output / "errors-00000.jsonl").exists()


def test_features_of_removed_images_stay(tmp_path: Path) -> None:
    folder, output = photos(tmp_path / "in", 5), tmp_path / "out"
    wanted = expected(folder)
    encode(folder, output)
    (folder / "001.png").unlink()
    encode(folder, output)
    assert_holds(output, wanted)


def test_overwrite_starts_anew_and_leaves_other_files(tmp_path: Path) -> None:
    folder, output = photos(tmp_path / "in", 8), tmp_path / "out"
    encode(folder, output)
    (output / "notes.txt").write_text("mine")
    for path in sorted(folder.rglob("*.png"))[:4]:
        path.unlink()
    encode(folder, output, overwrite=True)
    assert_holds(output, expected(folder))
    assert (output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "qwen2_5_vl"),
        ("dtype", "bfloat16"),
        ("min_pixels", 2048),
        ("max_pixels", 4096),
        ("resize", "torch"),
        ("pool", "mean"),
    ],
)
def test_another_kind_of_run_is_refused(tmp_path: Path, name: str, value: object) -> None:
    folder, output = photos(tmp_path / "in", 4), tmp_path / "out"
    encode(folder, output)
    before = {path: path.read_bytes() for path in output.iterdir()}
    other = replace(IDENTITY, **{name: value})
    pattern = f"{name} is {getattr(IDENTITY, name)} there and {value} now"
    with pytest.raises(FolderMismatchError, match=pattern):
        encode(folder, output, identity=other)
    assert before == {path: path.read_bytes() for path in output.iterdir()}


def test_another_model_is_refused_and_a_moved_one_is_not(tmp_path: Path) -> None:
    folder, output = photos(tmp_path / "in", 4), tmp_path / "out"
    encode(folder, output)
    encode(folder, output, identity=replace(IDENTITY, model="/moved/here"))
    with pytest.raises(FolderMismatchError, match="model is some/model there and other now"):
        encode(folder, output, identity=replace(IDENTITY, model="other", weights="f" * 16))
    changed = "weights of model some/model, or its adapter, changed"
    with pytest.raises(FolderMismatchError, match=changed):
        encode(folder, output, identity=replace(IDENTITY, weights="f" * 16))
