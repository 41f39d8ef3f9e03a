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


@dataclass(frozen=True, slots=True)
class PreprocessorConfig:
    """What a checkpoint's preprocessor_config.json says about turning images into patches."""

    min_pixels: int  # areas
    max_pixels: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    patch_size: int
    temporal_patch_size: int
    merge_size: int

    def __post_init__(self) -> None:
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}"
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PreprocessorConfig:
        """From preprocessor_config.json, or the `image_processor` part of processor_config.json.

        The pixel limits are `min_pixels` / `max_pixels` where they are given, else
        `size.shortest_edge` / `size.longest_edge`; they have no defaults. Raises ValueError naming
        the key.
        """
        data = data.get("image_processor") or data
        for switch in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if data.get(switch) is False:
                raise ValueError(f"{switch}=false is not supported")
        rescale = data.get("rescale_factor", 1 / 255)
        if not isinstance(rescale, int | float) or not math.isclose(rescale, 1 / 255, rel_tol=1e-6):
            raise ValueError(f"rescale_factor must be 1/255, got {rescale!r}")
        if data.get("resample", 3) != 3:
            raise ValueError(f"resample must be 3 (bicubic), got {data['resample']!r}")
        return cls(
            min_pixels=_pixel_limit(data, "min_pixels", "shortest_edge"),
            max_pixels=_pixel_limit(data, "max_pixels", "longest_edge"),
            image_mean=_channels(data, "image_mean"),
            image_std=_channels(data, "image_std"),
            patch_size=_required(data, "patch_size"),
            temporal_patch_size=_required(data, "temporal_patch_size"),
            merge_size=_required(data, "merge_size"),
        )


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
    max_batch_tokens: int | None = None  # patches of one forward; None: chosen from free memory
    resize: Literal["pillow", "torch"] = "pillow"  # or "torch": whose bicubic, bit for bit
    graph_memory_mib: float = 4096.0
    precision: Literal["auto", "fp8"] = "auto"  # of the blocks' products; "auto": the dtype's own
    fp8_skip_blocks: int = 3  # first blocks that stay in the dtype: massive channels arise there

    def __post_init__(self) -> None:
        if self.dtype not in (dtypes := ("auto", "float32", "bfloat16", "float16")):
            raise ValueError(f"dtype must be one of {', '.join(dtypes)}, got {self.dtype!r}")
        if self.cuda_graphs not in ("auto", True, False):
            raise ValueError(f'cuda_graphs must be "auto", True or False, got {self.cuda_graphs!r}')
        if self.precision not in ("auto", "fp8"):
            raise ValueError(f'precision must be "auto" or "fp8", got {self.precision!r}')
        if self.fp8_skip_blocks < 0:
            raise ValueError(f"fp8_skip_blocks must not be negative, got {self.fp8_skip_blocks}")
        if self.resize not in ("pillow", "torch"):
            raise ValueError(f'resize must be "pillow" or "torch", got {self.resize!r}')
        for name in ("min_pixels", "max_pixels", "max_batch_tokens"):
            if (value := getattr(self, name)) is not None:
                positive_integer(name, value)
        if (
            self.min_pixels is not None
            and self.max_pixels is not None
            and self.min_pixels > self.max_pixels
        ):
            raise ValueError(
                f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}"
            )
        if not self.graph_memory_mib >= 0:
            raise ValueError(
                f"graph_memory_mib must not be negative, got {self.graph_memory_mib!r}"
            )
