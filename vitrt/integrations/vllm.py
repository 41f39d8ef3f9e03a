"""vLLM's Qwen-VL models with vitrt's vision tower, by vLLM's own plugin mechanism.

Where vitrt is installed next to vLLM, vLLM finds `register` under the entry point
`vllm.general_plugins` and calls it in each of its processes; `VLLM_PLUGINS` is vLLM's allow-list
of plugin names (empty: none). Each model stays vLLM's, but for `visual`. Choices go into vLLM's
`additional_config`, under "vitrt": `--additional-config '{"vitrt": {"attention": "triton"}}'`;
see `EngineTower` for those there are.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import torch

from vitrt.features import ImageFeatures
from vitrt.integrations.engine_versions import warn_of_version

__all__ = ["ARCHITECTURES", "TRIED", "fill_ec_cache", "register"]

# Architecture -> vLLM's module and the name there of the tower that a model is built with.
ARCHITECTURES = {
    "Qwen2VLForConditionalGeneration": ("qwen2_vl", "Qwen2VisionTransformer"),
    "Qwen2_5_VLForConditionalGeneration": ("qwen2_5_vl", "Qwen2_5_VisionTransformer"),
    "Qwen3VLForConditionalGeneration": ("qwen3_vl", "Qwen3_VisionTransformer"),
    "Qwen3VLMoeForConditionalGeneration": ("qwen3_vl_moe", "Qwen3_VisionTransformer"),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", "Qwen3_VisionTransformer"),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5", "Qwen3_VisionTransformer"),
}
TRIED = ("0.26.0", "0.32.0")  # run
READ = ((0, 26), (0, 33))  # its sources were read from the one to the other

# Below vLLM's own logger, or its settings would not show what is said here.
logger = logging.getLogger("vllm.plugins.vitrt")


def register() -> None:
    """Put vitrt's tower into every Qwen-VL model that this vLLM has. May run twice."""
    version = str(getattr(importlib.import_module("vllm"), "__version__", "of no version"))
    warn_of_version("vLLM", version, TRIED, READ, logger)
    registry = importlib.import_module("vllm.model_executor.models.registry").ModelRegistry
    known = set(registry.get_supported_archs())
    for architecture in ARCHITECTURES:
        if architecture in known:
            # By name: importing a model here could start CUDA in a process that forks later.
            registry.register_model(architecture, f"vitrt.integrations.vllm_models:{architecture}")


def fill_ec_cache(folder: str | Path, features: dict[str, ImageFeatures]) -> None:
    """Write features where vLLM's `ECExampleConnector` looks for them: `folder` is its
    `shared_storage_path`.

    The keys are what a request gives as `multi_modal_uuids`; each becomes a folder's name.
    ValueError for a key that cannot be one.
    """
    from safetensors.torch import save_file

    for key, image in features.items():
        if not key or key in (".", "..") or Path(key).name != key:
            raise ValueError(f"{key!r} cannot name a folder: give another multi_modal_uuids value")
        target = Path(folder, key)
        target.mkdir(parents=True, exist_ok=True)
        tensor = image.concatenated().detach().to("cpu").contiguous()
        # An engine that is running must never open half a file.
        half = target / ".encoder_cache.safetensors.part"
        save_file({"ec_cache": tensor}, half)
        half.replace(target / "encoder_cache.safetensors")


def dtype_and_device() -> tuple[torch.dtype, torch.device]:
    """What vLLM builds its modules in and on: it sets both as PyTorch's defaults."""
    return torch.get_default_dtype(), torch.get_default_device()
