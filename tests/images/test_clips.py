"""Clips against transformers' own video processors: sizes, pixels, normalisation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.video_reference import run_video_processors
from vitrt.config import RuntimeConfig
from vitrt.images.config import PreprocessorConfig, VideoConfig
from vitrt.images.levels import normalisation_table, patches_reference
from vitrt.images.processor import ImageProcessor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RELEASED = VideoConfig("clip", 4096, 25165824, (0.5,) * 3, (0.5,) * 3)
PER_FRAME = VideoConfig("frame", 3136, 12845056, CLIP_MEAN, CLIP_STD)


def processor(video: VideoConfig, **user: Any) -> ImageProcessor:
    patch = 14 if video.rule == "frame" else 16
    config = PreprocessorConfig(3136, 12845056, CLIP_MEAN, CLIP_STD, patch, 2, 2, video)
    return ImageProcessor.from_configs(config, RuntimeConfig(**user))


def tokens(video: VideoConfig, frames: int, height: int, width: int, **user: Any) -> int:
    t, h, w = processor(video, **user).grid(height, width, frames)
    return t * h * w // 4


def random_case(rng: np.random.Generator) -> tuple[dict[str, Any], np.ndarray]:
    rule = str(rng.choice(["frame", "clip"]))
    frames = int(rng.choice([2, 3, 4, 5, 7, 10, 11, 14]))
    height, width = (int(side) for side in rng.integers(3, 150, 2))
    low = int(rng.integers(1, 60_000))
    high = low + int(rng.integers(10, 400_000))
    settings: dict[str, Any] = {"patch_size": 14 if rule == "frame" else 16}
    if rng.random() < 0.8:  # else the limits of the class
        settings["size"] = {"shortest_edge": low, "longest_edge": high}
    if rng.random() < 0.3:  # which Qwen3-VL's does not know
        settings["min_pixels"] = low // 2 + 1
        settings["max_pixels"] = high * 2
    if rng.random() < 0.3:
        settings |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    settings["cap_pixels_per_frame"] = bool(rng.random() < 0.4)
    if rng.random() < 0.5:
        settings["max_video_tokens"] = int(rng.integers(4, 60))
    clip = rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return {"rule": rule, "settings": settings}, clip


def test_120_clips_equal_transformers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cases = [random_case(rng) for _ in range(120)]
    references = run_video_processors([c for c, _ in cases], [clip for _, clip in cases], tmp_path)
    for (case, clip), theirs in zip(cases, references, strict=True):
        video = VideoConfig.from_dict(case["settings"], case["rule"])
        ours = processor(video)
        prepared = ours.prepare(clip)
        assert list(prepared.grid_thw) == theirs["grid"], case
        assert prepared.pixels.flags.c_contiguous
        table = normalisation_table(video.image_mean, video.image_std, "torch")
        values = patches_reference(prepared, table, ours.patch_size, 2, 2)
        np.testing.assert_array_equal(values, theirs["values"], err_msg=str(case))


def test_budgets_of_whole_clips() -> None:
    assert tokens(RELEASED, 16, 100, 100) == 72
    assert tokens(RELEASED, 64, 720, 1280) == 11_648
    assert tokens(RELEASED, 768, 720, 1280) <= 25165824 / 32 / 32 / 2
    assert tokens(PER_FRAME, 16, 100, 100) == 8 * tokens(PER_FRAME, 1, 100, 100)


def test_one_frame_is_an_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    ours = processor(replace(RELEASED, max_pixels=4096))
    alone, clip = ours.prepare(image), ours.prepare(image[None])
    assert alone.grid_thw == clip.grid_thw == ours.grid(200, 300)
    np.testing.assert_array_equal(alone.pixels, clip.pixels)


def test_the_users_limits() -> None:
    # What bounds images bounds every frame.
    assert tokens(RELEASED, 64, 720, 1280, max_pixels=32 * 32 * 100) <= 32 * 100
    assert tokens(PER_FRAME, 64, 720, 1280, max_pixels=28 * 28 * 100) <= 32 * 100
    assert tokens(RELEASED, 4, 100, 100, min_pixels=32 * 32 * 100) >= 2 * 100
    assert tokens(RELEASED, 768, 720, 1280, max_pixels=32 * 32 * 2000) == tokens(
        RELEASED, 768, 720, 1280
    )
    # A limit of its own is a clip's, counted as its family counts it, and frees it from the other.
    limit = {"video_max_pixels": 64 * 32 * 32 * 100}
    assert tokens(RELEASED, 64, 720, 1280, **limit, max_pixels=4096) in range(2500, 3201)
    assert tokens(PER_FRAME, 64, 720, 1280, video_max_pixels=28 * 28 * 50) in range(1200, 1601)
    assert tokens(PER_FRAME, 4, 50, 50, video_min_pixels=28 * 28 * 50) >= 100
    with pytest.raises(ValueError, match="min_pixels 4096 is larger than max_pixels 9"):
        processor(RELEASED, video_max_pixels=9)
    with pytest.raises(ValueError, match="video_min_pixels 9 is larger than video_max_pixels 8"):
        RuntimeConfig(video_min_pixels=9, video_max_pixels=8)


@pytest.mark.parametrize("frames", [7, 8])
def test_a_span_of_a_clip_is_cut_out_of_the_whole(frames: int) -> None:
    """What several processes share keeps the size that the clip has as one."""
    clip = np.random.default_rng(0).integers(0, 256, (frames, 300, 200, 3), dtype=np.uint8)
    ours = processor(replace(RELEASED, max_pixels=frames * 100 * 100))
    whole = ours.prepare(clip)
    parts = [ours.prepare(clip, span=(start, stop)) for start, stop in ((0, 1), (1, 4))]
    assert [part.grid_thw[0] for part in parts] == [1, 3]
    assert all(part.grid_thw[1:] == whole.grid_thw[1:] for part in parts)
    np.testing.assert_array_equal(np.concatenate([p.pixels for p in parts]), whole.pixels)


def test_a_clip_that_is_too_thin() -> None:
    with pytest.raises(ValueError, match="aspect ratio"):
        processor(RELEASED).prepare(np.zeros((4, 1, 4000, 3), np.uint8))
    assert processor(RELEASED).grid(2, 300, 4) == (2, 2, 300)
