"""Random-weight checkpoints in the released format, written by transformers' own `save_pretrained`.

Norm weights and biases are random too: ones and zeros hide a bias that is never added.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import unittest
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from vitrt.models.config_file import family_of
from vitrt.models.families import family_named

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODEL_CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_5_omni": "Qwen2_5OmniForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen4_exp": "Qwen4ExpForConditionalGeneration",
}
FAMILIES = tuple(MODEL_CLASSES)

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
_QWEN3_5_VISION = {
    key: value for key, value in _QWEN3_VISION.items() if key != "deepstack_visual_indexes"
}
_QWEN2_5_VISION = {
    "depth": 6,
    "hidden_size": 160,
    "intermediate_size": 220,
    "num_heads": 4,
    "patch_size": 14,
    "out_hidden_size": 64,
    "window_size": 112,
    "fullatt_block_indexes": [2, 4],
}
TINY_VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "depth": 6,
        "embed_dim": 160,
        "mlp_ratio": 2,
        "num_heads": 4,
        "patch_size": 14,
        "hidden_size": 64,
    },
    "qwen2_5_vl": _QWEN2_5_VISION,
    "qwen2_5_omni": _QWEN2_5_VISION,
    "qwen3_vl": _QWEN3_VISION,
    "qwen3_vl_moe": _QWEN3_VISION,
    "qwen3_omni_moe": _QWEN3_VISION,
    "qwen3_5": _QWEN3_5_VISION,
    "qwen3_5_moe": _QWEN3_5_VISION,
    "qwen4_exp": _QWEN3_5_VISION,
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
    factor = 2 * vision_part(config).patch_size
    preprocessor = _preprocessor(
        family,
        vision_part(config).patch_size,
        min_pixels or 4 * factor**2,
        max_pixels or 64 * factor**2,
    )
    return _save(config, preprocessor, folder, dtype, shards, seed)


def add_tokenizer(folder: Path) -> None:
    """Words of a language model without one, with the special tokens of the released models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {505: "<|image_pad|>", 506: "<|video_pad|>"}
    special |= {507: "<|vision_start|>", 508: "<|vision_end|>", 2: "<|im_end|>"}
    special[3] = "<|endoftext|>"
    words = {special.get(index, f"word{index}"): index for index in range(512)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in special.values() if token != "<|im_end|>"],
    )
    fast.chat_template = (
        "{% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}"
    )
    fast.save_pretrained(folder)


def full_size_checkpoint(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 3,
    seed: int = 0,
    **vision: Any,
) -> Path:
    """The tower of configs/`name` (say "qwen3-vl-8b") beside one layer of a language model.

    `vision` overrides its vision_config: depth=4 with matching layer lists gives a thin slice.
    """
    released = json.loads((CONFIGS / name / "config.json").read_text())
    preprocessor = json.loads((CONFIGS / name / "preprocessor_config.json").read_text())
    config = _config(released["model_type"], {**family_of(released)[1], **vision}, text_layers=1)
    _save(config, preprocessor, folder, dtype, shards, seed)
    if (video := CONFIGS / name / "video_preprocessor_config.json").is_file():
        shutil.copy(video, folder)
    return folder


def reference_model(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """The whole transformers model of a checkpoint, for inference."""
    family = json.loads((folder / "config.json").read_text())["model_type"]
    # A whole Omni model would ask for its speakers' voices.
    name = MODEL_CLASSES[family].replace("Omni", "OmniThinker").replace("ThinkerMoe", "MoeThinker")
    module = importlib.import_module(model_class(family).__module__)
    model = getattr(module, name).from_pretrained(folder, dtype=dtype, **kwargs)
    return model.eval().requires_grad_(False)


def reference_tower(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """transformers' own vision tower of a checkpoint, for inference."""
    return visual_of(reference_model(folder, dtype, **kwargs))


def visual_of(model: nn.Module) -> Any:
    """The vision tower of a transformers model, wherever it lies."""
    return next(module for name, module in model.named_modules() if name.endswith("visual"))


def vision_part(config: Any) -> Any:
    """The vision config of a transformers model's config."""
    return getattr(config, "thinker_config", config).vision_config


def tower_class(family: str) -> Any:
    """transformers' own class of a family's vision tower."""
    # Not every release exports the towers at the top.
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, family_named(family).reference)


def needs_transformers(family: str) -> None:
    """Skip a test whose family this release of transformers does not have."""
    if importlib.util.find_spec(f"transformers.models.{family}") is None:
        # The standard library's, which pytest takes for its own: the demo has no pytest.
        raise unittest.SkipTest(f"transformers {transformers.__version__} has no {family}")


def _config(family: str, vision: dict[str, Any], text_layers: int = 8) -> Any:
    needs_transformers(family)
    width = vision["hidden_size" if family == "qwen2_vl" else "out_hidden_size"]
    text = {
        "vocab_size": 512,
        "hidden_size": width,
        "intermediate_size": 2048,  # so that one shard of three holds nothing but language model
        "num_hidden_layers": text_layers,
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
    if family.startswith("qwen2"):
        del text["head_dim"]  # hidden_size / heads there
        text["rope_parameters"]["mrope_section"] = _mrope_section(width // 8)
    if family.startswith(("qwen3_5", "qwen4")):
        text |= {"head_dim": 32, "full_attention_interval": 4} | {
            f"linear_{what}": size
            for what, size in (
                ("key_head_dim", 16),
                ("value_head_dim", 16),
                ("num_key_heads", 2),
                ("num_value_heads", 4),
            )
        }
        text["rope_parameters"] |= {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}
    if family.endswith("_moe") or family == "qwen4_exp":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
        text |= {"shared_expert_intermediate_size": 256, "tie_word_embeddings": False}
    if family == "qwen4_exp":
        text |= {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16}
        text |= {"indexer_budget": 512, "indexer_compress_ratio": 4, "hc_count": 2, "hc_lowrank": 8}
    kind = model_class(family).config_class
    if "omni" not in family:
        return kind(
            text_config=text, vision_config=vision, tie_word_embeddings=False, **SPECIAL_TOKENS
        )
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2}
    audio |= {"encoder_ffn_dim": 32, "output_dim": width, "num_mel_bins": 16}
    if family == "qwen3_omni_moe":
        audio["downsample_hidden_size"] = 8
    old = "index" if family == "qwen2_5_omni" else "id"
    thinker = {"text_config": text, "vision_config": vision, "audio_config": audio}
    thinker |= {
        name.replace("token_id", f"token_{old}") if not name.startswith("vision") else name: token
        for name, token in SPECIAL_TOKENS.items()
    }
    thinker[f"audio_token_{old}"] = 509
    return kind(thinker_config=thinker, enable_audio_output=False)


def model_class(family: str) -> Any:
    """transformers' class of a family's whole model."""
    # Not every release exports all of them at its top level.
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, MODEL_CLASSES[family])


def _mrope_section(half_head: int) -> list[int]:
    quarter = half_head // 4
    return [half_head - 2 * quarter, quarter, quarter]


def _preprocessor(family: str, patch_size: int, min_pixels: int, max_pixels: int) -> dict[str, Any]:
    name = "qwen2.5-vl-7b" if family.startswith("qwen2") else "qwen3-vl-8b"
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
        model = model_class(config.model_type)(config)
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
