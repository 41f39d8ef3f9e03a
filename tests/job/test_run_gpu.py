"""The pipeline on a GPU: copies beside the computation, real shortage of memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.folders import photo
from vitrt import FeatureStore, VisionEncoder
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.config import RuntimeConfig
from vitrt.job.encode import EncodeOptions, encode_folder
from vitrt.job.progress import Progress
from vitrt.job.stop import Stop
from vitrt.sources.inputs import Inputs
from vitrt.store.check import check_folder

pytestmark = pytest.mark.gpu


def encode(
    model: Path,
    folder: Path,
    output: Path,
    pool: str = "none",
    budget: int = 512,
    max_pixels: int | None = None,
) -> Progress:
    progress = Progress()
    encode_folder(
        open_checkpoint(model),
        RuntimeConfig(
            device="cuda",
            dtype="float32",
            max_pixels=max_pixels,
            max_batch_tokens=budget,
            cuda_graphs=budget < 1000,
        ),
        Inputs([folder]),
        output,
        EncodeOptions(shard_mib=0.5, pool="mean" if pool == "mean" else "none"),
        progress=progress,
        stop=Stop(),
    )
    return progress


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for index in range(60):
        photo(tmp_path / f"in/{index:02}.png", index, 60 + 7 * (index % 11), 50 + 13 * (index % 7))
    return tmp_path / "in"


def test_shards_hold_what_the_encoder_returns(
    tiny_qwen3_vl: Path, photos: Path, tmp_path: Path
) -> None:
    """Many small batches in flight: a buffer that is reused too early would show."""
    progress = encode(tiny_qwen3_vl, photos, tmp_path / "out", budget=64)
    assert check_folder(tmp_path / "out").problems == []
    assert 0 < progress.snapshot().busy_share <= 1
    store = FeatureStore(tmp_path / "out")
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cuda", dtype="float32")
    names = sorted(store)
    assert len(names) == 60
    for name, wanted in zip(names, encoder.encode([photos / n for n in names]), strict=True):
        found = store[name]
        for mine, other in (
            (found.embeddings, wanted.embeddings),
            (found.deepstack, wanted.deepstack),
        ):
            assert mine is not None and other is not None
            assert (mine - other.cpu()).norm() <= 1e-4 * other.norm()


def test_pooled(tiny_qwen3_vl: Path, photos: Path, tmp_path: Path) -> None:
    encode(tiny_qwen3_vl, photos, tmp_path / "whole")
    encode(tiny_qwen3_vl, photos, tmp_path / "mean", pool="mean")
    whole, mean = FeatureStore(tmp_path / "whole"), FeatureStore(tmp_path / "mean")
    for name in whole:
        torch.testing.assert_close(mean[name].pooled(), whole[name].pooled(), rtol=1e-4, atol=1e-4)


def test_out_of_memory(
    tiny_qwen3_vl: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A budget far over what the device is allowed to give: the run completes all the same."""
    photos = tmp_path / "in"
    for index in range(60):
        width, height = 300 + 35 * (index % 11), 250 + 65 * (index % 7)
        photo(photos / f"{index:02}.png", index, width, height)
    encode(tiny_qwen3_vl, photos, tmp_path / "wanted", max_pixels=1 << 20)
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_reserved()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        # A patch takes about 10 KiB here, so that one image fits and all of them, some 50,000
        # patches, do not. (The allocator takes memory by 20 MiB.)
        torch.cuda.set_per_process_memory_fraction((taken + (192 << 20)) / total)
        encode(tiny_qwen3_vl, photos, tmp_path / "out", budget=100_000, max_pixels=1 << 20)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of device memory" in caplog.text
    wanted, found = FeatureStore(tmp_path / "wanted"), FeatureStore(tmp_path / "out")
    assert set(wanted) == set(found)
    for name in wanted:
        difference = found[name].embeddings - wanted[name].embeddings
        assert difference.norm() <= 1e-4 * wanted[name].embeddings.norm()
