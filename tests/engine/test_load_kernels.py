"""What an engine runs when it is loaded is what its forwards run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitrt import VisionEncoder
from vitrt.engine import batch


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
