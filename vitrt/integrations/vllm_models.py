"""vLLM's model classes with another `visual`; imported by vLLM alone, once it needs a model.

`vllm_models.<Architecture>` is vLLM's class of that name, derived from when first asked for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vitrt.config import VisionConfig
from vitrt.integrations.engine_plugin import read_arguments, refuse_quantised, tower_replaced
from vitrt.integrations.engine_tower import EngineTower
from vitrt.integrations.vllm import ARCHITECTURES, dtype_and_device, logger
from vitrt.models.config_file import read_vision_config

# What vLLM makes its towers with.
TOWER_ARGUMENTS = ("vision_config", "norm_eps", "quant_config", "prefix", "input_norm")
_OPTIONS = ("attention", "cuda_graphs", "max_patches", "graph_memory_mib")


def __getattr__(name: str) -> type[nn.Module]:
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _model_class(name)


@cache
def _model_class(architecture: str) -> type[nn.Module]:
    module_name, tower_name = ARCHITECTURES[architecture]
    module = importlib.import_module(f"vllm.model_executor.models.{module_name}")
    base = getattr(module, architecture)
    if not hasattr(module, tower_name):
        logger.warning("vLLM's own vision tower runs: %s has no %s", module.__name__, tower_name)
        return base
    members = {
        "__module__": __name__,
        "__doc__": f"vLLM's {architecture} with vitrt's vision tower.",
        "_tower_name": tower_name,
    }
    return type(architecture, (_WithVitrtTower, base), members)


class _WithVitrtTower:
    """What is mixed into a model class of vLLM, before it."""

    _tower_name: str

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        base = type(self).__mro__[2]
        module = sys.modules[base.__module__]
        make = _tower_maker(vllm_config)
        with tower_replaced(module, self._tower_name, make, "vLLM", logger):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        visual = self.visual  # type: ignore[attr-defined]
        if isinstance(visual, VllmTower) and vllm_config.parallel_config.tensor_parallel_size > 1:
            # Every rank holds the whole tower and encodes its share of the images, which is what
            # vLLM itself does for this: mm_encoder_tp_mode="data".
            self.use_data_parallel = True

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        visual = self.visual  # type: ignore[attr-defined]
        if isinstance(visual, VllmTower):
            loaded |= {f"visual.{name}" for name in visual.finish_loading()}
        return loaded


class VllmTower(EngineTower):
    """The tower under the interface of vLLM's own."""

    def __init__(self, config: VisionConfig, input_norm: nn.Module | None, **options: Any) -> None:
        super().__init__(config, **options)
        # vLLM may send raw pixels and normalise them on the device, in front of its tower.
        self.input_norm = input_norm

    def forward(
        self, x: Tensor, grid_thw: Any, *, encoder_metadata: dict[str, Tensor] | None = None
    ) -> Tensor:
        if encoder_metadata is not None:
            raise ValueError("vitrt's tower runs in its own CUDA graphs, not in vLLM's")
        if self.input_norm is not None:
            x = self.input_norm(x.to(self.device, non_blocking=True), self.dtype)
        return super().forward(x, grid_thw)


def _tower_maker(vllm_config: Any) -> Callable[..., VllmTower]:
    options = _options(vllm_config.additional_config)

    def make(own: type[nn.Module], *args: Any, **kwargs: Any) -> VllmTower:
        _refuse(vllm_config)
        if kwargs.get("quant_config") is not None:
            with torch.device("meta"):
                refuse_quantised(own(*args, **kwargs))
        arguments = read_arguments(args, kwargs, TOWER_ARGUMENTS)
        config = read_vision_config(arguments["vision_config"].to_dict())
        dtype, device = dtype_and_device()
        return VllmTower(config, arguments.get("input_norm"), device=device, dtype=dtype, **options)

    return make


def _options(additional_config: Any) -> dict[str, Any]:
    options = additional_config.get("vitrt", {}) if isinstance(additional_config, dict) else {}
    if not isinstance(options, dict) or set(options) - set(_OPTIONS):
        raise ValueError(
            f"additional_config has vitrt={options!r}; it must be a mapping with keys of "
            f"{', '.join(_OPTIONS)}"
        )
    return dict(options)


def _refuse(vllm_config: Any) -> None:
    """ValueError where vLLM should keep its own tower."""
    if torch.get_default_device().type == "meta":
        raise ValueError("this process runs no vision tower")
    if vllm_config.compilation_config.cudagraph_mm_encoder:
        raise ValueError("cudagraph_mm_encoder asks for vLLM's own encoder graphs")
    lora = vllm_config.lora_config
    if lora is not None and getattr(lora, "enable_tower_connector_lora", False):
        raise ValueError("enable_tower_connector_lora needs vLLM's own layers")
