"""A vision-only checkpoint: the same bytes, in one file, for vitrt and for transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import FAMILIES, reference_tower, tiny_checkpoint, tower_class
from vitrt.checkpoint import extract
from vitrt.checkpoint.extract import extract_tower
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.checkpoint.shards import CheckpointError

FILES = ["config.json", "model.safetensors", "preprocessor_config.json"]


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tower(family: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(family, tmp_path / "source")
    opened = open_checkpoint(source)
    folder = extract_tower(opened, tmp_path / "new" / "tower")
    assert sorted(path.name for path in folder.iterdir()) == FILES
    again = open_checkpoint(folder)
    assert again.vision_config() == opened.vision_config()
    assert again.preprocessor == opened.preprocessor
    assert {name: info.full_name for name, info in again.tensors.items()} == {
        name: name for name in opened.tensors
    }
    # Read by safetensors itself, not by our own reader.
    tensors = load_file(folder / "model.safetensors")
    expected = reference_tower(source).state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_tower_loads_it(family: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(family, tmp_path / "source")
    folder = extract_tower(open_checkpoint(source), tmp_path / "tower")
    tower, info = tower_class(family).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    expected = reference_tower(source).state_dict()
    assert tower.state_dict().keys() == expected.keys()
    assert all(torch.equal(tower.state_dict()[name], expected[name]) for name in expected)


def test_dtypes_are_kept_one_by_one(tmp_path: Path) -> None:
    source = tiny_checkpoint("qwen3_vl", tmp_path / "source", dtype=torch.bfloat16, shards=1)
    file = source / "model.safetensors"
    tensors = load_file(file)
    norm = "model.visual.blocks.0.norm1.weight"
    tensors[norm] = tensors[norm].float() + 1e-5  # not a bfloat16
    save_file(tensors, file)
    out = load_file(extract_tower(open_checkpoint(source), tmp_path / "out") / "model.safetensors")
    assert {str(tensor.dtype) for tensor in out.values()} == {"torch.bfloat16", "torch.float32"}
    for name, tensor in out.items():
        original = tensors[f"model.visual.{name}"]
        assert tensor.dtype == original.dtype
        assert torch.equal(tensor, original)


def test_refuses_to_mix_with_other_files(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_qwen3_vl)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is not empty \(config.json, notes.txt\)"):
        extract_tower(checkpoint, tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"
    extract_tower(checkpoint, tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert open_checkpoint(tmp_path).vision_config() == checkpoint.vision_config()


def test_an_empty_folder_is_fine(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    extract_tower(open_checkpoint(tiny_qwen3_vl), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES


@pytest.mark.parametrize("overwrite", [False, True])
def test_never_over_its_own_source(tiny_qwen3_vl: Path, tmp_path: Path, overwrite: bool) -> None:
    source = shutil.copytree(tiny_qwen3_vl, tmp_path / "source")
    with pytest.raises(CheckpointError, match="is the checkpoint itself"):
        extract_tower(open_checkpoint(source), source, overwrite=overwrite)


def test_output_that_cannot_be(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_qwen3_vl)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: is a file"):
        extract_tower(checkpoint, tmp_path / "file")
    with pytest.raises(CheckpointError, match="file/out: cannot be written"):
        extract_tower(checkpoint, tmp_path / "file" / "out")


def test_an_incomplete_tower_is_not_extracted(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_qwen3_vl, tmp_path / "source"))
    index = source / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"]["model.visual.pos_embed.weight"]
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"missing \(1\): pos_embed.weight"):
        extract_tower(open_checkpoint(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing(
    tiny_qwen3_vl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny_qwen3_vl)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(extract, "_pieces", full)
    with pytest.raises(CheckpointError, match="out: cannot be written: No space left on device"):
        extract_tower(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


MEASURE = """
import sys, torch
from vitrt.checkpoint.extract import extract_tower
from vitrt.models.families import build_tower
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.engine.loader import fill_tower

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

def extract_and_load(source, output):
    extract_tower(open_checkpoint(source), output)
    yield peak()
    checkpoint = open_checkpoint(output)
    with torch.device("meta"):
        tower = build_tower(checkpoint.vision_config()).bfloat16()
    fill_tower(tower.to_empty(device="cpu"), checkpoint.tower_tensors())
    yield peak()

tiny, source, folder = sys.argv[1:]
before = list(extract_and_load(tiny, folder + "/tiny"))[-1]  # what PyTorch loads at first use
for measured in extract_and_load(source, folder + "/out"):
    print(measured - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_extracting_and_loading(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    """Bar: 1.3 x the tower. Measured as growth of the peak resident size, file pages included."""
    source = tiny_checkpoint(
        "qwen3_vl",
        tmp_path / "source",
        dtype=torch.bfloat16,
        hidden_size=1024,
        intermediate_size=4096,
        depth=4,
        deepstack_visual_indexes=[1],
    )
    tower = open_checkpoint(source).num_bytes
    assert tower > 150e6
    command = [sys.executable, "-c", MEASURE, str(tiny_qwen3_vl), str(source), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    extracting, loading = (int(line) / tower for line in done.stdout.split())
    assert extracting < 0.3, f"{extracting:.2f} x the tower"
    assert loading < 1.3, f"{loading:.2f} x the tower"
