"""Patchify against slices of the images; every value must be the table's, rounded once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.kernel_cases import REFERENCE_DTYPES, TRITON_CASES
from vitrt.kernels import patchify as patchify_file
from vitrt.kernels.patchify import patchify

# (frames, rows, columns) in patches: an image, a clip, a thin image.
GRIDS = [(1, 3, 4), (4, 2, 3), (1, 5, 1)]


def inputs(
    patch: int, temporal: int, device: str, dtype: torch.dtype, padded: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels, sources in a random order, the tables of stills and clips, the expected patches."""
    rng = np.random.default_rng()
    tables = rng.standard_normal((2, 3, 256)).astype(np.float32)
    pieces, sources, expected = [], [], []
    start = 0
    for frames, rows, columns in GRIDS:
        image = rng.integers(0, 256, (frames, rows * patch, columns * patch, 3), dtype=np.uint8)
        table = tables[int(frames > 1)]
        normalised = np.stack([table[c][image[..., c]] for c in range(3)])  # [C, F, H, W]
        if frames == 1:
            normalised = normalised.repeat(temporal, axis=1)
        row_bytes, frame_bytes = columns * patch * 3, image[0].size
        for t in range(normalised.shape[1] // temporal):
            for y in range(rows):
                for x in range(columns):
                    offset = t * temporal * frame_bytes + y * patch * row_bytes + x * patch * 3
                    step = 0 if frames == 1 else frame_bytes
                    sources.append((start + offset, row_bytes, step))
                    cut = normalised[:, t * temporal : (t + 1) * temporal]
                    cut = cut[..., y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
                    expected.append(cut.reshape(-1))
        pieces.append(image.reshape(-1))
        start += image.size
    if padded:
        for at in (0, 3, len(sources)):
            sources.insert(at, (-1, 7, 5))
            expected.insert(at, np.zeros_like(expected[0]))
    order = rng.permutation(len(sources))
    return (
        torch.from_numpy(np.concatenate(pieces)).to(device),
        torch.tensor(sources, dtype=torch.int32)[order].contiguous().to(device),
        torch.from_numpy(tables).to(device),
        torch.from_numpy(np.stack(expected)[order]).to(dtype),
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("patch", "temporal"), [(14, 2), (16, 2), (4, 2), (5, 1), (3, 4)])
@pytest.mark.parametrize(("device", "dtype"), TRITON_CASES)
def test_patchify_kernel(
    device: str, dtype: torch.dtype, patch: int, temporal: int, padded: bool
) -> None:
    pixels, sources, table, expected = inputs(patch, temporal, device, dtype, padded)
    for rows in (1, 2):
        out = torch.full(expected.shape, torch.nan, device=device, dtype=dtype)
        patchify_file._patchify_triton(pixels, sources, table, patch, temporal, out, rows=rows)
        assert torch.equal(out.cpu(), expected)


@pytest.mark.gpu
def test_public_function_on_a_gpu() -> None:
    pixels, sources, table, expected = inputs(14, 2, "cuda", torch.bfloat16, padded=True)
    assert torch.equal(patchify(pixels, sources, table, 14, 2, torch.bfloat16).cpu(), expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", REFERENCE_DTYPES)
@pytest.mark.parametrize(("patch", "temporal"), [(14, 2), (16, 2), (5, 1), (3, 4)])
def test_cpu_path(dtype: torch.dtype, patch: int, temporal: int, padded: bool) -> None:
    pixels, sources, table, expected = inputs(patch, temporal, "cpu", dtype, padded)
    assert torch.equal(patchify(pixels, sources, table, patch, temporal, dtype), expected)
    out = torch.full(expected.shape, torch.nan, dtype=dtype)
    assert patchify(pixels, sources, table, patch, temporal, dtype, out) is out
    assert torch.equal(out, expected)


def test_one_table_for_stills_and_clips() -> None:
    pixels, sources, tables, _ = inputs(4, 2, "cpu", torch.float32, False)
    both = torch.stack([tables[0], tables[0]])
    expected = patchify(pixels, sources, both, 4, 2, torch.float32)
    assert torch.equal(patchify(pixels, sources, tables[0], 4, 2, torch.float32), expected)


def test_no_patches_and_only_padding() -> None:
    table = torch.ones(3, 256)
    empty = torch.zeros(0, dtype=torch.uint8)
    none = torch.zeros(0, 3, dtype=torch.int32)
    assert patchify(empty, none, table, 14, 2, torch.float32).shape == (0, 1176)
    padding = torch.full((2, 3), -1, dtype=torch.int32)
    assert not patchify(empty, padding, table, 14, 2, torch.float32).any()
