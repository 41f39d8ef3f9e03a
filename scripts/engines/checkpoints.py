"""Random Qwen-VL checkpoints that a serving engine starts from: weights, tokenizer and processors.

Needs transformers and tokenizers, downloads nothing. "tiny" has a small tower, "full" the tower of
a released 8B or 7B model; the language model has two layers. The weights are drawn so that the
greedy continuation of a prompt depends on its images.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL += ("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
FAMILIES = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen3_5", "qwen2_vl")

_TINY_QWEN3_VL: dict[str, Any] = {
    "depth": 6,
    "hidden_size": 288,
    "intermediate_size": 592,
    "num_heads": 4,
    "out_hidden_size": 256,
    "deepstack_visual_indexes": [1, 3],
}
_TOWERS: dict[tuple[str, str], dict[str, Any]] = {
    ("qwen3_vl", "tiny"): _TINY_QWEN3_VL,
    ("qwen3_vl_moe", "tiny"): _TINY_QWEN3_VL,
    ("qwen3_vl", "full"): {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 4096,
        "deepstack_visual_indexes": [8, 16, 24],
    },
    ("qwen2_5_vl", "tiny"): {
        "depth": 6,
        "hidden_size": 320,
        "intermediate_size": 428,
        "num_heads": 4,
        "out_hidden_size": 256,
        "fullatt_block_indexes": [2, 5],
        "tokens_per_second": 2,
    },
    ("qwen2_5_vl", "full"): {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    },
    ("qwen3_5", "tiny"): {
        "depth": 6,
        "hidden_size": 288,
        "intermediate_size": 592,
        "num_heads": 4,
        "out_hidden_size": 256,
    },
    ("qwen2_vl", "tiny"): {
        "depth": 6,
        "embed_dim": 320,
        "num_heads": 4,
        "hidden_size": 256,
    },
}
# Family -> how transformers' classes are called, the rope's parts (of a head of 128), and more of
# the language model.
_INTERLEAVED = {"mrope_interleaved": True}
_TEXTS: dict[str, tuple[str, tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl": ("Qwen3VL", (24, 20, 20), _INTERLEAVED, {}),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        (24, 20, 20),
        _INTERLEAVED,
        # The last as released, for engines: transformers has no such field any more.
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 192,
            "norm_topk_prob": True,
        },
    ),
    "qwen2_5_vl": ("Qwen2_5_VL", (16, 24, 24), {}, {}),
    # Full attention alone: vLLM's linear attention on a CPU is in bfloat16. Half a head turns.
    "qwen3_5": (
        "Qwen3_5",
        (12, 10, 10),
        _INTERLEAVED | {"partial_rotary_factor": 0.5},
        {"layer_types": ["full_attention"] * 2},
    ),
    "qwen2_vl": ("Qwen2VL", (16, 24, 24), {}, {}),
}
_HALF = (16, [0.5] * 3, [0.5] * 3)
_CLIP = (14, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
_PROCESSORS = {
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor", *_HALF),
    "qwen3_vl_moe": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor", *_HALF),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", *_CLIP),
    "qwen3_5": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor", *_HALF),
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLVideoProcessor", *_CLIP),
}


def families_of(size: str) -> list[str]:
    """Those that have a checkpoint of this size."""
    return [family for family in FAMILIES if (family, size) in _TOWERS]


def make_checkpoint(folder: Path, family: str, size: str, device: str = "cpu") -> Path:
    """Write the checkpoint in bfloat16, its weights drawn on `device`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    with torch.device(device):
        model = _model(family, size, ids)
    _draw(model, device)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.to(torch.bfloat16).save_pretrained(folder)
    if "num_experts" in _TEXTS[family][-1]:
        _transpose_experts(folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    _write_processors(folder, family)
    return folder


def _tokenizer() -> Any:
    """One token a byte, and Qwen's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[3:]),
    )


def _model(family: str, size: str, ids: dict[str, int]) -> Any:
    import transformers

    vision = _TOWERS[family, size]
    name, section, rope, more = _TEXTS[family]
    tiny = size == "tiny"
    width = vision.get("out_hidden_size", vision["hidden_size"])
    head = 64 if tiny else 128
    rope = {"rope_type": "default", "rope_theta": 1e6} | rope
    rope["mrope_section"] = [part * head // 128 for part in section]
    text = more | {
        "num_hidden_layers": 2,
        "vocab_size": 512,
        "max_position_embeddings": 32768,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": width // head,
        "num_key_value_heads": 2 if tiny else 4,
        "rope_parameters": rope,
        "rms_norm_eps": 1e-6,  # as released; some engines take it for their tower's, too
        "tie_word_embeddings": False,
        "eos_token_id": ids["<|im_end|>"],
        "bos_token_id": None,
        "pad_token_id": ids["<|endoftext|>"],
    }
    if family.startswith("qwen3"):
        text["head_dim"] = head
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


@torch.no_grad()
def _draw(model: torch.nn.Module, device: str) -> None:
    generator = torch.Generator(device).manual_seed(7)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, device=device)
        if parameter.dim() == 1:
            drawn = drawn * 0.02 if name.endswith("bias") else 1 + 0.1 * drawn
        elif "pos_embed" in name:
            drawn = drawn * 0.3
        elif "embed_tokens" not in name:
            gain = 4 if "lm_head" in name else 1  # logits far enough apart to tell tokens by
            inputs = parameter.shape[-1] if ".experts." in name else parameter[0].numel()
            drawn = drawn * gain / inputs**0.5
        parameter.copy_(drawn)


def _transpose_experts(file: Path) -> None:
    """As they are released, and as engines take them: transformers saves them by its own layout."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    for name in tensors:
        if ".experts." in name:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, file, {"format": "pt"})


def _write_processors(folder: Path, family: str) -> None:
    processor, video, patch, mean, std = _PROCESSORS[family]
    common = {
        "image_mean": mean,
        "image_std": std,
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "processor_class": processor,
    }
    pixels = {"shortest_edge": 4096, "longest_edge": 1 << 22}
    files = {
        "preprocessor_config.json": common
        | {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "min_pixels": pixels["shortest_edge"],
            "max_pixels": pixels["longest_edge"],
            "size": pixels,
        },
        "video_preprocessor_config.json": common
        | {"video_processor_type": video, "size": pixels, "fps": 2},
    }
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    files["tokenizer_config.json"] = saved | {
        "processor_class": processor,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, indent=1))


def faulty_checkpoint(folder: Path, target: Path, fault: str) -> tuple[Path, str]:
    """A copy with one tensor of the tower "missing", "renamed" or "doubled"; and its name there."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    file = target / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("visual.blocks.1.attn.qkv.bias"))
    if fault == "doubled":  # in a file of its own: one file holds a name once
        save_file({name: tensors[name]}, target / "model-again.safetensors", {"format": "pt"})
        return target, name
    tensor = tensors.pop(name)
    if fault == "renamed":
        name += "es"
        tensors[name] = tensor
    save_file(tensors, file, {"format": "pt"})
    return target, name
