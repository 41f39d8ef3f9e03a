"""Towers inside quantised checkpoints: left in bfloat16, stored in fp8 with scales, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoints import reference_tower, tiny_checkpoint
from vitrt.checkpoint.extract import extract_tower
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.checkpoint.scaled import ScaledTensor
from vitrt.checkpoint.shards import CheckpointError
from vitrt.engine.loader import load_tower
from vitrt.parallel.context import ParallelContext

E4M3_MAX = 448.0
PREFIX = "model.visual."


@dataclass(frozen=True)
class Scheme:
    """How a quantiser stores a linear weight."""

    config: dict[str, Any]
    block: Callable[[Tensor], tuple[int, int]]  # rows and columns of one scale
    scale_name: str = "weight_scale"
    shaped: Callable[[Tensor], Tensor] = lambda scales: scales
    scale_dtype: torch.dtype = torch.float32
    activations: str | None = None


def compressed(**weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **weights}
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def fixed(rows: int, columns: int) -> Callable[[Tensor], tuple[int, int]]:
    return lambda _: (rows, columns)


def whole(weight: Tensor) -> tuple[int, int]:
    return tuple(weight.shape)  # type: ignore[return-value]


def each_row(weight: Tensor) -> tuple[int, int]:
    return 1, weight.shape[1]


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
SCHEMES = {
    "fp8 blocks": Scheme(
        FP8 | {"weight_block_size": [32, 48]}, fixed(32, 48), scale_name="weight_scale_inv"
    ),
    "fp8 blocks of 128, no size given": Scheme(FP8, fixed(128, 128), scale_name="weight_scale_inv"),
    "fp8 blocks, scales in bfloat16": Scheme(
        FP8 | {"weight_block_size": [64, 64]},
        fixed(64, 64),
        scale_name="weight_scale_inv",
        scale_dtype=torch.bfloat16,
    ),
    "fp8 blocks, scales powers of two": Scheme(
        FP8 | {"weight_block_size": [64, 64], "scale_fmt": "ue8m0"},
        fixed(64, 64),
        scale_name="weight_scale_inv",
        scale_dtype=torch.float8_e8m0fnu,
    ),
    "fp8 static": Scheme(
        FP8 | {"activation_scheme": "static"},
        whole,
        shaped=lambda scales: scales.view(()),
        activations="input_scale",
    ),
    "compressed tensor": Scheme(compressed(strategy="tensor"), whole, shaped=Tensor.flatten),
    "compressed channel": Scheme(compressed(strategy="channel"), each_row),
    "compressed block": Scheme(
        compressed(strategy="block", block_structure=[16, 32]), fixed(16, 32)
    ),
    "compressed group": Scheme(compressed(strategy="group", group_size=8), fixed(1, 8)),
    "modelopt": Scheme(
        MODELOPT, whole, shaped=lambda scales: scales.view(()), activations="input_scale"
    ),
    "modelopt channel": Scheme(
        MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, each_row, shaped=Tensor.flatten
    ),
    "modelopt block": Scheme(
        MODELOPT | {"quant_algo": "FP8_PB_WO"},
        fixed(128, 128),
        shaped=lambda scales: scales[:, None, :, None],
    ),
    "fbgemm": Scheme({"quant_method": "fbgemm_fp8"}, each_row, activations="input_scale_ub"),
}


def spread(scales: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """One scale a value."""
    for axis, size in enumerate(block):
        scales = scales.repeat_interleave(size, axis)
    return scales[: shape[0], : shape[1]]


def quantise(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales as stored, and the weight that both stand for, in float32."""
    rows, columns = block = scheme.block(weight)
    grid = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    scales = torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scales[i, j] = part.abs().max() / E4M3_MAX
    scales = scales.to(scheme.scale_dtype)
    each = spread(scales.float(), block, weight.shape)
    codes = (weight / each).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, scheme.shaped(scales).contiguous(), codes.float() * each


def is_linear(name: str, tensor: Tensor) -> bool:
    inside = name.startswith(PREFIX) and name.endswith(".weight")
    return inside and tensor.dim() == 2 and "embed" not in name


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None], **config: Any) -> Path:
    """Change a checkpoint of one file, and its config."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    data = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(data))
    return folder


def quantised(plain: Path, target: Path, scheme: Scheme) -> tuple[Path, dict[str, Tensor]]:
    """The checkpoint with its tower's linear weights in fp8, and the tower that it stands for."""
    folder = Path(shutil.copytree(plain, target))
    expected: dict[str, Tensor] = {}

    def change(tensors: dict[str, Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            own = name.removeprefix(PREFIX)
            if not is_linear(name, tensor):
                if own != name:
                    expected[own] = tensor.float()
                continue
            codes, scales, expected[own] = quantise(tensor.float(), scheme)
            module = name.removesuffix("weight")
            tensors |= {name: codes, f"{module}{scheme.scale_name}": scales}
            if scheme.activations:
                tensors[f"{module}{scheme.activations}"] = torch.ones(())

    edit(folder, change, quantization_config=scheme.config)
    return folder, expected


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "checkpoint"
    return tiny_checkpoint(
        "qwen3_vl", folder, dtype=torch.bfloat16, shards=1, depth=2, deepstack_visual_indexes=[0]
    )


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "copy"))


# A tower in fp8


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
def test_dequantised_as_the_scheme_says(plain: Path, tmp_path: Path, scheme: Scheme) -> None:
    """Whole and in the parts that tensor-parallel ranks read, bit for bit in float32."""
    folder, expected = quantised(plain, tmp_path / "fp8", scheme)
    tensors = dict(open_checkpoint(folder).tower_tensors())
    assert tensors.keys() == expected.keys()
    assert sum(isinstance(tensor, ScaledTensor) for tensor in tensors.values()) > 8
    for name, tensor in tensors.items():
        assert tensor.shape == expected[name].shape
        assert torch.equal(tensor[...].float(), expected[name]), name
    for name in ("blocks.1.attn.qkv.weight", "blocks.0.mlp.linear_fc2.weight"):
        tensor, want = tensors[name], expected[name]
        assert tensor.dtype == torch.float32
        for index in (slice(3, 70), slice(50, None), slice(7, 7), (slice(None), slice(5, 71))):
            assert torch.equal(tensor[index], want[index]), (name, index)


@pytest.mark.parametrize("scheme", ["fp8 blocks", "compressed channel", "modelopt"])
def test_ranks_dequantise_their_parts(plain: Path, tmp_path: Path, scheme: str) -> None:
    """Each rank's tower is the one made from the dequantised tensors; float32 and bfloat16."""
    folder, expected = quantised(plain, tmp_path / "fp8", SCHEMES[scheme])
    checkpoint = open_checkpoint(folder)
    config, device = checkpoint.vision_config(), torch.device("cpu")
    for size, dtype in ((1, torch.bfloat16), (2, torch.float32), (4, torch.bfloat16)):
        for rank in range(size):
            options = {
                "device": device,
                "dtype": dtype,
                "parallel": ParallelContext(tp_rank=rank, tp_size=size),
            }
            ours = load_tower(config, checkpoint.tower_tensors(), **options).state_dict()
            want = load_tower(config, expected.items(), **options).state_dict()
            assert ours.keys() == want.keys()
            assert all(torch.equal(ours[name], want[name]) for name in want)


def test_what_is_stored_stays_within_reach(plain: Path, tmp_path: Path) -> None:
    """A product in fp8 takes codes and scales as they are."""
    scheme = SCHEMES["compressed channel"]
    folder, expected = quantised(plain, tmp_path / "fp8", scheme)
    name = "blocks.0.attn.qkv.weight"
    tensor = dict(open_checkpoint(folder).tower_tensors())[name]
    assert isinstance(tensor, ScaledTensor)
    assert tensor.block == (1, 96)
    codes, scales = tensor.codes[96:192], tensor.scales[96:192]
    assert codes.dtype == torch.float8_e4m3fn and scales.shape == (96, 1)
    assert torch.equal(codes.float() * scales, expected[name][96:192])


def test_a_convolution_in_fp8(copy: Path) -> None:
    expected = {}

    def change(tensors: dict[str, Tensor]) -> None:
        name = f"{PREFIX}patch_embed.proj.weight"
        codes = tensors[name].to(torch.float8_e4m3fn)
        scales = torch.rand(len(codes), 1)
        tensors |= {name: codes, f"{name}_scale": scales}
        expected["weight"] = codes.float() * scales.view(-1, 1, 1, 1, 1)

    edit(copy, change)
    tensor = dict(open_checkpoint(copy).tower_tensors())["patch_embed.proj.weight"]
    assert torch.equal(tensor[...], expected["weight"])
    assert torch.equal(tensor[10:20], expected["weight"][10:20])


def test_extracted_plain(plain: Path, tmp_path: Path) -> None:
    """In the dtype of the model, and with nothing of fp8 left."""
    folder, expected = quantised(plain, tmp_path / "fp8", SCHEMES["fp8 blocks"])
    out = extract_tower(open_checkpoint(folder), tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name].bfloat16()), name
    assert "quantization_config" not in (out / "config.json").read_text()


def same_as_transformers(folder: Path, **options: Any) -> None:
    theirs = reference_tower(folder, torch.bfloat16, **options).state_dict()
    for name, tensor in open_checkpoint(folder).tower_tensors():
        assert torch.equal(tensor[...].bfloat16(), theirs[name]), name


def test_transformers_dequantises_fp8_to_the_same(plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers' quantisers need it")
    config = transformers.FineGrainedFP8Config(
        dequantize=True,
        weight_block_size=(8, 8),  # it takes no blocks that end beyond a weight
        modules_to_not_convert=["language_model", "lm_head"],
    )
    scheme = Scheme(config.to_dict(), fixed(8, 8), scale_name="weight_scale_inv")
    folder, _ = quantised(plain, tmp_path / "fp8", scheme)
    same_as_transformers(folder, quantization_config=config)


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_compressed_tensors_decompresses_to_the_same(
    plain: Path, tmp_path: Path, strategy: str
) -> None:
    pytest.importorskip("compressed_tensors")
    folder, _ = quantised(plain, tmp_path / "fp8", SCHEMES[f"compressed {strategy}"])
    data = json.loads((folder / "config.json").read_text())["quantization_config"]
    data["ignore"] = ["lm_head", "re:.*language_model.*"]
    edit(folder, lambda _: None, quantization_config=data)
    config = transformers.CompressedTensorsConfig(run_compressed=False, **data)
    same_as_transformers(folder, quantization_config=config)


# A tower left as it was


@pytest.mark.parametrize("method", ["fp8", "awq", "gptq", "compressed-tensors", "modelopt"])
def test_a_tower_in_bfloat16_loads_whatever_the_rest_is(copy: Path, method: str) -> None:
    layer = "model.language_model.layers.0.mlp.down_proj"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop(f"{layer}.weight")
        for last in ("qweight", "qzeros", "weight_packed"):
            tensors[f"{layer}.{last}"] = torch.zeros(4, 4, dtype=torch.int32)
        tensors[f"{layer}.weight_scale"] = torch.ones(4)

    edit(copy, change, quantization_config={"quant_method": method, "ignore": ["visual"]})
    checkpoint = open_checkpoint(copy)
    tensors = dict(checkpoint.tower_tensors())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors.keys() == reference_tower_names(copy)


def reference_tower_names(folder: Path) -> set[str]:
    names = load_file(folder / "model.safetensors")
    return {name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)}


# What is refused

QKV = f"{PREFIX}blocks.0.attn.qkv"


def packed(*lasts: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if is_linear(name, tensors[name])]:
            module = name.removesuffix(".weight")
            tensors.pop(name)
            for last in lasts:
                tensors[f"{module}.{last}"] = torch.zeros(4, 4, dtype=torch.int32)

    return change


def stored_as(
    dtype: torch.dtype, scale: Tensor | None = None
) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{QKV}.weight"] = tensors[f"{QKV}.weight"].to(dtype)
        if scale is not None:
            tensors[f"{QKV}.weight_scale"] = scale

    return change


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        ("awq", packed("qweight", "qzeros"), "blocks.0.attn.proj.qweight (I32) and "),
        ("gptq", packed("g_idx", "qweight"), "blocks.0.attn.proj.g_idx (I32) and "),
        ("compressed-tensors", packed("weight_packed"), "attn.proj.weight_packed (I32) and "),
        ("modelopt", stored_as(torch.uint8, torch.ones(4, 4)), f"{QKV}.weight (U8); its"),
        ("bitsandbytes", stored_as(torch.int8), f"{QKV}.weight (I8); its"),
        ("fp8", stored_as(torch.float8_e4m3fn), f"{QKV}.weight (F8_E4M3); its"),
        ("fp8", stored_as(torch.float8_e5m2, torch.ones(1)), f"{QKV}.weight (F8_E5M2); its"),
        (
            "mxfp8",
            stored_as(torch.float8_e4m3fn, torch.ones(288, 3, dtype=torch.uint8)),
            f"{QKV}.weight (F8_E4M3) and 1 more",
        ),
    ],
)
def test_other_schemes_are_named(
    copy: Path, method: str, change: Callable[[dict[str, Tensor]], None], said: str
) -> None:
    edit(copy, change, quantization_config={"quant_method": method})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(copy)
    assert f"quant_method {method!r}" in str(caught.value)
    assert said in str(caught.value)


def test_scales_that_do_not_fit(copy: Path) -> None:
    edit(copy, stored_as(torch.float8_e4m3fn, torch.ones(7, 5)))
    with pytest.raises(CheckpointError, match=r"qkv.weight_scale of shape \[7, 5\] does not go"):
        open_checkpoint(copy).tower_tensors()


def test_scales_of_a_weight_that_needs_none(copy: Path) -> None:
    edit(copy, stored_as(torch.bfloat16, torch.ones(1)))
    with pytest.raises(CheckpointError, match=f"left over .1.: {QKV}.weight_scale"):
        open_checkpoint(copy).tower_tensors()
