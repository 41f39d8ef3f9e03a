"""Payloads for serving engines: the right rows, widths and grids, and no silent loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vitrt import VisionEncoder
from vitrt.features import ImageFeatures
from vitrt.integrations.feature_inputs import feature_inputs
from vitrt.integrations.serving import for_sglang, for_vllm

GRIDS = [(1, 4, 6), (1, 2, 2), (1, 8, 4)]


def features(grid: tuple[int, int, int], levels: int | None = 3, width: int = 8) -> ImageFeatures:
    t, h, w = grid
    tokens = t * h * w // 4
    deepstack = None if levels is None else torch.randn(levels, tokens, width)
    return ImageFeatures(torch.randn(tokens, width), deepstack, grid)


@pytest.mark.parametrize("levels", [3, None])
def test_rows_and_columns_of_several_images(levels: int | None) -> None:
    images = [features(grid, levels) for grid in GRIDS]
    vllm = for_vllm(images)
    sglang = for_sglang(images)
    assert set(vllm) == {"image"}
    assert set(vllm["image"]) == {"image_embeds", "image_grid_thw"}
    assert set(sglang) == {"format", "precomputed_embeddings", "image_grid_thw"}
    assert sglang["format"] == "processor_output"
    for rows, grids in (
        (vllm["image"]["image_embeds"], vllm["image"]["image_grid_thw"]),
        (sglang["precomputed_embeddings"], sglang["image_grid_thw"]),
    ):
        assert grids.dtype == torch.int64
        assert grids.tolist() == [list(grid) for grid in GRIDS]
        assert rows.shape == (6 + 1 + 8, 8 * (1 + (levels or 0)))
        assert torch.equal(rows[6:7, :8], images[1].embeddings)
        for level in range(levels or 0):
            # Deepstack follows in the order of deepstack_visual_indexes.
            columns = slice(8 * (1 + level), 8 * (2 + level))
            assert torch.equal(rows[7:, columns], images[2].deepstack[level])


def test_one_image_keeps_its_axis() -> None:
    assert for_vllm([features(GRIDS[0])])["image"]["image_grid_thw"].shape == (1, 3)


def test_videos_carry_their_times() -> None:
    clips = [features((3, 4, 4)), features((3, 2, 6))]
    times = [[0.5, 1.5, 2.5], [0.0, 1.0, 2.0]]
    video = for_vllm(videos=clips, timestamps=times)["video"]
    assert video["video_grid_thw"].tolist() == [[3, 4, 4], [3, 2, 6]]
    assert video["timestamps"].tolist() == times
    assert len(video["video_embeds"]) == 12 + 9
    both = for_vllm([features(GRIDS[0])], clips, second_per_grid_ts=[0.5, 1.0])
    assert both["video"]["second_per_grid_ts"].tolist() == [0.5, 1.0]
    assert "timestamps" not in both["video"]
    assert set(both) == {"image", "video"}


def test_input_ids_ride_along() -> None:
    assert for_sglang([features((1, 2, 2))], input_ids=[1, 5, 2])["input_ids"].tolist() == [1, 5, 2]


def test_pooled_features_hold_no_tokens() -> None:
    pooled = ImageFeatures(torch.zeros(1, 8), None, (1, 4, 4))
    assert pooled.pooled().shape == (8,)
    for call in (pooled.spatial, pooled.concatenated, lambda: feature_inputs([pooled])):
        with pytest.raises(ValueError, match=r"1 row for the 4 merged tokens .* pooled"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: for_vllm([features(GRIDS[0]), features(GRIDS[1], width=4)]),
            "4 wide with 3 levels",
        ),
        (lambda: for_vllm([features(GRIDS[0]), features(GRIDS[1], None)]), "8 wide with 0 levels"),
        (lambda: for_vllm([replace(features(GRIDS[0]), grid_thw=(1, 4, 4))]), "6 tokens, not 4"),
        (lambda: for_vllm(videos=[features((2, 4, 4))]), "need either timestamps"),
        (lambda: for_vllm(videos=[features((2, 4, 4))], timestamps=[[0.0]]), r"\[1\] frames"),
        (
            lambda: for_vllm(
                videos=[features((2, 2, 2)), features((1, 2, 2))], timestamps=[[0, 1], [0]]
            ),
            "equally long",
        ),
        (lambda: for_vllm([features(GRIDS[0])], timestamps=[[0.0]]), "there are none"),
        (
            lambda: for_vllm(videos=[features((2, 2, 2))], second_per_grid_ts=[1, 2]),
            "2 values for 1 video$",
        ),
        (lambda: for_sglang([]), "no images"),
        (
            lambda: for_sglang([features(GRIDS[0])], input_ids=[True, 2]),
            "flat list of integers: True is no number",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_from_an_encoder(tiny_qwen3_vl: Path) -> None:
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (64, 96, 3), dtype=np.uint8) for _ in range(2)]
    encoded = encoder.encode(pictures)
    data = for_vllm(encoded)["image"]
    width = encoder.config.out_hidden_size * (1 + len(encoder.config.deepstack_visual_indexes))
    assert data["image_embeds"].shape == (int(data["image_grid_thw"].prod(-1).sum()) // 4, width)
    assert data["image_embeds"].device.type == "cpu"
