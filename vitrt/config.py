"""What a checkpoint says of its tower (VisionConfig), and what the user chose (RuntimeConfig)."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

logger = logging.getLogger(__name__)

ROPE_THETA = 10000.0

Grid = tuple[int, int, int]  # of an image or a clip: frames, rows, columns in patches


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
    if isinstance(value, list | tuple) and value and value == type(value)(value[:1] * len(value)):
        value = value[0]
    if not is_integer(value) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def is_integer(value: object) -> bool:
    """Whether it is a whole number; True and False are none, though Python counts with them."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number; True and False are none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value)


def check_choices(config: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """ValueError where a field has none of its `choices`."""
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(
                f"{name} must be one of {', '.join(known)}, got {getattr(config, name)!r}"
            )


def check_flags(config: Any, *names: str) -> None:
    """ValueError where one of these fields is neither True nor False: "no" would count as True."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} must be True or False, got {getattr(config, name)!r}")


def integer(value: Any) -> int:
    """A whole number of any type, numpy's say, as an int. TypeError for others and for booleans."""
    if isinstance(value, bool):
        raise TypeError(f"{value} is no number")
    return operator.index(value)


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


# What a video's pixel limits bound: each frame, or the clip as one.
VideoRule = Literal["frame", "clip"]

# Which frames of a video are looked at: names that the checkpoint and the user share.
SAMPLING = ("fps", "num_frames", "min_frames", "max_frames")


def check_order(config: Any, least: str, most: str) -> None:
    """ValueError where the field `least` is larger than the field `most`; None bounds nothing."""
    low, high = getattr(config, least), getattr(config, most)
    if low is not None and high is not None and low > high:
        raise ValueError(f"{least} {low} is larger than {most} {high}")


def check_sampling(config: Any) -> None:
    """ValueError for frames of a video that are chosen in two ways, or out of bounds that cross."""
    if config.fps is not None and config.num_frames is not None:
        raise ValueError(
            f"fps {config.fps} and num_frames {config.num_frames} exclude each other: give one"
        )
    check_order(config, "min_frames", "max_frames")


def sampling_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of fps, num_frames, min_frames and max_frames that some settings give, checked."""
    found: dict[str, Any] = {
        name: positive_integer(name, values[name])
        for name in SAMPLING[1:]
        if values.get(name) is not None
    }
    if (fps := values.get("fps")) is not None:
        if not is_number(fps) or not fps > 0:
            raise ValueError(f"fps must be a finite number above 0, got {fps!r}")
        found["fps"] = float(fps)
    elif "num_frames" in found:
        found["fps"] = None
    return found


_CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "frames": ("first", "all"),
    "resize": ("pillow", "torch"),
    "precision": ("auto", "fp8"),
}


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """What the user chose. The CLI takes its defaults from these fields."""

    device: str = "auto"  # "cuda" where there is one, else "cpu"
    dtype: str = "auto"  # bfloat16 on an accelerator, float32 on the CPU
    attention: str = "auto"  # a registered backend
    cuda_graphs: Literal["auto"] | bool = "auto"
    min_pixels: int | None = None  # None: what the checkpoint says
    max_pixels: int | None = None
    video_min_pixels: int | None = None  # of a clip, as the checkpoint's video processor counts
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
        check_choices(self, _CHOICES)
        check_flags(self, "batch_invariant")
        if self.cuda_graphs != "auto" and not isinstance(self.cuda_graphs, bool):
            raise ValueError(f'cuda_graphs must be "auto", True or False, got {self.cuda_graphs!r}')
        if self.batch_invariant and self.precision == "fp8":
            raise ValueError(
                'batch_invariant with precision "fp8" cannot be had: small batches stay in the '
                "dtype; choose one of the two"
            )
        limits = ("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels")
        for name in (*limits, "max_batch_tokens"):
            if (value := getattr(self, name)) is not None:
                positive_integer(name, value)
        check_order(self, *limits[:2])
        check_order(self, *limits[2:])
        self.sampling()
        check_sampling(self)
        if not is_integer(self.fp8_skip_blocks) or self.fp8_skip_blocks < 0:
            raise ValueError(
                f"fp8_skip_blocks must be an integer from 0 on, got {self.fp8_skip_blocks!r}"
            )
        if not is_number(self.graph_memory_mib) or self.graph_memory_mib < 0:
            raise ValueError(
                f"graph_memory_mib must be a number from 0 on, got {self.graph_memory_mib!r}"
            )

    def sampling(self) -> dict[str, Any]:
        """The fields of a VideoConfig that the user chose in place of the checkpoint's."""
        chosen = sampling_of({name: getattr(self, name) for name in SAMPLING})
        return {"num_frames": None, **chosen} if "fps" in chosen else chosen
