"""With batch_invariant=True an image's features are the same bits, whatever else is in a batch."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.commands import Vitrt, vitrt
from tests.support.folders import IDENTITY, photo
from vitrt import VisionEncoder
from vitrt.attention import AttentionChoice, registry, resolve_attention
from vitrt.attention.triton import SPEC as TRITON
from vitrt.config import RuntimeConfig
from vitrt.layers.linear import Linear
from vitrt.models.families import build_tower
from vitrt.parallel.context import ParallelContext

__all__ = ["vitrt"]  # a fixture


def test_refused_on_a_cpu(tiny_qwen3_vl: Path, tmp_path: Path, vitrt: Vitrt):
    with pytest.raises(ValueError, match="batch_invariant=True needs a CUDA device"):
        VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu", batch_invariant=True)
    photo(tmp_path / "a.png", 0, 64, 64)
    arguments = ("--device", "cpu", "--batch-invariant", "--output", tmp_path / "out")
    done = vitrt("encode", tiny_qwen3_vl, tmp_path / "a.png", *arguments)
    assert done.code == 1 and "batch_invariant=True needs a CUDA device" in done.err


def test_not_beside_fp8():
    with pytest.raises(ValueError, match=r"batch_invariant .*fp8"):
        RuntimeConfig(batch_invariant=True, precision="fp8")


def test_it_is_part_of_a_run():
    other = replace(IDENTITY, batch_invariant=True)
    assert other.differences(IDENTITY.metadata()) and not IDENTITY.differences(IDENTITY.metadata())
    older = {k: v for k, v in IDENTITY.metadata().items() if k != "batch_invariant"}
    assert not IDENTITY.differences(older) and other.differences(older)


def test_every_product_of_a_tower_is_fixed(tiny_qwen2_5_vl: Path):
    encoder = VisionEncoder.from_pretrained(tiny_qwen2_5_vl, device="cpu")
    products = [each for each in encoder.tower.modules() if isinstance(each, Linear)]
    assert not any(each.fixed for each in products)
    encoder.tower.fix_products()
    assert len(products) > 4 * encoder.config.depth and all(each.fixed for each in products)


def test_ranks_that_share_a_tower_are_refused(tiny_qwen3_vl: Path):
    whole = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu")
    shared = build_tower(whole.config, ParallelContext(tp_size=2))
    with pytest.raises(ValueError, match="whole towers only"):
        shared.fix_products()


class Scheduling:
    """A backend that lays out its work by what is in a batch."""

    name = "fa4"
    capturable = True
    applies_rotary = False

    def schedule(self, lengths: tuple[int, ...], heads: int) -> None:
        raise AssertionError("asked how to lay out a batch")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where FA4 and our kernels could run."""
    able = {"fa4", "triton", "fa3", "sdpa", "fa2"}
    monkeypatch.setattr(registry, "cuda_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        registry, "usable", lambda *a: [(n, None if n in able else "no") for n in registry._SPECS]
    )
    real = registry.get_backend

    def get_backend(name: str, **where: object) -> object:
        own = TRITON.load(torch.device("cuda"), torch.bfloat16, 72)
        backends = {"fa4": Scheduling(), "triton": own}
        return backends.get(name) or real(name, **where)  # type: ignore[arg-type]

    monkeypatch.setattr(registry, "get_backend", get_backend)


def choice(name: str) -> AttentionChoice:
    return resolve_attention(
        name, device="cuda", dtype=torch.bfloat16, head_dim=72, batch_invariant=True
    )


def test_one_attention_for_every_length(hopper: None):
    chosen = choice("auto")
    for lengths in ([64], [784] * 3, [16384, 64]):
        batch = chosen.for_batch(lengths, 16)
        assert batch.choice.full.name == "fa4" and batch.schedule is None
    assert choice("triton").full.name == "triton"
    with pytest.raises(ValueError, match="'sdpa' is not known to be batch-invariant"):
        choice("sdpa")


def test_elsewhere_our_own_attention(hopper: None, monkeypatch: pytest.MonkeyPatch):
    """FA4 on Blackwell takes its blocks by the longest segment of a batch."""
    monkeypatch.setattr(registry, "cuda_capability", lambda device: (10, 0))
    assert choice("auto").full.name == "triton"
    with pytest.raises(ValueError, match="'fa4' is not known"):
        choice("fa4")


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["auto", "triton"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_alone_in_batches_and_in_graphs(
    family: str, attention: str, request: pytest.FixtureRequest
):
    """200 images of random sizes: one at a time, in random batches, with graphs and without."""
    folder = request.getfixturevalue(f"tiny_{family}")
    draw = np.random.default_rng(0)
    images = [
        draw.integers(0, 256, (*draw.integers(28, 700, 2), 3), dtype=np.uint8) for _ in range(200)
    ]
    shuffle = random.Random(1)
    expected: list[torch.Tensor] | None = None
    for graphs in (False, True):
        encoder = VisionEncoder.from_pretrained(
            folder, attention=attention, cuda_graphs=graphs, batch_invariant=True
        )
        alone = [encoder.encode([image])[0].concatenated().cpu() for image in images]
        if expected is None:
            expected = alone
        assert all(map(torch.equal, alone, expected))
        for _ in range(3):
            order = list(range(len(images)))
            shuffle.shuffle(order)
            while order:
                taken = [order.pop() for _ in range(min(shuffle.randint(1, 24), len(order)))]
                together = encoder.encode([images[index] for index in taken])
                for index, features in zip(taken, together, strict=True):
                    assert torch.equal(features.concatenated().cpu(), expected[index])
        if graphs:
            assert encoder.engine.stats().hits.total() > 0
