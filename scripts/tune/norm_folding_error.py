#!/usr/bin/env python3
"""What it costs in accuracy to fold a block's norms into the products around them. Runs on a CPU.

    python scripts/tune/norm_folding_error.py [--models qwen3-vl-8b,qwen2.5-vl-7b] [--depth 4]

The product that adds to the residual would leave a bfloat16 copy of the sum and each row's sum and
sum of squares; the next product takes the copy, and its epilogue the rest of the norm (see
folded_norm.py beside this). Three ways, in towers of full width whose weights are random, with what
real towers have: norm weights far from one, a massive channel, an offset that all channels share.

    weights   the norm's weight times the product's, rounded to bfloat16 once more
    rows      the norm's weight times the copy, before its one rounding
    shifted   the same, less the row's mean at the norm before, so that an offset cancels early

Errors are relative L2 against transformers in float32, over the error of transformers in bfloat16;
the project's bound is 0.85. Attention is float32 inside, as in every backend.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from vitrt import VisionEncoder
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.compare.errors import Output, compare, float32_reference
from vitrt.compare.reference import (
    build_tower,
    find_model,
    float32_copy,
    save_checkpoint,
)
from vitrt.config import RuntimeConfig
from vitrt.kernels.gemm import linear_ref
from vitrt.layers.norm import EPS, Norm

BOUND = 0.85
TILE_N = 128  # columns whose sums one block of the product writes
GRIDS = ((1, 12, 16), (1, 8, 8))


@dataclass(frozen=True)
class Case:
    """What is done to random weights."""

    name: str
    massive: float = 0.0  # one channel, times what the others have
    everywhere: bool = True  # by a bias, in every row alike; else by what a row holds
    spread: float = 0.5  # deviation of the logarithm of the norms' weights
    offset: float = 0.0  # of all channels, in standard deviations
    damped: bool = False  # the norms' weights take the massive channel back


CASES = (
    Case("plain, weights of norms near 1", spread=0.1),
    Case("norm weights spread"),
    *(Case(f"massive {factor:g}, every row", float(factor)) for factor in (50, 200, 1000)),
    *(Case(f"massive {factor:g}, by row", float(factor), False) for factor in (50, 1000)),
    Case("massive 1000, damped by the norms", 1000.0, damped=True),
    *(Case(f"offset of {offset:g} deviations", offset=float(offset)) for offset in (1, 4, 16)),
)


def alter(tower: nn.Module, case: Case, seed: int) -> None:
    """Change transformers' tower in place."""
    generator = torch.Generator().manual_seed(2 * seed + 1)
    blocks: Any = tower.blocks
    channel = 7
    with torch.no_grad():
        for block in blocks:
            for norm in (block.norm1, block.norm2):
                weight = torch.randn(norm.weight.shape, generator=generator) * case.spread
                norm.weight.copy_(weight.exp())
                if case.damped:
                    norm.weight[channel] /= case.massive
        last = _last(blocks[0].mlp)
        if case.massive and case.everywhere:
            last.bias[channel] += case.massive
        elif case.massive:
            last.weight[channel] *= case.massive
        if case.offset:
            last.bias += case.offset


def _last(mlp: nn.Module) -> Any:
    return next(
        getattr(mlp, name) for name in ("linear_fc2", "down_proj", "fc2") if hasattr(mlp, name)
    )


@dataclass(frozen=True)
class Folded:
    """What a folded norm leaves beside the copy."""

    norm: Norm
    inverse: Tensor  # 1 / std (or rms) of each row
    mean: Tensor  # of what the copy was taken of


def fold(norm: Norm, way: str, residual: Tensor, before: Tensor | None) -> tuple[Tensor, Folded]:
    """The bfloat16 copy of `residual`, and what the next product's epilogue needs.

    `before`: the rows' means at the norm before, which LayerNorm alone does not see.
    """
    values = residual.float()
    if way == "shifted" and before is not None and norm.bias is not None:
        values = values - before[:, None]
    width = values.shape[1]
    total, squares = torch.zeros(2, len(values))
    for part in values.split(TILE_N, dim=1):  # as blocks of the product sum them
        total += part.sum(dim=1)
        squares += (part * part).sum(dim=1)
    mean = total / width
    variance = squares / width
    if norm.bias is not None:
        variance = variance - mean * mean
    copy = values if way == "weights" else values * norm.weight.float()
    inverse = torch.rsqrt(variance.clamp_min(0) + EPS)
    return copy.to(norm.weight.dtype), Folded(norm, inverse, mean)


def product(way: str, x: Tensor, own: Folded, weight: Tensor, bias: Tensor, kind: Any) -> Tensor:
    """A product of a folded norm's copy, with one rounding behind it."""
    scale = own.norm.weight.float()
    used, columns = weight, weight.float() @ scale
    if way == "weights":
        used = (weight.float() * scale).to(weight.dtype)
        columns = used.float().sum(dim=1)
    acc = x.float() @ used.float().t() * own.inverse[:, None]
    added = bias.float()
    if own.norm.bias is not None:
        acc = acc - (own.inverse * own.mean)[:, None] * columns
        added = added + weight.float() @ own.norm.bias.float()
    if kind == "swiglu":
        gate, up = (acc + added).unflatten(-1, (-1, 2)).unbind(-1)
        return (nn.functional.silu(gate) * up).to(weight.dtype)
    result = acc + added
    if kind == "gelu_tanh":
        result = nn.functional.gelu(result, approximate="tanh")
    else:
        assert kind is None, kind
    return result.to(weight.dtype)


@contextmanager
def folding(encoder: VisionEncoder, way: str) -> Iterator[None]:
    """Every norm of a block but the first one folded in `way`; "": as it is, by the references."""
    means: list[Tensor] = []

    def forward(norm: Norm) -> Callable[..., Tensor]:
        def folded(x: Tensor, out: Tensor | None = None) -> Tensor:
            copy, own = fold(norm, way, x, means[-1] if means else None)
            mean = own.mean if not (way == "shifted" and means) else own.mean + means[-1]
            means.append(mean)
            copy.folded = own  # type: ignore[attr-defined]
            return copy

        return folded

    def linear(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
        options.pop("fixed", None)
        out = options.pop("out", None)
        own = getattr(x, "folded", None)
        if own is not None:
            assert options.get("residual") is None
            return product(way, x, own, weight, bias, options.get("activation"))
        result = linear_ref(x, weight, bias, **options)
        return result if out is None else out.copy_(result)

    with mock.patch("vitrt.layers.linear.linear", linear):
        blocks = [encoder.tower.block(index) for index in range(encoder.tower.config.depth)]
        norms = [norm for block in blocks for norm in (block.norm1, block.norm2)] if way else []
        for norm in norms:
            norm.forward = forward(norm)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for norm in norms:
                del norm.forward


def run(model: str, depth: int | None, case: Case, seed: int) -> None:
    named = find_model(model, tiny=depth is None)
    if depth is not None:
        config = replace(
            named.config,
            depth=depth,
            fullatt_block_indexes=(1, 3) if named.config.window_size is not None else (),
            deepstack_visual_indexes=(1, 2) if named.config.deepstack_visual_indexes else (),
        )
        named = replace(named, config=config, checkpoint=None)
    cpu = torch.device("cpu")
    tower = build_tower(named, device=cpu, dtype=torch.bfloat16, seed=seed)
    alter(tower, case, seed)
    patches = sum(t * h * w for t, h, w in GRIDS)
    generator = torch.Generator().manual_seed(2 * seed + 2)
    pixels = torch.randn(patches, named.config.patch_dim, generator=generator)
    expected = float32_reference(float32_copy(tower, named.config), pixels, GRIDS)
    grids = torch.tensor(GRIDS)
    theirs = tower(pixels.bfloat16(), grid_thw=grids)
    output: Output = theirs.pooler_output, getattr(theirs, "deepstack_features", None) or ()
    bound = compare(output, expected)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(save_checkpoint(tower, named, Path(folder)))
        encoder = VisionEncoder.from_checkpoint(
            checkpoint, RuntimeConfig(device="cpu", dtype="bfloat16")
        )
    ratios = []
    for way in ("", "weights", "rows", "shifted"):
        with folding(encoder, way):
            ours = encoder(pixels, grids)
        levels = () if ours.deepstack is None else tuple(ours.deepstack)
        ratios.append(compare((ours.embeddings, levels), expected).ratio_to(bound))
    marks = "".join(f"{ratio:9.3f}{'!' if ratio > BOUND else ' '}" for ratio in ratios)
    print(f"  {case.name:38}{bound.worst:11.2e}{marks}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="qwen3-vl-8b,qwen2.5-vl-7b")
    parser.add_argument("--depth", type=int, default=4, help="layers of full width; 0: tiny towers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    for model in arguments.models.split(","):
        print(f"{model}, {arguments.depth or 'tiny'}: error over transformers' in bfloat16")
        print(f"  {'case':38}{'theirs':>11}{'today':>9} {'weights':>9} {'rows':>9} {'shifted':>9}")
        with torch.no_grad():
            for case in CASES:
                if arguments.only in case.name:
                    run(model, arguments.depth or None, case, arguments.seed)


if __name__ == "__main__":
    main()
