"""vitrt inside transformers: a drop-in for the visual tower, and features in place of pixels.

    accelerate(model)                        # pixels through vitrt, on the model's own weights
    model.generate(**processor(...))
    restore(model)

    accept_features(model)                   # no tower at all: features computed earlier
    inputs = placeholder_inputs(model.config, input_ids, images=[features, ...])
    model.generate(**inputs, **feature_inputs(images=[features, ...]))
    restore(model)

Both replace the model's tower, which may lie deep inside what is given (a SentenceTransformer, a
retrieval model). For inference only: neither trains nor saves a tower.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrt.config import RuntimeConfig
from vitrt.engine.device import dtype_name
from vitrt.engine.engine import Engine
from vitrt.integrations.feature_inputs import feature_inputs, placeholder_inputs
from vitrt.integrations.sharing import SharedWeights, share_weights
from vitrt.integrations.visual_modules import FeatureVisual, ReplacementVisual, VitrtVisual
from vitrt.models.config_file import read_vision_config
from vitrt.models.families import family_names, find_family

__all__ = ["accelerate", "accept_features", "feature_inputs", "placeholder_inputs", "restore"]

logger = logging.getLogger(__name__)


def accelerate(
    model: nn.Module,
    *,
    attention: str = "auto",
    cuda_graphs: Literal["auto"] | bool = "auto",
    last_hidden_state: bool = True,
) -> SharedWeights:
    """Replace the visual tower of a loaded Qwen-VL model by vitrt, on its weights.

    It is found wherever it lies in `model`. What takes its place gives the same outputs:
    pooler_output, deepstack_features and last_hidden_state. `hidden_states` and `attentions` of the
    tower are never recorded.

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
    place = _find(model)
    original = place.tower
    loaded = dict(original.named_parameters())
    device, dtype = _placement(loaded)
    config = read_vision_config(original.config.to_dict())
    tower, weights = share_weights(config, loaded)
    runtime = RuntimeConfig(
        device=str(device), dtype=dtype_name(dtype), attention=attention, cuda_graphs=cuda_graphs
    )
    place.put(VitrtVisual(original, Engine(tower, runtime), last_hidden_state))
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
    place = _find(model)
    device, dtype = _placement(dict(place.tower.named_parameters()))
    place.put(FeatureVisual(place.tower, dtype, device))


def restore(model: nn.Module) -> None:
    """Give `model` its own visual tower back. ValueError if it has it."""
    for place in _places(model):
        if isinstance(place.tower, ReplacementVisual):
            place.put(place.tower.original)
            return
    raise ValueError(f"{type(model).__name__} has its own visual tower: nothing to restore")


# Where the tower is


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in a model a visual tower, or what stands in for one, lies."""

    parent: nn.Module
    path: str

    @property
    def tower(self) -> Any:
        return getattr(self.parent, self.path.rpartition(".")[2])

    def put(self, tower: nn.Module) -> None:
        setattr(self.parent, self.path.rpartition(".")[2], tower)


def _places(model: nn.Module) -> list[_Place]:
    """Every tower below `model`, however deep and under whatever name, each once."""
    return [
        _Place(model.get_submodule(path.rpartition(".")[0]), path)
        for path, module in model.named_modules()
        if path and (isinstance(module, ReplacementVisual) or _is_tower(module))
    ]


def _is_tower(module: nn.Module) -> bool:
    """Whether it has a tower's parts, and a config that says so."""
    parts = {name for name, _ in module.named_children()}
    if not {"patch_embed", "blocks", "merger"} <= parts or not hasattr(module, "config"):
        return False
    return find_family(getattr(module.config, "model_type", None)) is not None


def _find(model: nn.Module) -> _Place:
    places = _places(model)
    if not places:
        raise ValueError(
            f"{type(model).__name__} holds no visual tower of {', '.join(family_names())}"
        )
    if len(places) > 1:
        paths = ", ".join(place.path for place in places)
        raise ValueError(f"{type(model).__name__} holds more than one visual tower: {paths}")
    if isinstance(places[0].tower, ReplacementVisual):
        raise ValueError(f"{type(model).__name__} was changed already: restore(model) first")
    return places[0]


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
