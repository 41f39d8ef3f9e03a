"""One loader: towers filled from files, from memory and in parts, all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.checkpoints import reference_tower, tiny_checkpoint
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.config import VisionConfig
from vitrt.engine.loader import load_tower
from vitrt.parallel.context import SINGLE, ParallelContext

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
RANKS = [SINGLE, *(ParallelContext(tp_rank=rank, tp_size=2) for rank in range(2))]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def config(folder: Path) -> VisionConfig:
    return open_checkpoint(folder).vision_config()


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, Tensor]:
    """As transformers' own tower holds them."""
    return {name: p.detach() for name, p in reference_tower(folder).named_parameters()}


@pytest.mark.parametrize("parallel", RANKS, ids=["whole", "rank 0", "rank 1"])
def test_memory_and_files_fill_a_tower_alike(
    folder: Path, config: VisionConfig, weights: dict[str, Tensor], parallel: ParallelContext
) -> None:
    """In any order, from an iterator that is gone through once, whole or as a rank's part."""
    stored = open_checkpoint(folder).tower_tensors()
    from_files = load_tower(config, stored, **CPU, parallel=parallel)
    pairs = iter(sorted(weights.items(), reverse=True))
    from_memory = load_tower(config, pairs, **CPU, parallel=parallel)
    for (name, got), (_, want) in zip(
        from_memory.named_parameters(), from_files.named_parameters(), strict=True
    ):
        assert torch.equal(got, want), name
        assert got.untyped_storage().data_ptr() not in {
            tensor.untyped_storage().data_ptr() for tensor in weights.values()
        }


@pytest.mark.parametrize("parallel", RANKS, ids=["whole", "rank 0", "rank 1"])
def test_what_is_laid_out_alike_is_shared(
    config: VisionConfig, weights: dict[str, Tensor], parallel: ParallelContext
) -> None:
    """Where it is whole, in the tower's dtype and in one piece."""
    own = {tensor.data_ptr(): name for name, tensor in weights.items()}
    shared = load_tower(config, weights.items(), **CPU, parallel=parallel, share=True)
    taken = {own[p.data_ptr()] for p in shared.parameters() if p.data_ptr() in own}
    assert "patch_embed.proj.weight" in taken
    assert ("blocks.0.attn.qkv.weight" in taken) == (parallel.tp_size == 1)
    alone = load_tower(config, weights.items(), **CPU, parallel=parallel)
    for got, want in zip(shared.parameters(), alone.parameters(), strict=True):
        assert torch.equal(got, want)
    turned = {
        name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor.double()
        for name, tensor in weights.items()
    }
    copied = load_tower(config, turned.items(), **CPU, parallel=parallel, share=True)
    ptrs = {tensor.data_ptr() for tensor in turned.values()}
    assert not any(p.data_ptr() in ptrs for p in copied.parameters())
    for got, want in zip(copied.parameters(), alone.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("share", [False, True])
def test_every_wrong_name_is_listed(
    config: VisionConfig, weights: dict[str, Tensor], share: bool
) -> None:
    broken = {**weights, "extra.bias": torch.zeros(2)}
    gone = [broken.pop(f"blocks.{index}.norm1.weight") for index in (1, 4)]
    broken["blocks.0.norm2.weight"] = gone[0][:-1]
    pairs = [*broken.items(), ("blocks.2.norm1.weight", weights["blocks.2.norm1.weight"])]
    with pytest.raises(ValueError, match="not those of its config") as caught:
        load_tower(config, pairs, **CPU, share=share)
    width = config.hidden_size
    for line in (
        "missing (2): blocks.1.norm1.weight, blocks.4.norm1.weight",
        "left over (1): extra.bias",
        "given twice (1): blocks.2.norm1.weight",
        f"wrong shape (1): blocks.0.norm2.weight is [{width - 1}], should be [{width}]",
    ):
        assert line in str(caught.value)
