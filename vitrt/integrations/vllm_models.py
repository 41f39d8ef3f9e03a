"""vLLM's model classes with another `visual`; imported by vLLM alone, once it needs a model.

`vllm_models.<Architecture>` is vLLM's class of that name, derived from when first asked for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vitrt.config import VisionConfig
from vitrt.integrations.engine_tower import EngineTower
from vitrt.integrations.vllm import ARCHITECTURES, dtype_and_device, logger
from vitrt.models.families import read_vision_config

# What vLLM makes its towers with; the first may be given by position.
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
        with _tower_replaced(sys.modules[base.__module__], self._tower_name, vllm_config):
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
    """The tower behind the interface of vLLM's."""

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


@contextmanager
def _tower_replaced(module: ModuleType, name: str, vllm_config: Any) -> Iterator[None]:
    """While vLLM's constructor runs, `name` in its module makes vitrt's tower where it can."""
    own = getattr(module, name)

    options = _options(vllm_config.additional_config)

    def make(*args: Any, **kwargs: Any) -> nn.Module:
        reason: object = _reason_for_own(lambda: own(*args, **kwargs), vllm_config, kwargs)
        if reason is None:
            try:
                tower = _make_tower(options, kwargs, *args)
                logger.info("vitrt runs the vision tower, of %s", tower.config.model_type)
                return tower
            except ValueError as error:
                reason = error
        logger.warning("vLLM's own vision tower runs, not vitrt's: %s", reason)
        return own(*args, **kwargs)

    setattr(module, name, make)
    try:
        yield
    finally:
        setattr(module, name, own)


def _make_tower(options: dict[str, Any], kwargs: dict[str, Any], *args: Any) -> VllmTower:
    """ValueError for a tower that vitrt does not have."""
    arguments = dict(zip(TOWER_ARGUMENTS[:1], args, strict=False)) | kwargs
    if len(args) > 1 or not {"vision_config"} <= set(arguments) <= set(TOWER_ARGUMENTS):
        raise ValueError(f"its constructor is called with {', '.join(sorted(arguments))}")
    if arguments.get("norm_eps", 1e-6) != 1e-6:
        raise ValueError(f"norm_eps is {arguments['norm_eps']}, and vitrt's is 1e-06")
    config = read_vision_config(arguments["vision_config"].to_dict())
    dtype, device = dtype_and_device()
    return VllmTower(config, arguments.get("input_norm"), device=device, dtype=dtype, **options)


def _options(additional_config: Any) -> dict[str, Any]:
    options = additional_config.get("vitrt", {}) if isinstance(additional_config, dict) else {}
    if not isinstance(options, dict) or set(options) - set(_OPTIONS):
        raise ValueError(
            f"additional_config has vitrt={options!r}; it must be a mapping with keys of "
            f"{', '.join(_OPTIONS)}"
        )
    return dict(options)


def _reason_for_own(own: Callable[[], nn.Module], vllm_config: Any, kwargs: Any) -> str | None:
    """Why vLLM should keep its own tower, or None."""
    if torch.get_default_device().type == "meta":
        return "this process runs no vision tower"
    if vllm_config.compilation_config.cudagraph_mm_encoder:
        return "cudagraph_mm_encoder asks for vLLM's own encoder graphs"
    lora = vllm_config.lora_config
    if lora is not None and getattr(lora, "enable_tower_connector_lora", False):
        return "enable_tower_connector_lora needs vLLM's own layers"
    if kwargs.get("quant_config") is not None:
        with torch.device("meta"):
            layers = own().modules()
        methods = {type(getattr(layer, "quant_method", None)).__name__ for layer in layers}
        quantised = methods - {"NoneType", "UnquantizedLinearMethod"}
        if quantised:
            return f"its layers are quantised ({', '.join(sorted(quantised))})"
    return None
