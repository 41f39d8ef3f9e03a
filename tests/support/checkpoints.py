"""Random-weight checkpoints in the released format, written by transformers' own `save_pretrained`.

Norm weights and biases are random too: ones and zeros hide a bias that is never added.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODEL_CLASSES = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
TOWER_CLASSES = {
    "qwen2_5_vl": "Qwen2_5_VisionTransformerPretrainedModel",
    "qwen3_vl": "Qwen3VLVisionModel",
    "qwen3_vl_moe": "Qwen3VLMoeVisionModel",
}

# Four heads (so that two and four ranks can share them), in Qwen2.5-VL an MLP width that is no
# multiple of 8 and window layers before, between and after full ones.
_QWEN3_VISION = {
    "depth": 6,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_heads": 4,
    "patch_size": 16,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [1, 3, 4],
}
TINY_VISION: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "depth": 6,
        "hidden_size": 160,
        "intermediate_size": 220,
        "num_heads": 4,
        "patch_size": 14,
        "out_hidden_size": 64,
        "window_size": 112,
        "fullatt_block_indexes": [2, 4],
    },
    "qwen3_vl": _QWEN3_VISION,
    "qwen3_vl_moe": _QWEN3_VISION,
}
SPECIAL_TOKENS = {
    "image_token_id": 505,
    "video_token_id": 506,
    "vision_start_token_id": 507,
    "vision_end_token_id": 508,
}


def tiny_checkpoint(
    family: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    shards: int = 3,
    seed: int = 0,
    **vision: Any,
) -> Path:
    """A checkpoint with a tower of six narrow layers; `vision` overrides its vision_config."""
    config = _config(family, TINY_VISION[family] | vision)
    factor = 2 * config.vision_config.patch_size
    preprocessor = _preprocessor(
        family,
        config.vision_config.patch_size,
        min_pixels or 4 * factor**2,
        max_pixels or 64 * factor**2,
    )
    return _save(config, preprocessor, folder, dtype, shards, seed)


def full_size_checkpoint(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 3,
    seed: int = 0,
    **vision: Any,
) -> Path:
    """The tower of configs/`name` (say "qwen3-vl-8b") beside a tiny language model.

    `vision` overrides its vision_config: depth=4 with matching layer lists gives a thin slice.
    """
    released = json.loads((CONFIGS / name / "config.json").read_text())
    preprocessor = json.loads((CONFIGS / name / "preprocessor_config.json").read_text())
    config = _config(released["model_type"], released["vision_config"] | vision)
    _save(config, preprocessor, folder, dtype, shards, seed)
    if (video := CONFIGS / name / "video_preprocessor_config.json").is_file():
        shutil.copy(video, folder)
    return folder


def reference_model(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """The whole transformers model of a checkpoint, for inference."""
    family = json.loads((folder / "config.json").read_text())["model_type"]
    model = getattr(transformers, MODEL_CLASSES[family]).from_pretrained(
        folder, dtype=dtype, **kwargs
    )
    return model.eval().requires_grad_(False)


def reference_tower(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """transformers' own vision tower of a checkpoint, for inference."""
    return reference_model(folder, dtype, **kwargs).model.visual


def tower_class(family: str) -> Any:
    """transformers' own class of a family's vision tower."""
    # Not every release exports the towers at the top.
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, TOWER_CLASSES[family])


def _config(family: str, vision: dict[str, Any]) -> Any:
    width = vision["out_hidden_size"]
    text = {
        "vocab_size": 512,
        "hidden_size": width,
        "intermediate_size": 2048,  # so that one shard of three holds nothing but language model
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 2, 2],
        },
    }
    if family == "qwen2_5_vl":
        del text["head_dim"]  # hidden_size / heads there
        text["rope_parameters"]["mrope_section"] = _mrope_section(width // 8)
    if family == "qwen3_vl_moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
        text["tie_word_embeddings"] = False
    kind = getattr(transformers, MODEL_CLASSES[family]).config_class
    return kind(text_config=text, vision_config=vision, tie_word_embeddings=False, **SPECIAL_TOKENS)


def _mrope_section(half_head: int) -> list[int]:
    quarter = half_head // 4
    return [half_head - 2 * quarter, quarter, quarter]


def _preprocessor(family: str, patch_size: int, min_pixels: int, max_pixels: int) -> dict[str, Any]:
    name = "qwen2.5-vl-7b" if family == "qwen2_5_vl" else "qwen3-vl-8b"
    released = json.loads((CONFIGS / name / "preprocessor_config.json").read_text())
    if "size" in released:
        limits: dict[str, Any] = {"size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}}
    else:
        limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    return released | limits | {"patch_size": patch_size}


def _save(
    config: Any,
    preprocessor: dict[str, Any],
    folder: Path,
    dtype: torch.dtype,
    shards: int,
    seed: int,
) -> Path:
    with torch.device("meta"):
        model = getattr(transformers, MODEL_CLASSES[config.model_type])(config)
    model = model.to(dtype).to_empty(device="cpu")
    _randomise(model, seed)
    total = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    limit = max(total // shards + largest, largest) if shards > 1 else 2 * total
    model.save_pretrained(folder, max_shard_size=limit)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    return folder


def _randomise(model: nn.Module, seed: int) -> None:
    """Keep activations near 1 and attention scores apart, so that every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=generator)
            if name.endswith("bias"):
                parameter.mul_(0.1)
            elif parameter.dim() == 1:
                parameter.mul_(0.1).add_(1.0)
            elif "embed" in name and "patch_embed" not in name:
                parameter.mul_(0.5)
            else:
                parameter.mul_(parameter[0].numel() ** -0.5)
