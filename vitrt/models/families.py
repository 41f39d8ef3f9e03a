"""The table of families: nothing outside it and the towers' own files names one.

A checkpoint's `vision_config.model_type` names its tower, wherever in its config.json that lies and
whatever model stands around it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Literal

from vitrt.config import ROPE_THETA, VideoRule, VisionConfig, positive_integer
from vitrt.models.qwen2_5_omni import Qwen25OmniVisionTower
from vitrt.models.qwen2_5_vl import Qwen25VLVisionTower
from vitrt.models.qwen2_vl import Qwen2VLVisionTower
from vitrt.models.qwen3_omni_moe import Qwen3OmniVisionTower
from vitrt.models.qwen3_vl import Qwen3VLVisionTower
from vitrt.models.tower import VisionTower
from vitrt.parallel.context import SINGLE, ParallelContext

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Family:
    """One row: what is particular to the checkpoints of a family."""

    name: str  # what VisionConfig.model_type is
    tower: type[VisionTower]
    reference: str  # its class in transformers.models.NAME.modeling_NAME
    # What a vision_config holds and, where it leaves a key out, means: transformers has written
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
_VISION_SUFFIXES = ("_vision", "_vision_encoder")

# Spellings of any family's files.
_OLD_SPELLINGS = {
    "in_chans": "in_channels",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "depth",
    "spatial_patch_size": "patch_size",
}


def build_tower(config: VisionConfig, parallel: ParallelContext = SINGLE) -> VisionTower:
    """The tower of `config.model_type`, its parameters not yet filled."""
    return family_named(config.model_type).tower(config, parallel)


def family_named(model_type: object) -> Family:
    """The family that a vision_config's `model_type` names. ValueError for an unknown one."""
    if (family := _named(model_type)) is None:
        raise _unsupported("model_type", model_type)
    return family


def _unsupported(key: str, model_type: object) -> ValueError:
    return ValueError(
        f"{key} {model_type!r} is not supported; supported are {', '.join(family_names())}"
    )


def _named(model_type: object) -> Family | None:
    name = str(model_type)
    for suffix in _VISION_SUFFIXES:
        name = name.removesuffix(suffix)
    return _BY_NAME.get(name)


def family_names() -> tuple[str, ...]:
    """The families there are."""
    return tuple(family.name for family in FAMILIES)


def is_tower_type(model_type: object) -> bool:
    """Whether a vision_config of this `model_type` is of a family that there is."""
    return _named(model_type) is not None


def family_of(config: Mapping[str, Any]) -> tuple[Family, Mapping[str, Any]]:
    """The family of a config.json, whole or vision only, and its part that describes the tower.

    Raises ValueError where there is no tower, none of a known family, or several.
    """
    parts = list(_vision_parts(config, "", None))
    known = [(where, family, part) for where, name, part in parts if (family := _named(name))]
    if not known:
        where, name, _ = parts[0] if parts else ("", config.get("model_type"), config)
        if _named(name) is None:
            raise _unsupported(f"{where}.model_type" if where else "model_type", name)
        raise ValueError(
            f"the config of model_type {name!r} holds no vision_config: it has no vision tower"
        )
    where, family, part = known[0]
    others = [place for place, *found in known if found != [family, part]]
    if others:
        raise ValueError(f"the config holds two vision towers: {where} and {others[0]}")
    _note_surroundings(str(config.get("model_type")), family.name)
    return family, part


def _vision_parts(
    data: Mapping[str, Any], where: str, outer: object
) -> Iterator[tuple[str, object, Mapping[str, Any]]]:
    """(place, model_type, keys) of every vision tower in a config, outermost first."""
    own = data.get("model_type")
    named = own or outer
    inside = {key: value for key, value in data.items() if isinstance(value, Mapping)}
    if "vision_config" in data and data["vision_config"] is not None:
        if "vision_config" not in inside:
            raise ValueError(f"vision_config must be an object, got {data['vision_config']!r}")
    elif (
        where.split(".")[-1] == "vision_config"
        or (str(own).endswith(_VISION_SUFFIXES) and _named(own))
        or (not where and "depth" in data)
    ):
        yield where, named, data
        return
    for key, value in inside.items():
        yield from _vision_parts(value, f"{where}.{key}" if where else key, named)


@lru_cache(maxsize=64)  # logged once
def _note_surroundings(outer: str, family: str) -> None:
    if _named(outer.removesuffix("_thinker")) is None:
        logger.info("the tower inside a model of type %s is %s's", outer, family)


def read_vision_config(config: Mapping[str, Any]) -> VisionConfig:
    """The tower of a config.json, whole or vision only, in any released spelling.

    Raises ValueError naming the key that is missing or that no tower of this family can have.
    """
    family, vision = family_of(config)
    values = dict(family.defaults)
    for key, value in vision.items():
        name = _OLD_SPELLINGS.get(key, key)
        if name in values and (name == key or name not in vision):  # the current spelling wins
            values[name] = value
    _check_rope(vision)
    if values["hidden_act"] != family.hidden_act:
        raise ValueError(
            f"hidden_act of {family.name} must be {family.hidden_act!r}, "
            f"got {values['hidden_act']!r}"
        )
    for name, value in values.items():
        if name.endswith("_indexes"):
            values[name] = _indexes(name, value)
        elif name != "hidden_act":
            values[name] = positive_integer(name, value)
    read = {family.spellings.get(name, name): value for name, value in values.items()}
    if "mlp_ratio" in read:
        read["intermediate_size"] = read["hidden_size"] * read.pop("mlp_ratio")
    return VisionConfig(model_type=family.name, **read)


def write_vision_config(config: VisionConfig) -> dict[str, Any]:
    """The vision_config that `read_vision_config` reads back, in the released spelling."""
    family = family_named(config.model_type)
    values = {each.name: getattr(config, each.name) for each in fields(config)}
    values["mlp_ratio"] = config.intermediate_size // config.hidden_size
    written = {name: values[family.spellings.get(name, name)] for name in family.defaults}
    return {"model_type": family.name} | {
        name: list(value) if isinstance(value, tuple) else value for name, value in written.items()
    }


def _check_rope(vision: Mapping[str, Any]) -> None:
    rope = vision.get("rope_parameters") or {}
    theta = rope.get("rope_theta", ROPE_THETA)
    kind = rope.get("rope_type", "axial")
    if theta != ROPE_THETA or kind not in ("axial", "default"):
        raise ValueError(
            f"rope_parameters {dict(rope)!r} are not supported: "
            f"rope_theta must be {ROPE_THETA} and rope_type 'axial'"
        )


def _indexes(name: str, value: Any) -> tuple[int, ...]:
    valid = isinstance(value, Sequence) and all(
        isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in value
    )
    if not valid or list(value) != sorted(set(value)):
        raise ValueError(f"{name} must be an ascending list of layer numbers, got {value!r}")
    return tuple(value)
