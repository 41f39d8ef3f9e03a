"""A PEFT LoRA over a checkpoint: merged into the tower as PEFT merges it, or refused by name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoints import reference_model, tiny_checkpoint
from tests.support.commands import Vitrt, vitrt
from vitrt import FeatureStore, VisionEncoder
from vitrt.checkpoint.extract import extract_tower
from vitrt.checkpoint.fingerprint import fingerprint
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.checkpoint.shards import CheckpointError

__all__ = ["vitrt"]  # a fixture

MODULE = "model.visual.blocks.1.attn.qkv"
NAME = "blocks.1.attn.qkv.weight"
RANK = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    return tiny_checkpoint("qwen3_vl", folder, depth=2, deepstack_visual_indexes=[0])


def random(*shape: int) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def pair(module: str, rows: int, columns: int, rank: int = RANK) -> dict[str, Tensor]:
    """What LoRA trains for a linear layer."""
    key = f"base_model.model.{module}"
    return {
        f"{key}.lora_A.weight": random(rank, columns),
        f"{key}.lora_B.weight": random(rows, rank),
    }


def write_adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir()
    given = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "base_model_name_or_path": "x/y"}
    (folder / "adapter_config.json").write_text(json.dumps(given | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def tower(base: Path, adapter: Path | None) -> dict[str, Tensor]:
    opened = open_checkpoint(base, adapter=adapter)
    return {name: tensor[...] for name, tensor in opened.tower_tensors()}


def delta(tensors: dict[str, Tensor], scaling: float) -> Tensor:
    """Written out: the sum over the rank."""
    a, b = tensors.values()
    return scaling * sum(torch.outer(b[:, k], a[k]) for k in range(len(a)))  # type: ignore[return-value]


def close(found: Tensor, expected: Tensor) -> bool:
    """To a few roundings of float32: the order of sums is the library's own."""
    return torch.allclose(found, expected, rtol=0, atol=4 * 2**-24 * float(expected.abs().max()))


# What is merged


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 6 / 4),
        ({"use_rslora": True}, 6 / math.sqrt(4)),
        ({"alpha_pattern": {"attn.qkv": 10}}, 10 / 4),
        ({"alpha_pattern": {r"blocks\.[0-9]+\.attn\.qkv": 10, "qkv": 3}}, 10 / 4),
        ({"alpha_pattern": {"blocks.0.attn.qkv": 10}}, 6 / 4),
        ({"alpha_pattern": {"kv": 10}}, 6 / 4),  # whole parts of a name only
        ({"r": 64, "rank_pattern": {"qkv": 4}}, 6 / 4),
        ({"fan_in_fan_out": True}, 6 / 4),  # PEFT takes no notice of it for nn.Linear
        ({"init_lora_weights": "gaussian", "lora_dropout": 0.1, "use_dora": False}, 6 / 4),
    ],
)
def test_scaling(base: Path, tmp_path: Path, config: dict[str, Any], scaling: float) -> None:
    tensors = pair(MODULE, 288, 96)
    found = tower(base, write_adapter(tmp_path / "lora", tensors, **config))
    plain = tower(base, None)
    assert close(found[NAME], plain[NAME] + delta(tensors, scaling))
    assert not close(found[NAME], plain[NAME])
    assert all(torch.equal(found[name], plain[name]) for name in plain if name != NAME)


@pytest.mark.parametrize("prefix", ["visual.", "model.visual.", "thinker.visual.", ""])
def test_names_under_any_prefix(base: Path, tmp_path: Path, prefix: str) -> None:
    """Adapters are named after the module tree of the transformers that they were trained with."""
    tensors = pair(f"{prefix}blocks.1.attn.qkv", 288, 96)
    found = tower(base, write_adapter(tmp_path / "lora", tensors))
    assert close(found[NAME], tower(base, None)[NAME] + delta(tensors, 1.5))


def test_parts_of_a_rank_are_those_of_the_whole(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "lora", pair(MODULE, 288, 96))
    tensor = dict(open_checkpoint(base, adapter=adapter).tower_tensors())[NAME]
    whole = tensor[...]
    assert torch.equal(tensor[96:192], whole[96:192])
    assert torch.equal(tensor[:, 24:48], whole[:, 24:48])


def test_whole_tensors_take_the_place_of_the_base(base: Path, tmp_path: Path) -> None:
    """modules_to_save, and biases where they are trained."""
    key = "base_model.model.model.visual"
    tensors = {
        f"{key}.merger.linear_fc2.weight": random(64, 384),
        f"{key}.merger.linear_fc2.bias": random(64),
        f"{key}.blocks.0.mlp.linear_fc1.base_layer.bias": random(200),
    }
    found = tower(base, write_adapter(tmp_path / "lora", tensors, bias="all"))
    assert torch.equal(found["merger.linear_fc2.weight"], random(64, 384))
    assert torch.equal(found["merger.linear_fc2.bias"], random(64))
    assert torch.equal(found["blocks.0.mlp.linear_fc1.bias"], random(200))


def test_extracted_merged_in_the_dtype_of_the_base(tmp_path: Path) -> None:
    folder = tiny_checkpoint("qwen3_vl", tmp_path / "base", dtype=torch.bfloat16, shards=1)
    adapter = write_adapter(tmp_path / "lora", pair(MODULE, 288, 96))
    opened = open_checkpoint(folder, adapter=adapter)
    out = extract_tower(opened, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    assert torch.equal(tensors[NAME], tower(folder, adapter)[NAME].bfloat16())
    again = {name: tensor[...] for name, tensor in open_checkpoint(out).tower_tensors()}
    assert torch.equal(again[NAME], tensors[NAME])


def test_encoder_and_run_identity(base: Path, tmp_path: Path) -> None:
    """Features are those of the merged checkpoint, and a run with an adapter is another run."""
    image = torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8).numpy()
    adapter = write_adapter(tmp_path / "lora", pair(MODULE, 288, 96))
    merged = extract_tower(open_checkpoint(base, adapter=adapter), tmp_path / "out")
    models = {"adapter": (base, adapter), "merged": (merged, None), "base": (base, None)}
    features = {
        name: VisionEncoder.from_pretrained(model, adapter=lora, device="cpu").encode([image])[0]
        for name, (model, lora) in models.items()
    }
    assert torch.equal(features["adapter"].embeddings, features["merged"].embeddings)
    assert not torch.allclose(features["adapter"].embeddings, features["base"].embeddings)
    scaled = write_adapter(tmp_path / "scaled", pair(MODULE, 288, 96), lora_alpha=7)
    other = write_adapter(tmp_path / "other", pair(MODULE.replace("1", "0"), 288, 96))
    prints = {
        fingerprint(open_checkpoint(base, adapter=lora)) for lora in (None, adapter, scaled, other)
    }
    assert len(prints) == 4
    moved = shutil.copytree(adapter, tmp_path / "moved")
    again = fingerprint(open_checkpoint(base, adapter=moved))
    assert again == fingerprint(open_checkpoint(base, adapter=adapter))


def test_command_line(base: Path, tmp_path: Path, vitrt: Vitrt) -> None:
    """Into a folder of features without the adapter, a run with it is refused."""
    adapter = write_adapter(tmp_path / "lora", pair(MODULE, 288, 96))
    Image.new("RGB", (64, 64), "green").save(tmp_path / "a.png")
    run = ("encode", base, tmp_path / "a.png", "--device", "cpu", "--output")
    assert vitrt(*run, tmp_path / "out").code == 0
    mixed = vitrt(*run, tmp_path / "out", "--adapter", adapter)
    assert mixed.code == 1 and "weights" in mixed.err
    assert vitrt(*run, tmp_path / "other", "--adapter", adapter).code == 0
    plain, adapted = (FeatureStore(tmp_path / name)["a.png"] for name in ("out", "other"))
    assert not torch.allclose(plain.embeddings, adapted.embeddings)
    assert vitrt("extract", base, "--adapter", adapter, "--output", tmp_path / "tower").code == 0
    extracted = load_file(tmp_path / "tower" / "model.safetensors")[NAME]
    assert torch.equal(extracted, tower(base, adapter)[NAME])
    unknown = vitrt("info", base, "--adapter", tmp_path)
    assert unknown.code == 1 and "adapter_config.json" in unknown.err


def test_fingerprints_stay_what_they_were(tmp_path: Path) -> None:
    """A run over a folder is carried on by later versions: recorded from earlier ones."""
    for family, recorded in {
        "qwen2_5_vl": "cf7444426b34fbab",
        "qwen3_vl": "b1b99769c6b63170",
    }.items():
        folder = tiny_checkpoint(family, tmp_path / family, shards=1)
        tensors = load_file(folder / "model.safetensors")
        for number, (name, tensor) in enumerate(sorted(tensors.items())):
            values = torch.arange(tensor.numel(), dtype=torch.float32).view(tensor.shape)
            tensors[name] = values + number
        save_file(tensors, folder / "model.safetensors")
        assert fingerprint(open_checkpoint(folder)) == recorded


# What is refused


def refused(base: Path, adapter: Path, *said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        tower(base, adapter)
    for part in (adapter.name, *said):
        assert part in str(caught.value)


def test_one_that_leaves_the_tower_alone(base: Path, tmp_path: Path) -> None:
    layer = "model.language_model.layers.0.self_attn.q_proj"
    adapter = write_adapter(tmp_path / "lora", pair(layer, 64, 64), use_dora=True)
    refused(base, adapter, "touches nothing of the vision tower", layer)


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1, 2]},
        {"layer_replication": [[0, 4]]},
        {"target_parameters": ["mlp.experts"]},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"peft_type": "LOHA"},
    ],
    ids=str,
)
def test_other_kinds_are_named(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    adapter = write_adapter(tmp_path / "lora", pair(MODULE, 288, 96), **config)
    ((key, value),) = config.items()
    refused(base, adapter, f"{key} {value!r}", "not supported")


def test_tensors_that_no_tower_has(base: Path, tmp_path: Path) -> None:
    unknown = f"base_model.model.{MODULE}.lora_magnitude_vector"
    adapter = write_adapter(tmp_path / "lora", pair(MODULE, 288, 96) | {unknown: random(288)})
    refused(base, adapter, "not known of a tower", unknown)


def test_two_towers(base: Path, tmp_path: Path) -> None:
    tensors = pair(MODULE, 288, 96) | pair(f"draft.{MODULE}", 288, 96)
    refused(base, write_adapter(tmp_path / "lora", tensors), "'draft.model.visual.'")


@pytest.mark.parametrize(
    "tensors", [pair(MODULE, 96, 96), pair(MODULE, 288, 95)], ids=["rows", "columns"]
)
def test_shapes_of_another_tower(base: Path, tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    adapter = write_adapter(tmp_path / "lora", tensors)
    with pytest.raises(CheckpointError, match=r"qkv.weight \[288, 96\] does not go .*lora_A"):
        tower(base, adapter)


def test_half_a_pair(base: Path, tmp_path: Path) -> None:
    tensors = pair(MODULE, 288, 96)
    tensors.popitem()
    with pytest.raises(CheckpointError, match=r"qkv.weight \[288, 96\] does not go .*lora_A"):
        tower(base, write_adapter(tmp_path / "lora", tensors))


def test_no_adapter(base: Path, tmp_path: Path) -> None:
    refused(base, base, "adapter_config.json")
    adapter = write_adapter(tmp_path / "lora", {"x": torch.zeros(1)})
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(base, adapter, "holds no adapter_model.safetensors")


# As PEFT itself merges

RECORDED = Path(__file__).with_name("merged_by_peft.json")
LINEAR = r".*visual.*\.(qkv|proj|linear_fc1|linear_fc2)"  # proj is the patch convolution's name too
LORAS: dict[str, dict[str, Any]] = {
    "linear and convolution": {"target_modules": LINEAR},
    "embedding": {"target_modules": r".*visual.pos_embed"},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"qkv": 2, r"blocks.1.*fc1": 8},
        "alpha_pattern": {"blocks.0.attn.proj": 32, "qkv": 5},
    },
    "all biases": {"target_modules": LINEAR, "bias": "all"},
    "its own biases": {"target_modules": r".*visual.*\.qkv", "bias": "lora_only"},
    "lora_bias": {"target_modules": r".*visual.*\.(qkv|linear_fc1)", "lora_bias": True},
    "modules_to_save": {
        "target_modules": r".*visual.*\.qkv",
        "modules_to_save": ["merger", "pos_embed"],
    },
    "fan_in_fan_out": {"target_modules": r".*visual.*\.qkv", "fan_in_fan_out": True},
}
each_lora = pytest.mark.parametrize("case", LORAS)


def waves(key: str, shape: Sequence[int]) -> Tensor:
    """Numbers that need no generator of any library's version."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.3 * torch.sin(steps * 0.7 + len(key))).float().view(*shape)


def wavy_base(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    tiny_checkpoint(
        "qwen3_vl", folder, dtype=dtype, shards=1, depth=2, deepstack_visual_indexes=[0]
    )
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: waves(name, tensor.shape).to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def wavy_adapter(folder: Path, keys: Mapping[str, Sequence[int]], case: str) -> Path:
    config = {"r": 4, "lora_alpha": 6} | LORAS[case]
    return write_adapter(folder, {key: waves(key, keys[key]) for key in keys}, **config)


def some(tensor: Tensor) -> Tensor:
    """Five values of a tensor, from all over it."""
    return tensor.flatten()[torch.linspace(0, tensor.numel() - 1, 5).long()]


@each_lora
def test_as_peft_merged(tmp_path: Path, case: str) -> None:
    """Against values that PEFT 0.21.2 gave."""
    recorded = json.loads(RECORDED.read_text())[case]
    base = wavy_base(tmp_path / "base")
    found = tower(base, wavy_adapter(tmp_path / "lora", recorded["keys"], case))
    plain = tower(base, None)
    changed = {name for name in found if not torch.equal(found[name], plain[name])}
    assert changed == recorded["changed"].keys()
    for name, values in recorded["changed"].items():
        assert torch.allclose(some(found[name]), torch.tensor(values), rtol=1e-6, atol=1e-6), name


def merged_by_peft(base: Path, lora: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    peft = pytest.importorskip("peft")
    model = peft.PeftModel.from_pretrained(reference_model(base, dtype), lora)
    return model.merge_and_unload().model.visual.state_dict()


def record(tmp_path: Path) -> None:
    """Write `RECORDED`, with PEFT."""
    peft = pytest.importorskip("peft")
    base = wavy_base(tmp_path / "base")
    plain = tower(base, None)
    said = {}
    for case, options in LORAS.items():
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | options)
        peft.get_peft_model(reference_model(base), config).save_pretrained(tmp_path / "keys")
        saved = load_file(tmp_path / "keys" / "adapter_model.safetensors")
        keys = {key: list(tensor.shape) for key, tensor in saved.items() if "visual" in key}
        lora = wavy_adapter(tmp_path / case, keys, case)
        merged = merged_by_peft(base, lora, torch.float32)
        changed = [name for name in merged if not torch.equal(merged[name], plain[name])]
        values = {name: some(merged[name]).tolist() for name in changed}
        said[case] = {"keys": keys, "changed": values}
    lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(each)}" for case, each in said.items())
    RECORDED.write_text(f"{{\n{lines}\n}}\n")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_lora
def test_as_peft_merges(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    """All values, beside PEFT, where it is installed."""
    pytest.importorskip("peft")
    base = wavy_base(tmp_path / "base", dtype)
    keys = json.loads(RECORDED.read_text())[case]["keys"]
    lora = wavy_adapter(tmp_path / "lora", keys, case)
    expected = merged_by_peft(base, lora, dtype)
    plain = tower(base, None)
    for name, tensor in tower(base, lora).items():
        # One rounding of either dtype apart where sums in float32 were ordered otherwise.
        size = expected[name].float().abs()
        if "embed" in name:  # what it adds to an embedding, PEFT rounds before it is added
            size = size + plain[name].float().abs()
        step = torch.finfo(dtype).eps * size + 1e-6
        apart = (tensor.to(dtype).float() - expected[name].float()).abs()
        assert (apart <= step).all(), name
