"""The towers against transformers' own, float32 on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import (
    FAMILIES,
    full_size_checkpoint,
    reference_tower,
    tiny_checkpoint,
)
from vitrt import VisionEncoder

TOLERANCE = 1e-5  # relative L2, NUMERICS

# Batches of (t, h, w) in patches: one row of merged cells, windows cut off by 0 to 3 cells on each
# axis, single merged tokens, clips, mixes. Windows are 4 merged cells = 8 patches a side.
BATCHES = [
    [(1, 2, 2)],
    [(1, 2, 4)],
    [(1, 4, 2)],
    [(1, 2, 40)],
    [(1, 40, 2)],
    [(1, 8, 8)],
    [(1, 8, 10)],
    [(1, 10, 8)],
    [(1, 10, 12)],
    [(1, 12, 14)],
    [(1, 14, 14)],
    [(1, 16, 16)],
    [(1, 16, 18)],
    [(1, 18, 20)],
    [(1, 20, 22)],
    [(1, 22, 6)],
    [(1, 6, 22)],
    [(1, 24, 24)],
    [(1, 26, 4)],
    [(1, 34, 36)],
    [(2, 8, 8)],
    [(2, 6, 10)],
    [(5, 4, 6)],
    [(5, 10, 14)],
    [(1, 2, 2), (1, 2, 2)],
    [(1, 2, 2), (1, 30, 2), (1, 8, 8)],
    [(1, 8, 8), (1, 8, 8), (1, 8, 8)],
    [(1, 12, 10), (2, 4, 6), (1, 10, 12)],
    [(3, 8, 8), (1, 18, 2), (2, 10, 10)],
    [(1, 16, 16), (5, 2, 2), (1, 14, 22)],
    [(2, 12, 6), (1, 6, 12), (1, 4, 4), (1, 20, 14)],
    [(1, 4, 16), (1, 16, 4), (1, 8, 8)],
]


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def in_patch_order(tower, hidden: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
    """transformers' last_hidden_state in the order of pixel_values, not in window order."""
    if not hasattr(tower, "fullatt_block_indexes"):
        return hidden
    from transformers.vision_utils import get_vision_window_index

    index, _ = get_vision_window_index(
        torch.tensor(grids),
        spatial_merge_size=tower.spatial_merge_size,
        window_size=tower.window_size,
        patch_size=tower.patch_size,
    )
    cells = hidden.view(len(index), tower.spatial_merge_unit, -1)
    return cells[index.argsort()].reshape(hidden.shape)


def assert_equal_to_reference(encoder: VisionEncoder, reference, grids, pixel_values: Tensor):
    grid_thw = torch.tensor(grids)
    with torch.inference_mode():
        expected = reference(pixel_values, grid_thw=grid_thw)
    actual = encoder(pixel_values, grid_thw, return_hidden=True)
    assert actual.grid_thw.tolist() == grid_thw.tolist()
    assert relative_l2(actual.embeddings, expected.pooler_output) <= TOLERANCE
    levels = getattr(expected, "deepstack_features", None) or []
    assert (actual.deepstack is None) == (not levels)
    for level, features in enumerate(levels):
        assert relative_l2(actual.deepstack[level], features) <= TOLERANCE
    hidden = in_patch_order(reference, expected.last_hidden_state, grids)
    assert relative_l2(actual.hidden, hidden) <= TOLERANCE


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    encoder = VisionEncoder.from_pretrained(folder, device="cpu")
    return encoder, reference_tower(folder)


@pytest.mark.parametrize("grids", BATCHES, ids=str)
def test_equal_to_transformers(pair, grids):
    encoder, reference = pair
    patches = sum(t * h * w for t, h, w in grids)
    generator = torch.Generator().manual_seed(patches)
    pixel_values = torch.randn(patches, encoder.config.patch_dim, generator=generator)
    assert_equal_to_reference(encoder, reference, grids, pixel_values)


def test_packed_batch_equals_one_by_one(pair):
    encoder, _ = pair
    grids = [(1, 12, 10), (2, 4, 6), (1, 2, 2), (1, 18, 22), (1, 18, 22)]
    counts = [t * h * w for t, h, w in grids]
    pixel_values = torch.randn(sum(counts), encoder.config.patch_dim)
    packed = encoder(pixel_values, grids)
    alone = [
        encoder(part, [grid]) for part, grid in zip(pixel_values.split(counts), grids, strict=True)
    ]
    assert relative_l2(packed.embeddings, torch.cat([a.embeddings for a in alone])) <= 1e-6
    if packed.deepstack is not None:
        levels = torch.cat([a.deepstack for a in alone], dim=1)
        assert relative_l2(packed.deepstack, levels) <= 1e-6


def test_frames_do_not_attend_to_each_other(pair):
    encoder, _ = pair
    pixel_values = torch.randn(3 * 64, encoder.config.patch_dim)
    before = encoder(pixel_values, [(3, 8, 8)]).embeddings
    pixel_values[64:128] = torch.randn(64, encoder.config.patch_dim)
    after = encoder(pixel_values, [(3, 8, 8)]).embeddings
    assert torch.equal(before[:16], after[:16]) and torch.equal(before[32:], after[32:])
    assert not torch.equal(before[16:32], after[16:32])


def test_same_grids_again_do_no_index_arithmetic(pair, monkeypatch: pytest.MonkeyPatch):
    """The second batch of the same grids takes its plan, packed, from the cache."""
    import vitrt.engine.eager_runner
    import vitrt.models.plan
    import vitrt.models.tower

    encoder, _ = pair
    grids = [(2, 14, 10), (1, 6, 26)]
    pixel_values = torch.randn(2 * 140 + 156, encoder.config.patch_dim)
    first = encoder(pixel_values, grids)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("index arithmetic for grids already planned")

    monkeypatch.setattr(vitrt.models.tower, "build_plan", forbidden)
    monkeypatch.setattr(vitrt.engine.eager_runner, "pack_plan", forbidden)
    monkeypatch.setattr(type(encoder.tower), "plan_frame", forbidden)
    monkeypatch.setattr(type(encoder.tower), "rotary_position_ids", forbidden)
    second = encoder(pixel_values, grids)
    assert torch.equal(first.embeddings, second.embeddings)


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([(1, 3, 4)], r"grid_thw\[0\] is \(1, 3, 4\)"),
        ([(1, 4, 4), (0, 4, 4)], r"grid_thw\[1\] is \(0, 4, 4\)"),
        ([(1, -2, 4)], r"grid_thw\[0\]"),
        ([], "grid_thw is empty"),
    ],
)
def test_impossible_grids_are_named(pair, grids, message):
    with pytest.raises(ValueError, match=message):
        pair[0](torch.zeros(16, pair[0].config.patch_dim), grids)


def test_pixel_values_that_do_not_belong_to_the_grids(pair):
    encoder, _ = pair
    with pytest.raises(ValueError, match=r"must be \(16, \d+\)"):
        encoder(torch.zeros(12, encoder.config.patch_dim), [(1, 4, 4)])
    with pytest.raises(ValueError, match=r"int64; it must be a floating-point tensor"):
        encoder(torch.zeros(16, encoder.config.patch_dim, dtype=torch.int64), [(1, 4, 4)])


def test_an_adapter_can_be_trained_on_features(pair):
    encoder, _ = pair
    features = encoder.encode([np.full((64, 64, 3), 90, dtype=np.uint8)])[0].embeddings
    adapter = torch.nn.Linear(features.shape[1], 3)
    adapter(features).sum().backward()
    assert adapter.weight.grad is not None and adapter.weight.grad.any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "vision"),
    [
        ("qwen3.5-0.8b", {}),
        ("qwen2.5-vl-7b", {"depth": 4, "fullatt_block_indexes": [1, 3]}),
        ("qwen3-vl-8b", {"depth": 5, "deepstack_visual_indexes": [1, 2, 4]}),
        ("qwen2-vl-2b", {"depth": 2}),
        ("qwen3.5-27b", {"depth": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.get('depth', 'all')} blocks",
)
def test_full_size_tower_on_a_photo(name: str, vision: dict[str, Any], tmp_path: Path):
    """Released widths, random weights, one 364 x 280 photograph through the whole path."""
    from PIL import Image
    from skimage import data

    from vitrt.images.levels import patches_reference

    folder = full_size_checkpoint(name, tmp_path / name, **vision)
    encoder = VisionEncoder.from_pretrained(folder, device="cpu", dtype="float32")
    photo = Image.fromarray(data.astronaut()).resize((364, 280))
    features = encoder.encode([photo])[0]
    prepared = encoder.processor.prepare(photo)
    table = encoder.table.cpu().numpy()
    config = encoder.config
    pixel_values = torch.from_numpy(
        patches_reference(
            prepared,
            table,
            config.patch_size,
            config.temporal_patch_size,
            config.spatial_merge_size,
        )
    )
    reference = reference_tower(folder)
    with torch.inference_mode():
        expected = reference(pixel_values, grid_thw=torch.tensor([prepared.grid_thw]))
    assert relative_l2(features.embeddings, expected.pooler_output) <= TOLERANCE
    for level, wanted in enumerate(getattr(expected, "deepstack_features", None) or []):
        assert relative_l2(features.deepstack[level], wanted) <= TOLERANCE
