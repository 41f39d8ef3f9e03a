"""SGLang's Qwen-VL models with vitrt's vision tower, by SGLang's own plugin mechanism.

Where vitrt is installed next to SGLang, SGLang finds `register` under the entry point
`sglang.srt.plugins` and calls it in its processes; `SGLANG_PLUGINS` is SGLang's allow-list of
plugin names. Each model stays SGLang's, but for `visual`. Its tower classes are left alone, since
towers of other models derive from them: hooks on the models' constructors put another in.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitrt.integrations.engine_plugin import read_arguments, refuse_quantised, tower_replaced
from vitrt.integrations.engine_tower import EngineTower
from vitrt.integrations.engine_versions import warn_of_version
from vitrt.models.config_file import read_vision_config

__all__ = ["ARCHITECTURES", "READ", "TOWERS", "TRIED", "register"]

# Model class -> its module. By the names of the classes: those that derive from them stay as is.
ARCHITECTURES = {
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5",
}
# Model class whose constructor makes a tower -> the tower's name in its module.
TOWERS = {
    "Qwen2_5_VLForConditionalGeneration": "Qwen2_5_VisionTransformer",
    "Qwen3VLForConditionalGeneration": "Qwen3VLMoeVisionModel",
}
# What SGLang makes its towers with.
TOWER_ARGUMENTS = (
    "vision_config",
    "norm_eps",
    "quant_config",
    "prefix",
    "use_data_parallel",
    "max_context_len",
)
TRIED = ("0.5.17", "0.5.23")  # run, on a CPU
READ = ((0, 5, 17), (0, 5, 23))  # its sources were read from the one to the other
_MODELS = "sglang.srt.models"
_DISAGGREGATION = "sglang.srt.disaggregation"

# Below SGLang's own logger, or its settings would not show what is said here.
logger = logging.getLogger("sglang.plugins.vitrt")


def register() -> None:
    """Hook every Qwen-VL model that this SGLang has. May run twice."""
    version = str(getattr(importlib.import_module("sglang"), "__version__", "of no version"))
    warn_of_version("SGLang", version, TRIED, READ, logger)
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    for architecture, module in ARCHITECTURES.items():
        target = f"{_MODELS}.{module}.{architecture}"
        try:
            pkgutil.resolve_name(target)
        except (ImportError, AttributeError) as error:
            logger.warning("SGLang's own vision tower runs in %s: %s", architecture, error)
            continue
        if architecture in TOWERS:
            around = hooks.HookType.AROUND
            hooks.HookRegistry.register(f"{target}.__init__", construct, around)
            if hasattr(pkgutil.resolve_name(target), "_get_visual_feature"):
                name = f"{target}._get_visual_feature"
                hooks.HookRegistry.register(name, share_images, around)
        hooks.HookRegistry.register(f"{target}.load_weights", load_weights, hooks.HookType.AROUND)
    if _is_encoder():
        for process in (EncoderRank, EncoderWorker):
            if (found := process.find()) is not None:
                hooks.HookRegistry.register(found, process, hooks.HookType.REPLACE)


def construct(original: Callable[..., None], model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Around a model's `__init__`."""
    known = ARCHITECTURES.get(type(model).__name__)
    if type(model).__module__ != f"{_MODELS}.{known}":
        original(model, *args, **kwargs)
        return
    base = next(c.__name__ for c in type(model).__mro__ if c.__name__ in TOWERS)
    module, name = sys.modules[f"{_MODELS}.{ARCHITECTURES[base]}"], TOWERS[base]
    config = kwargs["config"] if "config" in kwargs else args[0]
    reason = None
    if not hasattr(module, name):
        reason = f"{module.__name__} has no {name}"
    elif getattr(config, "encoder_only", False) and not _is_encoder() and _ranks() > 1:
        # They would wait for each other for ever.
        reason = "SGLang starts the further ranks of this encoder without plugins"
    if reason is not None:
        logger.warning("SGLang's own vision tower runs, not vitrt's: %s", reason)
        original(model, *args, **kwargs)
        return
    with tower_replaced(module, name, _make_tower, "SGLang", logger):
        original(model, *args, **kwargs)
    if isinstance(getattr(model, "visual", None), EngineTower) and _ranks() > 1:
        # Every rank holds the whole tower and encodes its share of the images, which is what
        # SGLang itself does for this: --mm-enable-dp-encoder.
        model.use_data_parallel = True  # type: ignore[assignment]


def share_images(
    original: Callable[..., Tensor], model: Any, items: Sequence[Any], grid_thw: Tensor
) -> Tensor:
    """Around a model's `_get_visual_feature`, which gives each rank some of the items.

    It takes each for one image; an encoder on its own has all images of a request in one item.
    """
    shared = isinstance(model.visual, EngineTower) and model.use_data_parallel
    if not shared or len(items) == len(grid_thw):
        return original(model, items, grid_thw)
    pixels = model._materialize_visual_items(items, range(len(items)))
    share = pkgutil.resolve_name("sglang.srt.multimodal.mm_utils:run_dp_sharded_mrope_vision_model")
    features: Tensor = share(model.visual, pixels, grid_thw.tolist(), rope_type="rope_3d")
    return features


def load_weights(
    original: Callable[..., Any],
    model: nn.Module,
    weights: Iterable[tuple[str, Tensor]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around a model's `load_weights`: the tower takes its own before SGLang renames or skips any.

    ValueError names the tensors that never came at the start, came twice or are not the tower's.
    """
    visual = getattr(model, "visual", None)
    if not isinstance(visual, EngineTower):
        return original(model, weights, *args, **kwargs)

    def others() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            local = name.removeprefix("model.")
            if local.startswith("visual."):
                # SGLang's own name of one is taken too, as SGLang does. At once, since a loader may
                # use the tensor's memory for the next.
                local = local.removeprefix("visual.").replace("attn.qkv_proj.", "attn.qkv.")
                visual.load_weights([(local, tensor)])
            else:
                yield name, tensor

    loaded = original(model, others(), *args, **kwargs)
    visual.finish_loading()
    return loaded


def _make_tower(own: type[nn.Module], *args: Any, **kwargs: Any) -> EngineTower:
    """ValueError where SGLang should keep its own tower."""
    device = torch.get_default_device()
    if device.type == "meta":
        raise ValueError("this loader fills an empty model layer by layer")
    arguments = read_arguments(args, kwargs, TOWER_ARGUMENTS)
    vision = arguments["vision_config"].to_dict()
    if vision.get("disable_merger_proj"):
        raise ValueError("its config has disable_merger_proj=True")
    # On a CPU SGLang pads heads and widths for its own kernels, and notes what they were.
    noted = {name: value for name, value in vision.items() if name.startswith("original_")}
    config = read_vision_config(
        vision | {name.removeprefix("original_"): value for name, value in noted.items()}
    )
    if arguments.get("quant_config") is not None:
        # SGLang's layers cannot all be made without memory; these are dropped at once.
        refuse_quantised(own(*args, **kwargs))
    return EngineTower(config, device=device, dtype=torch.get_default_dtype())


def _ranks() -> int:
    """Tensor-parallel ranks of the model that is being built."""
    ranks: int = pkgutil.resolve_name("sglang.srt.runtime_context:get_parallel")().tp_size
    return ranks


# Encoders on their own


def _is_encoder() -> bool:
    return "--encoder-only" in sys.argv


class _EncoderProcess:
    """A function that SGLang starts in a new process without loading plugins: here they are loaded.

    A class, since SGLang's registry puts one in place as it is: a new process finds it by its name
    in this module, and there SGLang's function in SGLang's.
    """

    name: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]  # by version, the newest first

    @classmethod
    def find(cls) -> str | None:
        for module in cls.modules:
            try:
                pkgutil.resolve_name(f"{_DISAGGREGATION}.{module}:{cls.name}")
            except (ImportError, AttributeError):
                continue
            return f"{_DISAGGREGATION}.{module}.{cls.name}"
        return None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        target = cls.find()
        if target is None:
            raise RuntimeError(f"SGLang has no {cls.name} any more")
        run = pkgutil.resolve_name(target)
        importlib.import_module("sglang.srt.plugins").load_plugins()
        return run(*args, **kwargs)


class EncoderRank(_EncoderProcess):
    """A further tensor-parallel rank of one encoder."""

    name = "launch_encoder"
    modules = ("encoder.server", "encode_server")


class EncoderWorker(_EncoderProcess):
    """One of several data-parallel encoders."""

    name = "launch_dp_worker"
    modules = ("encoder.runtime", "encode_server")
