"""`vitrt info`: what a checkpoint's tower is, what images cost, and what can run it here."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vitrt.commands.console import OK
from vitrt.commands.options import add_model, add_runtime, open_model, runtime_config
from vitrt.config import RuntimeConfig, VisionConfig

if TYPE_CHECKING:
    from vitrt.checkpoint.opened import Checkpoint

# Height x width of common images.
SIZES = ((224, 224), (448, 448), (560, 560), (700, 1120), (1080, 1920), (2160, 3840))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Family, size, cost by image size, and the attention backends that can run."
    )
    add_model(parser)
    add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    """Print what is known; 0."""
    for line in info_lines(open_model(args, weights=False), runtime_config(args)):
        print(line)
    return OK


@dataclass(frozen=True, slots=True)
class ImageCost:
    """What one image of a size costs."""

    height: int
    width: int
    resized: tuple[int, int]  # height, width
    patches: int
    tokens: int
    flops: int


def image_costs(checkpoint: Checkpoint, runtime: RuntimeConfig) -> list[ImageCost]:
    """The cost of an image of each common size, under the pixel limits that hold."""
    from vitrt.images.processor import ImageProcessor
    from vitrt.models.work import count_flops, count_patches, count_tokens

    config = checkpoint.vision_config()
    processor = ImageProcessor.from_configs(checkpoint.preprocessor_config(), runtime)
    costs = []
    for height, width in SIZES:
        grid = processor.grid(height, width)
        resized = processor.resized(height, width)
        patches, tokens = count_patches([grid]), count_tokens(config, [grid])
        flops = count_flops(config, [grid]).total
        costs.append(ImageCost(height, width, resized, patches, tokens, flops))
    return costs


def info_lines(checkpoint: Checkpoint, runtime: RuntimeConfig) -> Iterator[str]:
    """The lines that `vitrt info` prints."""
    from vitrt.attention import usable
    from vitrt.engine.device import dtype_name, resolve_device, resolve_dtype
    from vitrt.models.work import count_parameters

    config = checkpoint.vision_config()
    preprocessor = checkpoint.preprocessor_config()
    yield f"model          {checkpoint.name}"
    yield f"family         {config.model_type}"
    yield f"parameters     {count_parameters(config) / 1e6:.1f} million"
    yield (
        f"tower          {config.depth} layers, {config.hidden_size} wide, "
        f"{config.num_heads} heads of {config.head_dim}, MLP {config.intermediate_size}"
    )
    yield f"output         {config.out_hidden_size} wide{_special(config)}"
    low, high = preprocessor.min_pixels, preprocessor.max_pixels
    yield f"pixels         {runtime.min_pixels or low} to {runtime.max_pixels or high} an image"
    side = config.patch_size * config.spatial_merge_size
    yield f"token          {side} x {side} pixels ({config.merge_unit} patches)"
    yield ""
    yield f"{'image (h x w)':>14} {'resized':>13} {'patches':>8} {'tokens':>7} {'GFLOP':>9}"
    for cost in image_costs(checkpoint, runtime):
        yield (
            f"{cost.height:>6} x {cost.width:<5} {cost.resized[0]:>5} x {cost.resized[1]:<5} "
            f"{cost.patches:>8} {cost.tokens:>7} {cost.flops / 1e9:>9.1f}"
        )
    yield ""
    device = resolve_device(runtime.device)
    dtype = resolve_dtype(runtime.dtype, device)
    yield f"attention on {device} in {dtype_name(dtype)}"
    window_patches = (config.window_cells or 0) ** 2 * config.merge_unit
    for name, reason in usable(device, dtype, config.head_dim, window_patches):
        yield f"  {name:<8} {'usable' if reason is None else 'no: ' + reason}"


def _special(config: VisionConfig) -> str:
    if config.deepstack_visual_indexes:
        layers = ", ".join(map(str, config.deepstack_visual_indexes))
        return f", and deepstack from layers {layers}"
    if config.window_size is not None:
        full = ", ".join(map(str, config.fullatt_block_indexes))
        return f"; windows of {config.window_size} pixels except in layers {full}"
    return ""
