"""Counted work: the floating-point operations a batch needs, whatever a kernel really spends on it.

Only matrix products count, at the true sizes: zero-padding, ragged tiles and recomputation count as
nothing, so counted FLOPs over time is a rate that two implementations can be compared by. One
multiply-add is two operations. Weights are counted where they are known, in the tower.

Shapes: n patches, s patches of a frame, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import lru_cache
from math import prod

from vitrt.config import Grid, VisionConfig


@dataclass(frozen=True, slots=True)
class FlopCount:
    """Operations of one forward, by where they are spent."""

    patch_embed: int
    linear: int  # qkv, output and MLP products of all layers
    full_attention: int
    window_attention: int
    mergers: int  # the main one and deepstack's

    @property
    def total(self) -> int:
        return sum(astuple(self))


@dataclass(frozen=True, slots=True)
class _TowerCount:
    """What a tower holds, without the padding of MLP widths: values, and layers of each kind."""

    parameters: int
    patch_embed: int  # values of matrices alone, here and below
    blocks: int
    mergers: int
    window_layers: int


@lru_cache(maxsize=64)
def _count_tower(config: VisionConfig) -> _TowerCount:
    # Not at the top: counting patches needs no torch.
    import torch

    from vitrt.models.families import build_tower

    with torch.device("meta"):
        tower = build_tower(config)
    shapes = {target.name: target.shape for target in tower.weight_targets()}
    matrices = {"patch_embed": 0, "pos_embed": 0, "blocks": 0, "merger": 0}
    for name, shape in shapes.items():
        if len(shape) > 1:
            part = name.split(".")[0]
            matrices[part if part in matrices else "merger"] += prod(shape)
    return _TowerCount(
        parameters=sum(prod(shape) for shape in shapes.values()),
        patch_embed=matrices["patch_embed"],
        blocks=matrices["blocks"],
        mergers=matrices["merger"],
        window_layers=sum(map(tower.in_windows, range(config.depth))),
    )


def count_patches(grids: Iterable[Grid]) -> int:
    """Patches of a batch: what a forward's cost grows with."""
    return sum(t * h * w for t, h, w in grids)


def count_tokens(config: VisionConfig, grids: Iterable[Grid]) -> int:
    """Merged tokens of a batch: the rows of its embeddings."""
    return count_patches(grids) // config.merge_unit


def count_flops(config: VisionConfig, grids: Iterable[Grid]) -> FlopCount:
    """The work of one forward over `grids`.

    A window layer is counted as if every window were whole (s = 64 at the released sizes), so that
    its count depends on the number of patches alone; ragged windows at an image's edges make it an
    overestimate of under one per cent of the total.
    """
    grids = tuple(grids)
    tower = _count_tower(config)
    n = count_patches(grids)
    full_pairs = sum(t * (h * w) ** 2 for t, h, w in grids)
    full_layers, window_layers = attention_layers(config)
    window = 0 if config.window_cells is None else config.window_cells**2 * config.merge_unit
    return FlopCount(
        patch_embed=2 * n * tower.patch_embed,
        linear=2 * n * tower.blocks,
        # q k^T and probabilities x v, each one multiply-add per pair and channel.
        full_attention=full_layers * 4 * full_pairs * config.hidden_size,
        window_attention=window_layers * 4 * n * window * config.hidden_size,
        mergers=2 * (n // config.merge_unit) * tower.mergers,
    )


def attention_layers(config: VisionConfig) -> tuple[int, int]:
    """How many layers attend over whole frames, and how many within windows."""
    windows = _count_tower(config).window_layers
    return config.depth - windows, windows


def count_parameters(config: VisionConfig) -> int:
    """Parameters of the tower as its checkpoint holds it."""
    return _count_tower(config).parameters
