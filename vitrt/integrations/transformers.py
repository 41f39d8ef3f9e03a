"""vitrt inside transformers: a drop-in for the visual tower, and features in place of pixels.

    accelerate(model)                        # pixels through vitrt, on the model's own weights
    model.generate(**processor(...))
    restore(model)

    accept_features(model)                   # no tower at all: features computed earlier
    inputs = placeholder_inputs(model.config, input_ids, images=[features, ...])
    model.generate(**inputs, **feature_inputs(images=[features, ...]))
    restore(model)

Both replace the model's `visual`. For inference only: neither trains nor saves
a tower.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrt.config import RuntimeConfig
from vitrt.engine.device import dtype_name
from vitrt.engine.engine import Engine
from vitrt.integrations.feature_inputs import feature_inputs, placeholder_inputs
from vitrt.integrations.sharing import SharedWeights, share_weights
from vitrt.integrations.visual_modules import FeatureVisual, ReplacementVisual, VitrtVisual
from vitrt.models.families import read_vision_config

__all__ = ["accelerate", "accept_features", "feature_inputs", "placeholder_inputs", "restore"]

logger = logging.getLogger(__name__)


def accelerate(
    model: nn.Module,
    *,
    attention: str = "auto",
    cuda_graphs: Literal["auto"] | bool = "auto",
    last_hidden_state: bool = True,
) -> SharedWeights:
    """Replace the visual tower of a loaded Qwen2.5-VL or Qwen3-VL model by vitrt, on its weights.

    The model's `visual` gives the same outputs: pooler_output, deepstack_features and
    last_hidden_state. `hidden_states` and `attentions` of the tower are never recorded.

    Args:
        model: loaded, on its device, in its dtype; or a module that holds such a model.
        attention, cuda_graphs: as in `VisionEncoder.from_pretrained`.
        last_hidden_state: `generate` never reads it: False gives None in its place, and saves a
            copy [patches, hidden_size] a forward.

    `model.model.visual.engine.stats()` says what ran how. A compiled model breaks its graph at
    `visual`, which runs as it does without a compiler.

    Returns which tensors are shared with the model and which had to be laid out anew. The model
    keeps its own tower for `restore`.

    Raises ValueError for a model without such a tower, spread over devices, quantised, or already
    changed.
    """
    owner = _owner(model)
    original = owner.visual
    loaded = dict(original.named_parameters())
    device, dtype = _placement(loaded)
    config = read_vision_config(original.config.to_dict())
    tower, weights = share_weights(config, loaded)
    runtime = RuntimeConfig(
        device=str(device),
        dtype=dtype_name(dtype),
        attention=attention,
        cuda_graphs=cuda_graphs,
    )
    owner.visual = VitrtVisual(original, Engine(tower, runtime), last_hidden_state)
    logger.info(
        "%d tensors shared, %d laid out anew in %.1f MiB: %s",
        len(weights.shared),
        len(weights.copied),
        weights.added_bytes / 2**20,
        ", ".join(weights.copied) or "none",
    )
    return weights


def accept_features(model: nn.Module) -> None:
    """Make `model` take `feature_inputs` instead of pixels, until `restore`.

    Raises ValueError for a model without a visual tower, or already changed.
    """
    owner = _owner(model)
    device, dtype = _placement(dict(owner.visual.named_parameters()))
    owner.visual = FeatureVisual(owner.visual, dtype, device)


def restore(model: nn.Module) -> None:
    """Give `model` its own visual tower back. ValueError if it has it."""
    for owner in _owners(model):
        if isinstance(owner.visual, ReplacementVisual):
            owner.visual = owner.visual.original
            return
    raise ValueError(f"{type(model).__name__} has its own visual tower: nothing to restore")


# Where the tower is


def _owners(model: nn.Module) -> list[Any]:
    """The modules that have a visual tower as a child of their own: one, in a loaded model."""
    return [module for module in model.modules() if "visual" in dict(module.named_children())]


def _owner(model: nn.Module) -> Any:
    owners = [owner for owner in _owners(model) if hasattr(owner.visual, "config")]
    if not owners:
        raise ValueError(
            f"{type(model).__name__} has no visual tower; it must be a Qwen2.5-VL or Qwen3-VL model"
        )
    if isinstance(owners[0].visual, ReplacementVisual):
        raise ValueError(f"{type(model).__name__} was changed already: restore(model) first")
    return owners[0]


def _placement(parameters: dict[str, Tensor]) -> tuple[torch.device, torch.dtype]:
    devices = sorted({str(tensor.device) for tensor in parameters.values()})
    dtypes = sorted({str(tensor.dtype) for tensor in parameters.values()})
    floating = all(tensor.is_floating_point() for tensor in parameters.values())
    if len(devices) != 1 or len(dtypes) != 1 or devices == ["meta"] or not floating:
        raise ValueError(
            f"the visual tower is on {', '.join(devices)} in {', '.join(dtypes)}; it must be "
            "loaded on one device in one floating-point dtype"
        )
    first = next(iter(parameters.values()))
    return first.device, first.dtype
