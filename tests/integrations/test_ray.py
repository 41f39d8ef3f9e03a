"""Ray Data on a local Ray: rows in, rows or a folder out, though actors die."""

from __future__ import annotations

import io
import json
import os
import runpy
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("ray", reason="ray is not installed: pip install 'vitrt[ray]'")

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from tests.support.commands import Vitrt, vitrt  # noqa: F401
from vitrt import FeatureStore, VisionEncoder
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.config import RuntimeConfig
from vitrt.features import ImageFeatures
from vitrt.integrations.ray import (
    DatasetSummary,
    RayEncoder,
    _FolderEncoder,
    _id_hash,
    _say_doubled,
    encode_dataset,
    encode_parquet,
    from_bytes,
)
from vitrt.integrations.ray_actor import EncoderActor
from vitrt.job.identity import run_identity
from vitrt.job.options import EncodeOptions
from vitrt.sources.record import Record
from vitrt.store.check import check_folder

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = pytest.mark.usefixtures("cluster")


def tiny_image(seed: int) -> bytes:
    """A PNG of its own, of one of twelve sizes."""
    height, width = 40 + 30 * (seed % 4), 50 + 40 * (seed % 3)
    cells = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(cells).resize((width, height)).save(content, "png", compress_level=1)
    return content.getvalue()


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"id": f"{index:04}.png", "image": tiny_image(index)} for index in range(count)]


def assert_near(found: ImageFeatures, wanted: ImageFeatures) -> None:
    """Equal but for the order of sums, which the size of a product decides."""
    assert found.grid_thw == wanted.grid_thw
    assert found.merge_size == wanted.merge_size
    pairs = [(found.embeddings, wanted.embeddings)]
    if wanted.deepstack is not None:
        assert found.deepstack is not None
        pairs.append((found.deepstack, wanted.deepstack))
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def kill_a_writer(folder: Path, shards: int, ended: threading.Event, killed: list[int]) -> None:
    """SIGKILL the actor that writes into the folder, once so many shards are there."""
    while not ended.wait(0.01):
        if len(list(folder.glob("features-*"))) >= shards:
            for note in folder.glob(".lock-*.json"):
                if note.name != ".lock-00000.json":
                    try:
                        pid = json.loads(note.read_text())["pid"]
                        os.kill(pid, signal.SIGKILL)
                    except (OSError, ValueError):
                        continue
                    killed.append(pid)
                    return


def test_every_image_once_though_an_actor_dies(
    tiny_qwen3_vl: Path,
    tmp_path: Path,
    vitrt: Vitrt,  # noqa: F811
) -> None:
    rows, photos = rows_of(2000), tmp_path / "photos"
    photos.mkdir()
    for row in rows:
        (photos / row["id"]).write_bytes(row["image"])
    output, killed = tmp_path / "ray", []
    ended, dataset = threading.Event(), ray.data.from_items(rows)
    killer = threading.Thread(target=kill_a_writer, args=(output, 2, ended, killed))
    killer.start()
    try:
        summary = encode_dataset(dataset, tiny_qwen3_vl, output, batch_size=250)
    finally:
        ended.set()
        killer.join()
    assert len(killed) == 1
    assert len(list(output.glob("manifest-*"))) >= 3  # the dead actor's beside its successor's
    # What the dead one had finished of a batch that ran again is not encoded twice.
    assert summary.images + summary.resumed == 2000 and summary.skipped == 0

    plain = tmp_path / "plain"
    assert vitrt("encode", tiny_qwen3_vl, photos, "--output", plain).code == 0
    found, wanted = FeatureStore(output), FeatureStore(plain)
    result = check_folder(output)
    assert result.problems == [] and result.images == 2000
    assert set(found) == set(wanted) == {row["id"] for row in rows}
    for image_id in wanted:
        assert_near(found[image_id], wanted[image_id])

    again = encode_dataset(dataset, tiny_qwen3_vl, output, batch_size=250)
    assert again == DatasetSummary(images=0, tokens=0, skipped=0, resumed=2000)


def test_rows_of_one_id_are_told_each_time(
    tiny_qwen3_vl: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(9)
    rows[8]["id"] = rows[4]["id"] = rows[0]["id"]
    rows[7]["image"] = b"no image"
    for encoded, resumed in ((8, 0), (2, 6)):
        caplog.clear()
        summary = encode_dataset(ray.data.from_items(rows), tiny_qwen3_vl, tmp_path, batch_size=4)
        assert (summary.images, summary.resumed) == (encoded, resumed)
        assert (summary.skipped, summary.doubled) == (1, 2)
        assert "1 id of several rows: 0000.png: 3 rows have this id" in caplog.text
        lines = [line for file in tmp_path.glob("errors-*") for line in file.open()]
        assert sorted(json.loads(line)["id"] for line in lines) == ["0000.png", "0007.png"]
        assert len(FeatureStore(tmp_path)) == 6 and check_folder(tmp_path).problems == []


def test_rows_of_features_as_parquet(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    rows = rows_of(40)
    rows[7]["image"], rows[8]["image"] = b"broken", None
    source, output = tmp_path / "rows.parquet", tmp_path / "out"
    pq.write_table(pa.Table.from_pylist(rows), source)
    ray.data.read_parquet(str(source)).map_batches(
        RayEncoder,
        fn_constructor_kwargs={"model": tiny_qwen3_vl},
        batch_size=16,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
    ).write_parquet(str(output))
    tables = [pq.read_table(path) for path in output.glob("*.parquet")]
    listed = [row for table in tables for row in table.to_pylist()]
    found = {row["id"]: row for row in listed}
    assert sorted(row["id"] for row in listed) == [row["id"] for row in rows]
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu")
    for row in rows:
        got = found[row["id"]]
        if row["id"] in ("0007.png", "0008.png"):
            assert row["id"] in got["error"] and got["features"] is None
            continue
        (wanted,) = encoder.encode([row["image"]])
        assert got["error"] is None and got["grid_thw"] == list(wanted.grid_thw)
        assert got["tokens"] == len(wanted.embeddings)
        assert_near(from_bytes(got["features"]), wanted)


def test_parquet_is_resumed_by_id(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    rows, output = rows_of(30), tmp_path / "out"
    rows[20]["image"] = b"broken"
    first = encode_parquet(ray.data.from_items(rows[:12]), tiny_qwen3_vl, output, batch_size=5)
    assert (first.images, first.skipped, first.resumed) == (12, 0, 0) and first.tokens > 12
    done = sorted(output.glob("*.parquet"))
    (output / "torn.parquet").write_bytes(done[0].read_bytes()[:-100])
    pooled = EncodeOptions(pool="mean")
    with pytest.raises(ValueError, match="another run: pool is none there and mean now"):
        encode_parquet(ray.data.from_items(rows), tiny_qwen3_vl, output, options=pooled)

    second = encode_parquet(ray.data.from_items(rows), tiny_qwen3_vl, output, batch_size=5)
    assert (second.images, second.skipped, second.resumed) == (17, 1, 12)
    assert not (output / "torn.parquet").exists() and set(done) < set(output.glob("*.parquet"))
    again = encode_parquet(ray.data.from_items(rows), tiny_qwen3_vl, output, batch_size=5)
    assert again == DatasetSummary(resumed=30)

    listed = [row for path in output.glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert sorted(row["id"] for row in listed) == [row["id"] for row in rows]
    found = {row["id"]: row for row in listed}
    assert "0020.png" in found["0020.png"]["error"]
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu")
    for index in (0, 15, 29):
        (wanted,) = encoder.encode([rows[index]["image"]])
        assert_near(from_bytes(found[rows[index]["id"]]["features"]), wanted)

    over = replace(pooled, overwrite=True)
    encode_parquet(ray.data.from_items(rows[:3]), tiny_qwen3_vl, output, options=over)
    (vectors,) = [pq.read_table(path) for path in output.glob("*.parquet")]
    assert sorted(vectors.column("id").to_pylist()) == [row["id"] for row in rows[:3]]
    pq.write_table(pa.table({"id": ["x"]}), output / "other.parquet")
    held = sorted(output.iterdir())
    for options in (pooled, over):
        with pytest.raises(ValueError, match="not written by encode_parquet"):
            encode_parquet(ray.data.from_items(rows), tiny_qwen3_vl, output, options=options)
    assert sorted(output.iterdir()) == held


def test_rows_of_one_id_without_features_are_not_doubled(tmp_path: Path) -> None:
    """None of them was kept, and what is wrong with each was said."""
    same = np.full(3, _id_hash("None"), np.int64)
    assert _say_doubled(tmp_path, [same]) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encode", [encode_dataset, encode_parquet])
def test_an_empty_output_is_not_the_folder_that_this_runs_in(encode: Any) -> None:
    with pytest.raises(ValueError, match="output is empty"):
        encode(None, "model", "")


@pytest.mark.parametrize("encode", [encode_dataset, encode_parquet])
def test_an_actor_has_two_batches_in_hand(
    encode: Any, tiny_qwen3_vl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device works on one while the other begins or is handed over."""

    class SeenError(Exception):
        pass

    def map_batches(self: Any, encoder: Any, *, compute: Any, **arguments: Any) -> None:
        assert compute.max_concurrent_calls_per_actor >= 2
        assert compute.enable_true_multi_threading
        raise SeenError

    monkeypatch.setattr(ray.data.Dataset, "map_batches", map_batches)
    with pytest.raises(SeenError):
        encode(ray.data.from_items(rows_of(3)), tiny_qwen3_vl, tmp_path / "out")


def test_of_two_batches_one_has_the_device(
    tiny_qwen3_vl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are in hand and prepare images; they run one after the other."""
    monkeypatch.setattr("vitrt.integrations.ray_actor.limit_memory", lambda: None)  # no actor here
    runtime, options = RuntimeConfig(device="cpu", dtype="float32"), EncodeOptions(pool="mean")
    identity = run_identity(open_checkpoint(str(tiny_qwen3_vl)), runtime, options)
    folder = tmp_path / "out"
    folder.mkdir()
    actor = _FolderEncoder(folder, identity, model=tiny_qwen3_vl, runtime=runtime, options=options)
    stages, begun, ran = actor._stages, threading.Barrier(2), []

    def records(batch: Any) -> Iterator[Record]:
        begun.wait(60)
        return EncoderActor._records(actor, batch)

    def run(images: Any) -> Any:
        ran.append(threading.get_ident())
        time.sleep(0.02)  # in which the other would run
        return stages.run(images)

    actor._records = records
    actor._stages = replace(stages, run=run, max_batch_patches=64)
    rows = rows_of(16)
    batches = [
        {name: [row[name] for row in half] for name in ("id", "image")}
        for half in (rows[:8], rows[8:])
    ]
    with ThreadPoolExecutor(2) as calls:
        list(calls.map(actor, batches))
    assert set(FeatureStore(folder)) == {row["id"] for row in rows}
    assert len(ran) > 4 and len(list(groupby(ran))) == 2


def test_a_folder_of_another_run_is_refused(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    dataset = ray.data.from_items([*rows_of(3), {"id": "bad.png", "image": b"broken"}])
    pooled = EncodeOptions(pool="mean")
    summary = encode_dataset(dataset, tiny_qwen3_vl, tmp_path / "out", options=pooled)
    assert (summary.images, summary.skipped) == (3, 1)
    assert len(FeatureStore(tmp_path / "out")["0001.png"].embeddings) == 1
    errors = "".join(path.read_text() for path in (tmp_path / "out").glob("errors-*.jsonl"))
    assert json.loads(errors)["id"] == "bad.png"
    with pytest.raises(ValueError, match="pool is mean there and none now"):
        encode_dataset(dataset, tiny_qwen3_vl, tmp_path / "out")


def test_the_example_encodes_a_folder(
    tiny_qwen3_vl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, output = tmp_path / "photos", tmp_path / "out"
    (photos / "sub").mkdir(parents=True)
    for name, seed in (("a.png", 1), ("sub/b.png", 2)):
        (photos / name).write_bytes(tiny_image(seed))
    example = runpy.run_path(str(EXAMPLES / "ray_folder.py"))
    example["main"]([str(tiny_qwen3_vl), str(photos), str(output), "--suffix", ".png"])
    assert "2 encoded, 0 there before, 0 skipped" in capsys.readouterr().out
    assert set(FeatureStore(output)) == {"a.png", "sub/b.png"}
