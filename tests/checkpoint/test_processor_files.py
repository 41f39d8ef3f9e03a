"""Which file of a checkpoint is believed on images and clips: as transformers reads them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoImageProcessor

from tests.support.video_reference import run_video_processors
from vitrt import VisionEncoder
from vitrt.checkpoint.extract import extract_tower
from vitrt.checkpoint.opened import Checkpoint, open_checkpoint
from vitrt.checkpoint.shards import CheckpointError

IMAGE, VIDEO, BOTH = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
SIZES = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}


def settings(kind: str, longest: int, mean: float = 0.5, **more: Any) -> dict[str, Any]:
    """An image ("Qwen2VLImageProcessorFast") or video processor's, of a known upper limit."""
    name = "video_processor_type" if "Video" in kind else "image_processor_type"
    size = {"shortest_edge": 1024, "longest_edge": longest}
    stats = {"image_mean": [mean] * 3, "image_std": [0.5, 0.25, 0.5]}
    limits = {} if "min_pixels" in more else {"size": size}
    return {name: kind, **limits, **stats, **SIZES, **more}


IMAGES, FAST, VIDEOS = "Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen3VLVideoProcessor"
OLD = {"min_pixels": 2048, "max_pixels": 40960}
# Files of a checkpoint -> the one that counts for images, and the one for clips.
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "flat": {IMAGE: settings(FAST, 40000), VIDEO: settings(VIDEOS, 90000)},
    "image file alone": {IMAGE: settings(FAST, 40000, 0.4)},
    "image file of the old class": {IMAGE: settings(IMAGES, 40000, 0.4)},
    "old names": {IMAGE: settings(FAST, 1, **OLD), VIDEO: settings(VIDEOS, 9, **OLD)},
    "old names and class": {IMAGE: settings(IMAGES, 1, **OLD)},
    "nested": {
        BOTH: {
            "image_processor": settings(FAST, 50000, 0.3),
            "video_processor": settings(VIDEOS, 99000, 0.6),
        }
    },
    "nested and flat": {
        BOTH: {
            "image_processor": settings(FAST, 50000, 0.3),
            "video_processor": settings(VIDEOS, 99000, 0.6),
        },
        IMAGE: settings(FAST, 40000),
        VIDEO: settings(VIDEOS, 90000),
    },
    "nested image, flat video": {
        BOTH: {"image_processor": settings(FAST, 50000, 0.3)},
        VIDEO: settings(VIDEOS, 90000, 0.7),
    },
    "nested image, flat image": {
        BOTH: {"image_processor": settings(FAST, 50000, 0.3)},
        IMAGE: settings(FAST, 40000, 0.8),
    },
    "nested video, flat image": {
        BOTH: {"video_processor": settings(VIDEOS, 99000, 0.6)},
        IMAGE: settings(FAST, 40000),
    },
    "no nested part": {BOTH: {"processor_class": "Qwen3VLProcessor"}, IMAGE: settings(FAST, 40000)},
    "video defaults": {IMAGE: settings(FAST, 40000), VIDEO: {"video_processor_type": VIDEOS}},
    "another family's clips": {
        IMAGE: settings(FAST, 40000),
        VIDEO: settings("Qwen2VLVideoProcessor", 30000),
    },
    "capped": {
        IMAGE: settings(FAST, 40000),
        VIDEO: settings(VIDEOS, 900000, cap_pixels_per_frame=True, max_video_tokens=5),
    },
}


@pytest.fixture
def source(tiny_qwen3_vl: Path, tmp_path: Path) -> Path:
    copy = Path(shutil.copytree(tiny_qwen3_vl, tmp_path / "source"))
    (copy / IMAGE).unlink()
    return copy


def write(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_every_layout_as_transformers_reads_it(source: Path, tmp_path: Path) -> None:
    """Also once extracted, through vitrt and through transformers."""
    clip = np.random.default_rng(0).integers(0, 256, (6, 120, 200, 3), dtype=np.uint8)
    folders = []
    for name, files in LAYOUTS.items():
        folder = tmp_path / name
        shutil.copytree(source, folder)
        write(folder, files)
        folders += [folder, extract_tower(open_checkpoint(folder), tmp_path / f"{name} extracted")]
    cases = [{"folder": str(folder)} for folder in folders]
    theirs = run_video_processors(cases, [clip] * len(cases), tmp_path)
    for folder, reference in zip(folders, theirs, strict=True):
        encoder = VisionEncoder.from_pretrained(folder, device="cpu")
        video = encoder.preprocessor.video
        assert video.rule == reference["rule"], folder.name
        edges = {"shortest_edge": video.min_pixels, "longest_edge": video.max_pixels}
        assert edges == reference["size"], folder.name
        table = encoder.table[1].numpy()
        prepared = encoder.processor.prepare(clip)
        assert list(prepared.grid_thw) == reference["grid"], folder.name
        first = prepared.pixels[0, 0, 0]
        np.testing.assert_array_equal(
            table[[0, 1, 2], first], reference["values"][0].reshape(3, 2, 256)[:, 0, 0]
        )
        images = AutoImageProcessor.from_pretrained(folder, backend="pil")
        config = encoder.preprocessor
        assert (config.min_pixels, config.max_pixels) == (
            images.size["shortest_edge"],
            images.size["longest_edge"],
        ), folder.name
        assert list(config.image_mean) == list(images.image_mean), folder.name
        assert list(config.image_std) == list(images.image_std), folder.name


def differing(source: Path, caplog: pytest.LogCaptureFixture, files: Any) -> list[str]:
    caplog.clear()
    write(source, files)
    open_checkpoint(source)
    return warnings(caplog)


def test_files_that_differ_are_named(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    (image, video) = differing(source, caplog, LAYOUTS["nested and flat"])
    assert f"{BOTH} and {IMAGE} differ; the first is taken" in image
    assert "max_pixels 50000 against 40000" in image and "image_mean (0.3, 0.3, 0.3)" in image
    assert "image_std" not in image
    assert f"{BOTH} and {VIDEO} differ" in video and "max_pixels 99000 against 90000" in video
    alike = dict(LAYOUTS["nested and flat"])
    alike[IMAGE] = alike[BOTH]["image_processor"]
    alike[VIDEO] = alike[BOTH]["video_processor"]
    assert not differing(source, caplog, alike)
    (odd,) = differing(source, caplog, alike | LAYOUTS["another family's clips"] | {BOTH: {}})
    assert f"{VIDEO} names a processor" in odd and "bound a frame" in odd and "bound a clip" in odd


def test_no_file_on_clips_at_all(source: Path) -> None:
    """transformers refuses clips then; what its class takes for granted is the nearest to right."""
    write(source, {BOTH: {"image_processor": settings(FAST, 50000)}})
    video = open_checkpoint(source).preprocessor_config().video
    assert (video.rule, video.min_pixels, video.max_pixels) == ("clip", 131072, 786432)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({BOTH: {"image_processor": {}}}, f"{BOTH}: the preprocessor config holds neither"),
        (
            {BOTH: {"video_processor": {}}},
            f"holds no {IMAGE}, nor a {BOTH} with an image_processor",
        ),
        (
            {VIDEO: settings(VIDEOS, 9000, do_resize=False)},
            f"{VIDEO}: of clips, do_resize=false is not supported",
        ),
        ({VIDEO: settings(VIDEOS, 5)}, f"{VIDEO}: of clips, min_pixels 1024 is larger than.* 5"),
        ({VIDEO: {"size": {"shortest_edge": 5}}}, f"{VIDEO}: of clips, .*size.longest_edge"),
        ({VIDEO: {"patch_size": 14}}, f"patch_size 16, of clips {VIDEO} says patch_size 14"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(source: Path, files: Any, said: str) -> None:
    if BOTH not in files:
        write(source, {IMAGE: settings(FAST, 40000)})
    write(source, files)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(source)


def test_limits_that_the_user_gives_need_not_be_in_the_file(source: Path) -> None:
    data = settings(FAST, 1)
    del data["size"]
    write(source, {IMAGE: data, VIDEO: settings(VIDEOS, 90000)})
    with pytest.raises(CheckpointError, match="neither min_pixels nor size.shortest_edge"):
        open_checkpoint(source)
    with pytest.raises(CheckpointError, match="neither min_pixels nor size.shortest_edge"):
        VisionEncoder.from_pretrained(source, device="cpu", max_pixels=80000)
    limits = {"min_pixels": 4096, "max_pixels": 80000}
    encoder = VisionEncoder.from_pretrained(source, device="cpu", **limits)
    assert (encoder.processor.min_pixels, encoder.processor.max_pixels) == (4096, 80000)


def test_extraction_over_another_checkpoint(source: Path, tmp_path: Path) -> None:
    """What lies in the folder already must not speak for the tower that is put there."""
    write(source, {IMAGE: settings(FAST, 40000), VIDEO: settings(VIDEOS, 90000)})
    target = tmp_path / "target"
    target.mkdir()
    write(target, LAYOUTS["nested and flat"])
    written: Checkpoint = open_checkpoint(
        extract_tower(open_checkpoint(source), target, overwrite=True)
    )
    assert written.preprocessor_config() == open_checkpoint(source).preprocessor_config()
    (source / VIDEO).unlink()
    written = open_checkpoint(extract_tower(open_checkpoint(source), target, overwrite=True))
    assert written.preprocessor_config() == open_checkpoint(source).preprocessor_config()
