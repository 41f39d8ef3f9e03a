"""What an engine runs when it is loaded is what its forwards run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitrt import VisionEncoder
from vitrt.attention.probe import no_kernel
from vitrt.attention.registry import _SPECS
from vitrt.engine import ahead, batch
from vitrt.engine.engine import kernel_plans
from vitrt.kernels import flash_attention
from vitrt.kernels.gemm_table import tables


def test_patches_are_cut_by_the_kernel_that_images_take(
    tiny_qwen3_vl: Path, monkeypatch: pytest.MonkeyPatch
):
    """One table of levels, or one for stills and one for clips, are two kernels to Triton."""
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu")
    tables = []
    real = batch.patchify

    def spy(pixels: torch.Tensor, rows: torch.Tensor, table: torch.Tensor, *rest: Any, **out: Any):
        tables.append(table.shape)
        return real(pixels, rows, table, *rest, **out)

    monkeypatch.setattr(batch, "patchify", spy)
    encoder.engine.load_kernels()
    loaded = set(tables)
    tables.clear()
    encoder.encode([np.zeros((64, 64, 3), dtype=np.uint8)])
    assert set(tables) == loaded


def test_every_share_of_a_product_is_met(tiny_qwen3_vl: Path):
    """Norms are compiled by how many shares they add up, which goes by the rows."""
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu")
    loaded = {plan.num_patches for plan in kernel_plans(encoder.engine.runner)}
    for table in tables():
        for product in table.choices:
            tiles = {m: table.choice(product, m).split_tile for m in range(1, 2049)}
            shares = {tile.shares for tile in tiles.values() if tile is not None}
            assert shares == {tiles[m].shares for m in loaded if tiles[m] is not None}, product


@pytest.mark.parametrize("heads", [16, 12, 8, 6])
def test_both_tilings_of_our_flash_kernel_are_met(
    heads: int, tiny_qwen3_vl: Path, monkeypatch: pytest.MonkeyPatch
):
    """By batches that "auto" gives it on Hopper: the longest of 65 to 767 patches, 2048 in all."""
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu")
    monkeypatch.setattr(flash_attention, "is_hopper", lambda device: True)
    monkeypatch.setattr(flash_attention, "processors", lambda device: 132)

    def tilings(totals: Iterable[int]) -> set[flash_attention.FlashTiling]:
        of = (torch.empty(m, 3, heads, 72, dtype=torch.bfloat16) for m in totals)
        return {flash_attention._tiling(qkv) for qkv in of}

    loaded = [
        plan.num_patches
        for plan in kernel_plans(encoder.engine.runner)
        if 64 < max(h * w for _, h, w in plan.grids) < 768
    ]
    assert tilings(loaded) == tilings(range(65, 2049))


def test_attention_of_our_own_is_compiled_ahead():
    ours = {name for name, spec in _SPECS.items() if spec.unavailable is no_kernel}
    assert ours and ours < set(ahead._COMPILED_HERE)
