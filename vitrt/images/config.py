"""What a checkpoint's processor files say of how images and clips become patches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitrt.config import (
    VideoRule,
    check_order,
    check_sampling,
    is_number,
    positive_integer,
    sampling_of,
)

# The rule of each video processor of transformers.
_VIDEO_RULES: dict[str, VideoRule] = {
    "Qwen2VLVideoProcessor": "frame",
    "Qwen3VLVideoProcessor": "clip",
}
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_VIDEO_DEFAULTS: dict[str, dict[str, Any]] = {  # where the checkpoint's file says nothing
    "frame": {
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
        "max_video_tokens": 128_000,
    },
    "clip": {
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "max_video_tokens": 768,
    },
}


@dataclass(frozen=True, slots=True)
class VideoConfig:
    """What a checkpoint's video processor says about the size and the levels of a clip's frames."""

    rule: VideoRule
    min_pixels: int  # areas: of a frame, or of all frames together, as `rule` says
    max_pixels: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    cap_pixels_per_frame: bool = False
    # Frames of a video that are looked at: so many, or so many a second within bounds.
    fps: float | None = 2.0  # None: all, within the bounds
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    max_video_tokens: int = 0  # the cap: of the clip, or under the rule "clip" of each frame

    def __post_init__(self) -> None:
        check_order(self, "min_pixels", "max_pixels")
        check_sampling(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], family_rule: VideoRule) -> VideoConfig:
        """From a video processor's settings, or from the image processor's where there are none.

        As transformers does it, the class that the settings name chooses the rule, else the model
        family, and what they leave out is what that class has. Raises ValueError naming the key.
        """
        _check_steps(data)
        rule = video_rule(data) or family_rule
        values = dict(_VIDEO_DEFAULTS[rule])
        values |= {key: value for key, value in data.items() if value is not None}
        if rule == "clip":  # its processor does not know the old names
            values = {key: values[key] for key in values if key not in ("min_pixels", "max_pixels")}
        return cls(
            rule=rule,
            min_pixels=_pixel_limit(values, "min_pixels", "shortest_edge"),
            max_pixels=_pixel_limit(values, "max_pixels", "longest_edge"),
            image_mean=_channels(values, "image_mean"),
            image_std=_channels(values, "image_std"),
            cap_pixels_per_frame=bool(values.get("cap_pixels_per_frame", False)),
            max_video_tokens=positive_integer("max_video_tokens", values["max_video_tokens"]),
            **sampling_of(values),
        )


def video_rule(data: Mapping[str, Any]) -> VideoRule | None:
    """The rule of the processor class that the settings name; None where they name no known one."""
    named = data.get("video_processor_type")
    if named is None:  # transformers goes on to the image processor's name
        named = str(data.get("image_processor_type")).replace("ImageProcessor", "VideoProcessor")
    return _VIDEO_RULES.get(named)


@dataclass(frozen=True, slots=True)
class PreprocessorConfig:
    """What a checkpoint's processor files say about turning images and clips into patches."""

    min_pixels: int  # areas
    max_pixels: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    video: VideoConfig | None = None  # None: clips as images, frame by frame

    def __post_init__(self) -> None:
        check_order(self, "min_pixels", "max_pixels")

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        video: Mapping[str, Any] | None = None,
        video_rule: VideoRule = "frame",
    ) -> PreprocessorConfig:
        """From the settings of an image processor and of a video processor.

        The pixel limits are `min_pixels` / `max_pixels` where they are given, else
        `size.shortest_edge` / `size.longest_edge`; those of images have no defaults. `video_rule`
        is the model family's. Raises ValueError naming the key.
        """
        data = data.get("image_processor") or data
        _check_steps(data)
        return cls(
            min_pixels=_pixel_limit(data, "min_pixels", "shortest_edge"),
            max_pixels=_pixel_limit(data, "max_pixels", "longest_edge"),
            image_mean=_channels(data, "image_mean"),
            image_std=_channels(data, "image_std"),
            patch_size=_required(data, "patch_size"),
            temporal_patch_size=_required(data, "temporal_patch_size"),
            merge_size=_required(data, "merge_size"),
            video=None if video is None else VideoConfig.from_dict(video, video_rule),
        )


def _check_steps(data: Mapping[str, Any]) -> None:
    """ValueError for settings that leave out or change a step that is always done here."""
    for switch in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if data.get(switch) is False:
            raise ValueError(f"{switch}=false is not supported")
    rescale = data.get("rescale_factor", 1 / 255)
    if not isinstance(rescale, int | float) or not math.isclose(rescale, 1 / 255, rel_tol=1e-6):
        raise ValueError(f"rescale_factor must be 1/255, got {rescale!r}")
    if data.get("resample", 3) != 3:
        raise ValueError(f"resample must be 3 (bicubic), got {data['resample']!r}")


def _required(data: Mapping[str, Any], name: str) -> int:
    if data.get(name) is None:
        raise ValueError(f"the preprocessor config holds no {name}")
    return positive_integer(name, data[name])


def _pixel_limit(data: Mapping[str, Any], name: str, edge: str) -> int:
    size = data.get("size")
    sizes = size if isinstance(size, Mapping) else {}
    for value in (data.get(name), sizes.get(edge), sizes.get(name)):
        if value is not None:
            return positive_integer(name, value)
    raise ValueError(f"the preprocessor config holds neither {name} nor size.{edge}")


def _channels(data: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    values = data.get(name)
    if isinstance(values, list | tuple) and len(values) == 3:
        numbers = [value for value in values if is_number(value)]
        if len(numbers) == 3 and (name != "image_std" or min(numbers) > 0):
            return float(numbers[0]), float(numbers[1]), float(numbers[2])
    raise ValueError(f"{name} must be three numbers, of image_std above 0, got {values!r}")
