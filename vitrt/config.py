"""What a checkpoint says (VisionConfig, PreprocessorConfig) and what the user chose."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

logger = logging.getLogger(__name__)

ROPE_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The shape of a vision tower, as its checkpoint's config.json gives it.

    `vitrt.read_vision_config` reads one.
    """

    model_type: str  # the family's name
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    in_channels: int
    out_hidden_size: int
    hidden_act: str
    window_size: int | None = None  # pixels; None where the family has no windows
    fullatt_block_indexes: tuple[int, ...] = ()
    deepstack_visual_indexes: tuple[int, ...] = ()
    num_position_embeddings: int | None = None  # a square; None where the family has no table

    def __post_init__(self) -> None:
        _check_vision(self)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merge_unit(self) -> int:
        """Patches of one merged token."""
        return self.spatial_merge_size**2

    @property
    def patch_dim(self) -> int:
        """Values of one patch: channels x temporal x rows x columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_cells(self) -> int | None:
        """Merged tokens a side of one attention window; None where there are no windows."""
        if self.window_size is None:
            return None
        return self.window_size // self.spatial_merge_size // self.patch_size


def positive_integer(name: str, value: Any) -> int:
    """A positive integer; a square size may be given as [n, n]."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _check_vision(config: VisionConfig) -> None:
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is not a multiple of num_heads {config.num_heads}"
        )
    if config.head_dim % 8:
        raise ValueError(
            f"hidden_size {config.hidden_size} over num_heads {config.num_heads} gives heads of "
            f"{config.head_dim}; the kernels need a multiple of 8"
        )
    if config.in_channels != 3:
        raise ValueError(
            f"in_channels must be 3 (images are decoded to RGB), got {config.in_channels}"
        )
    if config.temporal_patch_size != 2:
        raise ValueError(f"temporal_patch_size must be 2, got {config.temporal_patch_size}")
    if config.window_cells is not None and config.window_cells < 1:
        raise ValueError(
            f"window_size {config.window_size} is smaller than one merged token of "
            f"{config.spatial_merge_size * config.patch_size} pixels"
        )
    if config.num_position_embeddings is not None:
        side = math.isqrt(config.num_position_embeddings)
        if side * side != config.num_position_embeddings:
            raise ValueError(
                f"num_position_embeddings must be a square, got {config.num_position_embeddings}"
            )
    beyond = [index for index in config.deepstack_visual_indexes if index >= config.depth]
    if beyond:
        raise ValueError(f"deepstack_visual_indexes {beyond} are beyond depth {config.depth}")
    beyond = [index for index in config.fullatt_block_indexes if index >= config.depth]
    if beyond:
        # transformers only asks whether a layer's number is listed: such a checkpoint runs there.
        logger.warning(
            "fullatt_block_indexes %s are beyond depth %d and name no layer", beyond, config.depth
        )


# What a video's pixel limits bound, each frame or the clip as one; by transformers' processors.
VideoRule = Literal["frame", "clip"]
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
    max_video_tokens: int = 0  # what the cap goes by: of the clip, or by the rule "clip" of a frame

    def __post_init__(self) -> None:
        _check_limits(self.min_pixels, self.max_pixels)
        if self.fps is not None and self.num_frames is not None:
            raise ValueError(
                f"fps {self.fps} and num_frames {self.num_frames} exclude each other: give one"
            )
        if self.min_frames > self.max_frames:
            raise ValueError(
                f"min_frames {self.min_frames} is larger than max_frames {self.max_frames}"
            )

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
            **_sampling(values),
        )


_SAMPLING = ("fps", "num_frames", "min_frames", "max_frames")


def _sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of settings: fps, num_frames, min_frames, max_frames, where they say something of them."""
    found: dict[str, Any] = {
        name: positive_integer(name, values[name])
        for name in _SAMPLING[1:]
        if values.get(name) is not None
    }
    if (fps := values.get("fps")) is not None:
        if not isinstance(fps, int | float) or isinstance(fps, bool) or not fps > 0:
            raise ValueError(f"fps must be a number above 0, got {fps!r}")
        found["fps"] = float(fps)
    elif "num_frames" in found:
        found["fps"] = None
    return found


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
        _check_limits(self.min_pixels, self.max_pixels)

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


def _check_limits(low: int, high: int) -> None:
    if low > high:
        raise ValueError(f"min_pixels {low} is larger than max_pixels {high}")


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
        numbers = [value for value in values if isinstance(value, int | float)]
        if len(numbers) == 3 and (name != "image_std" or min(numbers) > 0):
            return float(numbers[0]), float(numbers[1]), float(numbers[2])
    raise ValueError(f"{name} must be three numbers, of image_std above 0, got {values!r}")


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """What the user chose. The CLI takes its defaults from these fields."""

    device: str = "auto"  # "cuda" where there is one, else "cpu"
    dtype: str = "auto"  # bfloat16 on an accelerator, float32 on the CPU
    attention: str = "auto"  # a registered backend
    cuda_graphs: Literal["auto"] | bool = "auto"
    min_pixels: int | None = None  # None: what the checkpoint says
    max_pixels: int | None = None
    video_min_pixels: int | None = (
        None  # of a clip, counted as the checkpoint's video processor does
    )
    video_max_pixels: int | None = None
    fps: float | None = None  # frames of a video taken a second; None: as the checkpoint says
    num_frames: int | None = None  # the same in all
    min_frames: int | None = None  # bounds of what fps gives
    max_frames: int | None = None
    frames: Literal["first", "all"] = "first"  # frames of an animated GIF, WebP or PNG
    max_batch_tokens: int | None = None  # patches of one forward; None: chosen from free memory
    resize: Literal["pillow", "torch"] = "pillow"  # or "torch": whose bicubic, bit for bit
    graph_memory_mib: float = 4096.0
    precision: Literal["auto", "fp8"] = "auto"  # of the blocks' products; "auto": the dtype's own
    fp8_skip_blocks: int = 3  # first blocks that stay in the dtype: massive channels arise there
    batch_invariant: bool = False  # an image's features are the same bits whatever is beside it

    def __post_init__(self) -> None:
        if self.dtype not in (dtypes := ("auto", "float32", "bfloat16", "float16")):
            raise ValueError(f"dtype must be one of {', '.join(dtypes)}, got {self.dtype!r}")
        if self.cuda_graphs not in ("auto", True, False):
            raise ValueError(f'cuda_graphs must be "auto", True or False, got {self.cuda_graphs!r}')
        if self.precision not in ("auto", "fp8"):
            raise ValueError(f'precision must be "auto" or "fp8", got {self.precision!r}')
        if self.batch_invariant and self.precision == "fp8":
            raise ValueError(
                'batch_invariant with precision "fp8" cannot be had: small batches stay in the '
                "dtype; choose one of the two"
            )
        if self.fp8_skip_blocks < 0:
            raise ValueError(f"fp8_skip_blocks must not be negative, got {self.fp8_skip_blocks}")
        if self.resize not in ("pillow", "torch"):
            raise ValueError(f'resize must be "pillow" or "torch", got {self.resize!r}')
        limits = ("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels")
        for name in (*limits, "max_batch_tokens"):
            if (value := getattr(self, name)) is not None:
                positive_integer(name, value)
        for low, high in (limits[:2], limits[2:]):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{low} {least} is larger than {high} {most}")
        sampling = self.sampling()
        if self.fps is not None and self.num_frames is not None:
            raise ValueError(f"fps {self.fps} and num_frames {self.num_frames} exclude each other")
        least, most = sampling.get("min_frames", 0), sampling.get("max_frames", math.inf)
        if least > most:
            raise ValueError(f"min_frames {least} is larger than max_frames {most}")
        if self.frames not in ("first", "all"):
            raise ValueError(f'frames must be "first" or "all", got {self.frames!r}')
        if not self.graph_memory_mib >= 0:
            raise ValueError(
                f"graph_memory_mib must not be negative, got {self.graph_memory_mib!r}"
            )

    def sampling(self) -> dict[str, Any]:
        """The fields of a VideoConfig that the user chose in place of the checkpoint's."""
        chosen = _sampling({name: getattr(self, name) for name in _SAMPLING})
        return {"num_frames": None, **chosen} if "fps" in chosen else chosen
