"""Counted work: the floating-point operations a batch needs, whatever a kernel really spends on it.

Only matrix products count, at the true sizes: zero-padding, ragged tiles and recomputation count as
nothing, so counted FLOPs over time is a rate that two implementations can be compared by. One
multiply-add is two operations.

Shapes: n patches, s patches of a frame, D width, F MLP width, O output width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from vitrt.config import VisionConfig

Grid = tuple[int, int, int]  # frames, rows, columns in patches


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
    n = count_patches(grids)
    full_pairs = sum(t * (h * w) ** 2 for t, h, w in grids)
    width = config.hidden_size
    full_layers, window_layers = attention_layers(config)
    # q k^T and probabilities x v, each one multiply-add per pair and channel.
    window = 0 if config.window_cells is None else config.window_cells**2 * config.merge_unit
    joined = width * config.merge_unit
    merger = joined**2 + joined * config.out_hidden_size
    return FlopCount(
        patch_embed=2 * n * config.patch_dim * width,
        linear=config.depth
        * 2
        * n
        * (4 * width**2 + mlp_products(config) * width * config.intermediate_size),
        full_attention=full_layers * 4 * full_pairs * width,
        window_attention=window_layers * 4 * n * window * width,
        mergers=(1 + len(config.deepstack_visual_indexes)) * (n // config.merge_unit) * 2 * merger,
    )


def attention_layers(config: VisionConfig) -> tuple[int, int]:
    """How many layers attend over whole frames, and how many within windows."""
    if config.window_size is None:
        return config.depth, 0
    full = sum(1 for layer in range(config.depth) if layer in config.fullatt_block_indexes)
    return full, config.depth - full


def mlp_products(config: VisionConfig) -> int:
    """Products of D x F in one MLP: gate, up and down, or fc1 and fc2."""
    return 3 if config.hidden_act == "silu" else 2


def count_parameters(config: VisionConfig) -> int:
    """Parameters of the tower as its checkpoint holds it, without the padding of MLP widths."""
    width, inner, joined = (
        config.hidden_size,
        config.intermediate_size,
        config.hidden_size * config.merge_unit,
    )
    swiglu = config.hidden_act == "silu"
    norm = width if swiglu else 2 * width  # RMSNorm has no bias
    mlp = mlp_products(config) * width * inner + (mlp_products(config) - 1) * inner + width
    block = 4 * width**2 + 4 * width + mlp + 2 * norm
    merger = joined**2 + joined + joined * config.out_hidden_size + config.out_hidden_size
    deepstack = len(config.deepstack_visual_indexes) * (merger + 2 * joined)
    patch_embed = config.patch_dim * width + (0 if swiglu else width)
    positions = (config.num_position_embeddings or 0) * width
    return patch_embed + positions + config.depth * block + norm + merger + deepstack
