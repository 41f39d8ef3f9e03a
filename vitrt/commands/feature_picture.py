"""A picture: the image beside the principal components of its features, as colours.

Shapes: N cells of a grid, D width of their features.
"""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vitrt.encoder import VisionEncoder
from vitrt.features import ImageFeatures
from vitrt.images.decode import name_of
from vitrt.images.file_content import content_of
from vitrt.images.inputs import ImageInput
from vitrt.store.durable import partial_path, write_file

logger = logging.getLogger(__name__)

SIDE = 480  # pixels of a panel's longer side
_MARGIN, _LABEL, _FONT = 12, 24, 15  # pixels
_CLIPPED = 0.01  # of the cells at either end of a component's range
_WANTED_ASPECT = 16 / 9


@dataclass(frozen=True, slots=True)
class Panel:
    """One part of the picture."""

    label: str
    image: Image.Image


def save_picture(
    encoder: VisionEncoder, image: ImageInput, output: str | Path, *, layers: Iterable[int] = ()
) -> Path:
    """Save a PNG of `image` beside the first three principal components of its features.

    Embeddings, each deepstack level and the hidden states after each of `layers` have a panel and
    components of their own.

    Raises ImageError for an image that cannot be used, ValueError for an `output` that is no PNG
    or is the image, OutputError where it cannot be written: what was there stays.
    """
    path = check_output(output, image)
    prepared = encoder.processor.prepare(image)
    features = encoder.encode_prepared([prepared], layers=layers)[0]
    resized = Image.fromarray(prepared.pixels[0])
    label = f"{Path(name_of(image)).name}: {resized.width} x {resized.height} pixels"
    panels = [Panel(label, resized), *panels_of(features, encoder.config.deepstack_visual_indexes)]
    content = io.BytesIO()
    arrange(panels).save(content, format="PNG")
    write_file(path, [content.getbuffer()], partial_path(path))
    return path


def check_output(output: str | Path, image: ImageInput) -> Path:
    """ValueError unless a PNG of `image` can go there."""
    path = Path(output)
    if path.suffix.lower() != ".png":
        raise ValueError(f"output {str(path)!r} must end in .png: the picture is a PNG")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"output {str(path)!r} lies in a folder that does not exist")
    if isinstance(image, str | os.PathLike) and _is_same(path, image):
        raise ValueError(f"output {str(path)!r} is the image itself: give another file")
    return path


def _is_same(path: Path, image: str | os.PathLike[str]) -> bool:
    try:
        content = content_of(image)
        return isinstance(content, str) and path.samefile(content)
    except (OSError, ValueError):  # one of them is not there
        return False


def panels_of(features: ImageFeatures, deepstack_layers: Sequence[int] = ()) -> Iterator[Panel]:
    """A panel for each kind of feature; of a clip, its first frame."""
    yield _panel("embeddings", features.spatial()[0])
    _, h, w = features.grid_thw
    shape = (-1, h // features.merge_size, w // features.merge_size)
    if features.deepstack is not None:
        for level, rows in enumerate(features.deepstack):
            of = f", layer {deepstack_layers[level]}" if deepstack_layers else ""
            yield _panel(f"deepstack {level}{of}", rows.view(*shape, rows.shape[-1])[0])
    if features.hidden is not None:
        for layer, states in zip(features.layers, features.hidden, strict=True):
            yield _panel(f"layer {layer}", states[0])


def _panel(name: str, grid: Tensor) -> Panel:
    colours, share = principal_colours(grid)
    label = f"{name}: {grid.shape[0]} x {grid.shape[1]} cells, {share:.0%} of variance"
    return Panel(label, Image.fromarray(colours.numpy()))


def principal_colours(grid: Tensor) -> tuple[Tensor, float]:
    """The first three principal components of a grid [h, w, D] as red, green and blue.

    Features count by direction, each divided by its length: a few cells of great length, which
    these towers have, would otherwise be all there is to see. Each component fills its channel.

    Returns uint8 [h, w, 3] on the CPU, and the share of the variance that the components hold.
    """
    h, w, width = grid.shape
    rows = torch.nn.functional.normalize(grid.reshape(-1, width).float(), dim=-1)
    rows = rows - rows.mean(dim=0)
    components, share = _principal_components(rows, 3)
    ends = torch.tensor([_CLIPPED, 1 - _CLIPPED], device=components.device)
    low, high = components.quantile(ends, dim=0)
    span = high - low
    scaled = ((components - low) / span.clamp(min=1e-12)).clamp(0, 1)
    scaled = torch.where(span > 1e-6, scaled, 0.5)  # nothing varies: grey, not amplified noise
    return (scaled * 255).round().byte().view(h, w, 3).cpu(), share


def _principal_components(rows: Tensor, count: int) -> tuple[Tensor, float]:
    """[N, count] coordinates of centred rows [N, D], and the share of variance they hold.

    By the smaller of the two products of the rows with themselves, exactly and the same each time.
    """
    n, width = rows.shape
    if n <= width:
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        components = vectors * values.clamp(min=0).sqrt()
    else:
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        components = rows @ vectors
    values, components = values.clamp(min=0).flip(0), components.flip(1)[:, :count]
    # An eigenvector's sign is arbitrary: let the farthest cell lie on the positive side.
    farthest = components.abs().argmax(dim=0, keepdim=True)
    components = components * components.gather(0, farthest).sign()
    components = torch.nn.functional.pad(components, (0, count - components.shape[1]))
    total = float(values.sum())
    return components, float(values[:count].sum()) / total if total > 0 else 1.0


def arrange(panels: Sequence[Panel]) -> Image.Image:
    """The panels under their labels, in rows that make the picture about as wide as a screen.

    All panels get the size of the first, SIDE on its longer side.
    """
    first = panels[0].image
    scale = SIDE / max(first.size)
    width, height = (max(round(side * scale), 1) for side in first.size)
    font = ImageFont.load_default(size=_FONT)
    cell = max(width, *(math.ceil(font.getlength(panel.label)) for panel in panels)) + _MARGIN
    row = height + _LABEL + _MARGIN
    columns = _columns(len(panels), cell, row)
    rows = -(-len(panels) // columns)
    canvas = Image.new("RGB", (columns * cell + _MARGIN, rows * row + _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for index, panel in enumerate(panels):
        left, top = _MARGIN + index % columns * cell, _MARGIN + index // columns * row
        draw.text((left, top), panel.label, fill="black", font=font)
        resampling = Image.Resampling.BICUBIC if index else Image.Resampling.LANCZOS
        canvas.paste(panel.image.resize((width, height), resampling), (left, top + _LABEL))
    return canvas


def _columns(count: int, width: int, height: int) -> int:
    """How many columns bring the picture close to a screen's aspect, with little of it empty."""

    def cost(columns: int) -> float:
        rows = -(-count // columns)
        aspect = columns * width / (rows * height)
        return abs(math.log(aspect / _WANTED_ASPECT)) + (rows * columns - count) / count

    return min(range(1, count + 1), key=cost)
