"""Counted FLOPs, tokens and parameters against written-out formulas and transformers' towers."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.checkpoints import CONFIGS
from vitrt.compare.reference import empty_tower
from vitrt.config import Grid, VisionConfig
from vitrt.models.config_file import read_vision_config
from vitrt.models.work import attention_layers, count_flops, count_parameters, count_tokens

WORKLOADS: dict[str, tuple[list[Grid], list[Grid]]] = {
    "1x560": ([(1, 36, 36)], [(1, 40, 40)]),
    "1x1120x700": ([(1, 44, 70)], [(1, 50, 80)]),
    "32x560": ([(1, 36, 36)] * 32, [(1, 40, 40)] * 32),
    "16x1120x700": ([(1, 44, 70)] * 16, [(1, 50, 80)] * 16),
    "1x4k": ([(1, 128, 256)], [(1, 128, 256)]),
    "mixed16": ([(1, 2 * (8 + i), 2 * (20 - i)) for i in range(16)],) * 2,
}
# Milliseconds of the counted work at 809 TFLOP/s, published before this code was written.
FLOORS = {
    "1x560": (1.71, 2.62),
    "1x1120x700": (4.91, 6.80),
    "32x560": (54.7, 84.0),
    "16x1120x700": (78.5, 109.0),
    "1x4k": (202.0, 79.6),
    "mixed16": (13.55, 17.9),
}


def released(name: str) -> VisionConfig:
    return read_vision_config(json.loads((CONFIGS / name / "config.json").read_text()))


grids = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)).map(
        lambda g: (g[0], 2 * g[1], 2 * g[2])
    ),
    min_size=1,
    max_size=5,
)


@given(grids)
def test_qwen3_vl_8b_equals_its_written_formula(batch: list[Grid]) -> None:
    config = released("qwen3-vl-8b")
    n = sum(t * h * w for t, h, w in batch)
    pairs = sum(t * h * w * h * w for t, h, w in batch)
    expected = (
        27 * (2 * n * (4 * 1152**2 + 2 * 1152 * 4304) + 4 * pairs * 1152)
        + 2 * n * 1536 * 1152
        + 4 * (n // 4) * 2 * (4608**2 + 4608 * 4096)
    )
    assert count_flops(config, batch).total == expected


@given(grids)
def test_qwen2_5_vl_7b_equals_its_written_formula(batch: list[Grid]) -> None:
    config = released("qwen2.5-vl-7b")
    n = sum(t * h * w for t, h, w in batch)
    pairs = sum(t * h * w * h * w for t, h, w in batch)
    expected = (
        32 * 2 * n * (4 * 1280**2 + 3 * 1280 * 3420)
        + 4 * 4 * pairs * 1280
        + 28 * 4 * n * 64 * 1280
        + 2 * n * 1176 * 1280
        + (n // 4) * 2 * (5120**2 + 5120 * 3584)
    )
    assert count_flops(config, batch).total == expected


@pytest.mark.parametrize("name", WORKLOADS)
def test_floors_are_the_published_ones(name: str) -> None:
    for model, batch, floor in zip(
        ("qwen3-vl-8b", "qwen2.5-vl-7b"), WORKLOADS[name], FLOORS[name], strict=True
    ):
        milliseconds = count_flops(released(model), batch).total / 809e12 * 1e3
        assert milliseconds == pytest.approx(floor, rel=5e-3)


def test_tokens_are_merged_patches_of_every_frame() -> None:
    assert count_tokens(released("qwen3-vl-8b"), [(2, 6, 10), (1, 2, 2)]) == 2 * 15 + 1


def test_layers_listed_beyond_the_depth_are_not_counted() -> None:
    config = read_vision_config(
        {
            "model_type": "qwen2_5_vl",
            "hidden_size": 160,
            "num_heads": 4,
            "depth": 3,
            "fullatt_block_indexes": [1, 7],
        }
    )
    assert attention_layers(config) == (1, 2)
    assert attention_layers(released("qwen3-vl-2b")) == (24, 0)


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.iterdir() if path.is_dir()))
def test_parameters_are_those_of_transformers(name: str) -> None:
    config = released(name)
    reference = empty_tower(config, device=torch.device("meta"), dtype=torch.float32)
    assert count_parameters(config) == sum(
        parameter.numel() for parameter in reference.parameters()
    )
