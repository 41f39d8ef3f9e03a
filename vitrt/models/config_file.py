"""A config.json's account of its tower, read from any model's file and written back.

A checkpoint's `vision_config.model_type` names its tower, wherever in its config.json that lies and
whatever model stands around it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any

from vitrt.config import ROPE_THETA, VisionConfig, is_integer, positive_integer
from vitrt.models.families import VISION_SUFFIXES, Family, family_named, find_family, unsupported

logger = logging.getLogger(__name__)

# Spellings of any family's files.
_OLD_SPELLINGS = {
    "in_chans": "in_channels",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "depth",
    "spatial_patch_size": "patch_size",
}


def family_of(config: Mapping[str, Any]) -> tuple[Family, Mapping[str, Any]]:
    """The family of a config.json, whole or vision only, and its part that describes the tower.

    Raises ValueError where there is no tower, none of a known family, or several.
    """
    parts = list(_vision_parts(config, "", None))
    known = [(where, family, part) for where, name, part in parts if (family := find_family(name))]
    if not known:
        where, name, _ = parts[0] if parts else ("", config.get("model_type"), config)
        if find_family(name) is None:
            raise unsupported(f"{where}.model_type" if where else "model_type", name)
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
        or (str(own).endswith(VISION_SUFFIXES) and find_family(own))
        or (not where and "depth" in data)
    ):
        yield where, named, data
        return
    for key, value in inside.items():
        yield from _vision_parts(value, f"{where}.{key}" if where else key, named)


@lru_cache(maxsize=64)  # logged once
def _note_surroundings(outer: str, family: str) -> None:
    if find_family(outer.removesuffix("_thinker")) is None:
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
    valid = isinstance(value, Sequence) and all(is_integer(index) and index >= 0 for index in value)
    if not valid or list(value) != sorted(set(value)):
        raise ValueError(f"{name} must be an ascending list of layer numbers, got {value!r}")
    return tuple(value)
