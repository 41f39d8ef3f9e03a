"""One list of images, or one long clip, over several copies of a tower.

Full attention never crosses frames, so the work is cut between frames and no activation travels:
each copy takes a run of neighbouring frames that costs about as much as any other's. Only finished
features are exchanged, and only where all ranks want all of them.

Shapes: M merged tokens, O output width, L deepstack levels.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import ExifTags, Image
from torch import Tensor

from vitrt.engine.batcher import pack
from vitrt.engine.batching import prepare_all
from vitrt.features import ImageFeatures, join
from vitrt.images.decode import ImageError, ImageInput, describe
from vitrt.images.processor import PreparedImage
from vitrt.models.work import Grid, count_flops

if TYPE_CHECKING:
    from vitrt.encoder import VisionEncoder

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring frames of one input."""

    index: int  # of the input
    start: int  # first frame, counted after temporal merging
    stop: int


@dataclass(frozen=True, slots=True)
class PieceFeatures:
    """The features of a piece; those of a whole input where it was not cut."""

    piece: Piece
    features: ImageFeatures


def cut(
    grids: Sequence[Grid], costs: Sequence[float], parts: int, most_patches: int
) -> list[list[Piece]]:
    """The frames of all inputs in `parts` runs of about equal cost.

    `costs[i]` is that of one frame of `grids[i]`. No piece of several frames has more than
    `most_patches`.
    """
    total = sum(t * cost for (t, _, _), cost in zip(grids, costs, strict=True))
    runs: list[list[Piece]] = [[] for _ in range(parts)]
    spent = 0.0
    for index, ((t, h, w), cost) in enumerate(zip(grids, costs, strict=True)):
        # A frame belongs to the part that its middle falls into.
        owners = [int((spent + (frame + 0.5) * cost) / total * parts) for frame in range(t)]
        spent += t * cost
        longest = max(most_patches // (h * w), 1)
        for part, frames in itertools.groupby(range(t), key=lambda frame: owners[frame]):
            own = list(frames)
            runs[min(part, parts - 1)] += [
                Piece(index, own[first], min(own[first] + longest, own[-1] + 1))
                for first in range(0, len(own), longest)
            ]
    return runs


def encode_sharded(encoder: VisionEncoder, images: Sequence[ImageInput]) -> list[PieceFeatures]:
    """This rank's part of `images`, which every rank gives alike; nothing is communicated.

    The parts of all ranks together are every frame of every image once, in input order. Raises
    ImageError (a ValueError) naming the first image of this part that cannot be used.
    """
    pieces = _plan(encoder, images)[encoder.parallel.dp_rank]
    prepared = _prepare(encoder, images, pieces)
    features: list[PieceFeatures] = []
    for batch in pack([image.num_patches for image in prepared], encoder.max_batch_tokens):
        outputs = encoder.encode_prepared([prepared[index] for index in batch])
        features += map(PieceFeatures, (pieces[index] for index in batch), outputs)
    return features


def encode_together(encoder: VisionEncoder, images: Sequence[ImageInput]) -> list[ImageFeatures]:
    """Features of all images, on every rank, in input order. Collective over the ranks.

    Raises what any rank's part raised, on all of them, and ValueError where the ranks were given
    different images.
    """
    own: list[PieceFeatures] = []
    problem: Exception | None = None
    try:
        own = encode_sharded(encoder, images)
    except Exception as error:
        problem = error
    reports = _exchange(encoder, _report(own, len(images), problem))
    if problem is not None:
        raise problem
    for rank, report in enumerate(reports):
        if report["image_error"]:
            raise ImageError(report["error"])
        if report["error"]:
            raise RuntimeError(f"data-parallel rank {rank} failed: {report['error']}")
    counts = [report["images"] for report in reports]
    frames = [piece for report in reports for piece, _ in report["pieces"]]
    if len(set(counts)) > 1 or not _is_whole(frames, counts[0]):
        raise ValueError(
            f"encode was given different images on the {len(counts)} data-parallel ranks (they "
            f"had {counts} of them): it shares one list among the ranks. For a list of its own, "
            "give a rank's encoder no `parallel`, or use encode_prepared or stream"
        )
    shared = itertools.groupby(_share(encoder, own, reports), key=lambda part: part.piece.index)
    return [join([part.features for part in parts]) for _, parts in shared]


def _plan(encoder: VisionEncoder, images: Sequence[ImageInput]) -> list[list[Piece]]:
    grids = [_grid(encoder, image) for image in images]
    flops = {grid: float(count_flops(encoder.config, [(1, *grid[1:])]).total) for grid in grids}
    costs = [flops[grid] for grid in grids]
    return cut(grids, costs, encoder.parallel.dp_size, encoder.max_batch_tokens)


def _grid(encoder: VisionEncoder, image: ImageInput) -> Grid:
    """The grid an image will have, from its size alone.

    A small one for an image that cannot be read: the rank that gets it reports why.
    """
    try:
        height, width = _size(image)
        _, h, w = encoder.processor.grid(height, width)
    except Exception:
        return 1, encoder.config.spatial_merge_size, encoder.config.spatial_merge_size
    frames = len(image) if isinstance(image, np.ndarray) and image.ndim == 4 else 1
    return max(-(-frames // encoder.config.temporal_patch_size), 1), h, w


def _size(image: ImageInput) -> tuple[int, int]:
    """(height, width) of an image as it will be decoded, without decoding it."""
    if isinstance(image, np.ndarray):
        return image.shape[:2] if image.ndim < 4 else image.shape[1:3]
    if isinstance(image, Image.Image):
        return _upright_size(image)
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else os.fsdecode(image)) as file:
        return _upright_size(file)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    sideways = image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
    return (image.width, image.height) if sideways else (image.height, image.width)


def _prepare(
    encoder: VisionEncoder, images: Sequence[ImageInput], pieces: Sequence[Piece]
) -> list[PreparedImage]:
    step = encoder.config.temporal_patch_size

    def prepare(piece: Piece) -> PreparedImage:
        image = images[piece.index]
        if isinstance(image, np.ndarray) and image.ndim == 4:
            frames = image[piece.start * step : piece.stop * step]
            return encoder.processor.prepare(frames, name=describe(image))
        return encoder.processor.prepare(image)

    return prepare_all(prepare, pieces)


# Exchange


def _report(own: list[PieceFeatures], images: int, problem: Exception | None) -> dict[str, Any]:
    return {
        "images": images,
        "pieces": [(part.piece, part.features.grid_thw) for part in own],
        "error": str(problem or "") or (type(problem).__name__ if problem else ""),
        "image_error": isinstance(problem, ImageError),
    }


def _exchange(encoder: VisionEncoder, report: dict[str, Any]) -> list[dict[str, Any]]:
    reports: list[Any] = [None] * encoder.parallel.dp_size
    dist.all_gather_object(reports, report, group=encoder.parallel.dp_group)
    return reports


def _is_whole(pieces: Sequence[Piece], images: int) -> bool:
    """Whether the pieces are the frames of so many images, each from its first one on."""
    expected = (0, 0)
    for piece in pieces:
        if (piece.index, piece.start) not in (expected, (expected[0] + 1, 0)):
            return False
        expected = piece.index, piece.stop
    return (pieces[-1].index if pieces else -1) == images - 1


def _share(
    encoder: VisionEncoder, own: list[PieceFeatures], reports: list[dict[str, Any]]
) -> list[PieceFeatures]:
    """The pieces of all ranks, each rank's sent as one tensor [1 + L, M, O]."""
    merge = encoder.config.spatial_merge_size
    levels = len(encoder.config.deepstack_visual_indexes)
    everything: list[PieceFeatures] = []
    for rank, report in enumerate(reports):
        tokens = [prod(grid) // merge**2 for _, grid in report["pieces"]]
        if not tokens:
            continue
        shape = (1 + levels, sum(tokens), encoder.config.out_hidden_size)
        rows = torch.empty(shape, dtype=encoder.dtype, device=encoder.device)
        if rank == encoder.parallel.dp_rank:
            torch.cat([part.features.embeddings for part in own], out=rows[0])
            for level in range(levels):
                torch.cat([_level(part.features, level) for part in own], out=rows[1 + level])
        dist.broadcast(rows, group_src=rank, group=encoder.parallel.dp_group)
        for (piece, grid), part in zip(report["pieces"], rows.split(tokens, dim=1), strict=True):
            deepstack = part[1:] if levels else None
            everything.append(PieceFeatures(piece, ImageFeatures(part[0], deepstack, grid, merge)))
    return everything


def _level(features: ImageFeatures, level: int) -> Tensor:
    assert features.deepstack is not None
    return features.deepstack[level]
