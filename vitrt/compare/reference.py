"""The towers under test: which one a name means, its random weights, and its checkpoint on disk.

Both contenders hold the same weights: the state dict of transformers' module is written as a
checkpoint in the released format, and vitrt loads that the way it loads any other.
"""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from vitrt.checkpoint.opened import Checkpoint, named_folder, open_checkpoint
from vitrt.config import VisionConfig
from vitrt.models.config_file import read_vision_config, write_vision_config
from vitrt.models.families import family_named

# Beside the package in an installation, beside its folder in a checkout.
CONFIG_FOLDERS = tuple(parent / "configs" for parent in Path(__file__).resolve().parents[1:3])


@dataclass(frozen=True, slots=True)
class NamedModel:
    """What a model's name on the command line stands for."""

    name: str
    config: VisionConfig
    checkpoint: Checkpoint | None  # None: random weights


def find_model(model: str, *, tiny: bool = False, weights: bool = True) -> NamedModel:
    """A checkpoint's folder or hub id, a config.json or its folder, or a size ("qwen3-vl-8b").

    Without weights beside the config they are random; `tiny` shrinks the tower and makes them so.
    Without `weights` a hub id's are not fetched.
    """
    path = named_folder(model)
    folders = (path, *(folder / model for folder in CONFIG_FOLDERS))
    file = next((f / "config.json" for f in folders if (f / "config.json").is_file()), path)
    name = path.parent.name if path.suffix == ".json" else path.name
    if not file.is_file() and "/" not in model:
        raise ValueError(
            f"{model!r} is no file, no folder, no hub id (owner/name) and no released size; "
            f"the sizes are {', '.join(released_sizes())}"
        )
    if not file.is_file() or any(file.parent.glob("*.safetensors")):
        checkpoint = open_checkpoint(str(file.parent) if file.is_file() else model, weights=weights)
        config = checkpoint.vision_config()
    else:
        checkpoint = None
        config = read_vision_config(json.loads(file.read_text()))
    if tiny:
        return NamedModel(f"{name} (tiny)", shrink(config), None)
    return NamedModel(name, config, checkpoint)


def released_sizes() -> list[str]:
    """The names of the configs that come with the package."""
    return sorted(
        {file.parent.name for folder in CONFIG_FOLDERS for file in folder.glob("*/config.json")}
    )


def shrink(config: VisionConfig) -> VisionConfig:
    """A tower of the same kind and head size that a CPU runs in milliseconds."""
    windows = config.window_size is not None
    return replace(
        config,
        depth=3,
        num_heads=2,
        hidden_size=2 * config.head_dim,
        intermediate_size=config.intermediate_size // 16,
        out_hidden_size=64,
        fullatt_block_indexes=(1,) if windows else (),
        deepstack_visual_indexes=(0, 1) if config.deepstack_visual_indexes else (),
    )


def build_tower(model: NamedModel, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """transformers' own tower with the model's weights."""
    tower = empty_tower(model.config, device=device, dtype=dtype)
    if model.checkpoint is None:
        _randomise(tower)
    else:
        tensors = model.checkpoint.tower_tensors()
        tower.load_state_dict({name: tensor[...] for name, tensor in tensors})
    return tower


def empty_tower(config: VisionConfig, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """transformers' tower, built as its own loader builds it: rotary frequencies stay float32."""
    # Not every release exports the towers at its top level.
    family = family_named(config.model_type)
    module = importlib.import_module(f"transformers.models.{family.name}.modeling_{family.name}")
    tower_class = getattr(module, family.reference)
    tower_config = tower_class.config_class(**write_vision_config(config))
    with torch.device(device):
        tower = tower_class._from_config(tower_config, dtype=dtype, attn_implementation="sdpa")
    return tower.eval().requires_grad_(False)


def float32_copy(tower: nn.Module, config: VisionConfig) -> nn.Module:
    """The reference: the same weights, every operation in float32."""
    device = next(tower.parameters()).device
    copy = empty_tower(config, device=device, dtype=torch.float32)
    copy.load_state_dict(tower.state_dict())
    return copy


def save_checkpoint(tower: nn.Module, model: NamedModel, folder: Path) -> Path:
    """The tower's weights as a vision-only checkpoint in the released format."""
    family = family_named(model.config.model_type)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": family.name, "vision_config": write_vision_config(model.config)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(
        json.dumps(_preprocessor(model.config), indent=2) + "\n"
    )
    weights = {
        family.prefix + name: tensor.contiguous() for name, tensor in tower.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _preprocessor(config: VisionConfig) -> dict[str, Any]:
    factor = config.patch_size * config.spatial_merge_size
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": factor**2, "longest_edge": 16384 * factor**2},
        "patch_size": config.patch_size,
        "temporal_patch_size": config.temporal_patch_size,
        "merge_size": config.spatial_merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def _randomise(tower: nn.Module) -> None:
    """Activations near 1 and attention scores apart, so that the error of every layer shows."""
    generator = torch.Generator(next(tower.parameters()).device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            parameter.normal_(generator=generator)
            if name.endswith("bias"):
                parameter.mul_(0.1)
            elif parameter.dim() == 1:
                parameter.mul_(0.1).add_(1.0)
            elif "pos_embed" in name:
                parameter.mul_(0.5)
            else:
                parameter.mul_(1 / math.sqrt(parameter[0].numel()))
