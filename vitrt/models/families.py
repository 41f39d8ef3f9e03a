"""The table of families: nothing outside it and the towers' own files names one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vitrt.config import VideoRule, VisionConfig
from vitrt.models.qwen2_5_omni import Qwen25OmniVisionTower
from vitrt.models.qwen2_5_vl import Qwen25VLVisionTower
from vitrt.models.qwen2_vl import Qwen2VLVisionTower
from vitrt.models.qwen3_omni_moe import Qwen3OmniVisionTower
from vitrt.models.qwen3_vl import Qwen3VLVisionTower
from vitrt.models.tower import VisionTower
from vitrt.parallel.context import SINGLE, ParallelContext


@dataclass(frozen=True, slots=True)
class Family:
    """One row: what is particular to the checkpoints of a family."""

    name: str  # what VisionConfig.model_type is
    tower: type[VisionTower]
    reference: str  # its class in transformers.models.NAME.modeling_NAME
    # The keys of a vision_config, and what one that is left out means: transformers has written
    # files that hold only what differs from its own defaults, so these are part of the format.
    defaults: Mapping[str, Any]
    prefix: str  # of the tower's weights as released
    video_rule: VideoRule  # what the pixel limits of a video bound
    clip_tokens: Literal["run", "frames"]  # of a clip in a prompt: one run, or one for each frame
    token_types: bool = True  # whether its language model takes mm_token_type_ids
    spellings: Mapping[str, str] = field(default_factory=dict)  # its key -> field of VisionConfig

    @property
    def hidden_act(self) -> str:
        return str(self.defaults["hidden_act"])


_COMMON: dict[str, Any] = {
    "depth": 32,
    "num_heads": 16,
    "patch_size": 14,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    tower=Qwen25VLVisionTower,
    reference="Qwen2_5_VisionTransformerPretrainedModel",
    defaults=_COMMON
    | {
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "hidden_act": "silu",
        "window_size": 112,
        "fullatt_block_indexes": (7, 15, 23, 31),
        "out_hidden_size": 3584,
    },
    prefix="visual.",
    video_rule="frame",
    clip_tokens="run",
)
QWEN3_VL = Family(
    name="qwen3_vl",
    tower=Qwen3VLVisionTower,
    reference="Qwen3VLVisionModel",
    defaults=_COMMON
    | {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "hidden_act": "gelu_pytorch_tanh",
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": (8, 16, 24),
        "out_hidden_size": 3584,
    },
    prefix="model.visual.",
    video_rule="clip",
    clip_tokens="frames",
)
QWEN3_5 = replace(
    QWEN3_VL,
    name="qwen3_5",
    reference="Qwen3_5VisionModel",
    defaults={**QWEN3_VL.defaults, "deepstack_visual_indexes": ()},
)
FAMILIES = (
    Family(
        name="qwen2_vl",
        tower=Qwen2VLVisionTower,
        reference="Qwen2VisionTransformerPretrainedModel",
        defaults=_COMMON
        | {"embed_dim": 1280, "mlp_ratio": 4, "hidden_act": "quick_gelu", "hidden_size": 3584},
        prefix="visual.",
        video_rule="frame",
        clip_tokens="run",
        spellings={"embed_dim": "hidden_size", "hidden_size": "out_hidden_size"},
    ),
    QWEN2_5_VL,
    replace(
        QWEN2_5_VL,
        name="qwen2_5_omni",
        tower=Qwen25OmniVisionTower,
        reference="Qwen2_5OmniVisionEncoder",
        prefix="thinker.visual.",
        token_types=False,
    ),
    QWEN3_VL,
    replace(QWEN3_VL, name="qwen3_vl_moe", reference="Qwen3VLMoeVisionModel"),
    replace(
        QWEN3_VL,
        name="qwen3_omni_moe",
        tower=Qwen3OmniVisionTower,
        reference="Qwen3OmniMoeVisionEncoder",
        prefix="thinker.visual.",
        token_types=False,
        video_rule="frame",
        clip_tokens="run",
    ),
    QWEN3_5,
    replace(QWEN3_5, name="qwen3_5_moe", reference="Qwen3_5MoeVisionModel"),
    replace(QWEN3_5, name="qwen4_exp", reference="Qwen4ExpVisionModel"),
)
_BY_NAME = {family.name: family for family in FAMILIES}
_BY_NAME["cohere_compass"] = QWEN3_VL  # the very same tower under another name
VISION_SUFFIXES = ("_vision", "_vision_encoder")


def build_tower(config: VisionConfig, parallel: ParallelContext = SINGLE) -> VisionTower:
    """The tower of `config.model_type`, its parameters not yet filled."""
    return family_named(config.model_type).tower(config, parallel)


def family_named(model_type: object) -> Family:
    """The family that a vision_config's `model_type` names. ValueError for an unknown one."""
    if (family := find_family(model_type)) is None:
        raise unsupported("model_type", model_type)
    return family


def unsupported(key: str, model_type: object) -> ValueError:
    """The error about a `model_type` that no family has, found under `key` of a config."""
    return ValueError(
        f"{key} {model_type!r} is not supported; supported are {', '.join(family_names())}"
    )


def find_family(model_type: object) -> Family | None:
    """The family that a vision_config's `model_type` names; None for an unknown one."""
    name = str(model_type)
    for suffix in VISION_SUFFIXES:
        name = name.removesuffix(suffix)
    return _BY_NAME.get(name)


def family_names() -> tuple[str, ...]:
    """The families there are."""
    return tuple(family.name for family in FAMILIES)
