"""One rank of a tensor-parallel group leads, and the others run what it tells them to.

The leader decodes, batches and writes. The others receive the prepared pixels of each batch, run
the same forwards, and drop the features, which every rank ends up with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vitrt.engine.group import connected
from vitrt.engine.stages import I, Prepared, Stages
from vitrt.features import ImageFeatures
from vitrt.images.prepared import PreparedImage
from vitrt.parallel.context import ParallelContext

logger = logging.getLogger(__name__)


@contextmanager
def leading(stages: Stages[I], parallel: ParallelContext) -> Iterator[Stages[I]]:
    """`stages` whose batches all ranks of the group run, until the block ends well."""
    if parallel.tp_size == 1:
        yield stages
        return

    def run(images: Sequence[Prepared]) -> list[ImageFeatures]:
        _send(images, parallel)
        return stages.run(images)

    yield replace(stages, run=run)
    _send([], parallel)  # nothing more comes: `follow` returns on the others


def follow(stages: Stages[Any], parallel: ParallelContext) -> None:
    """Run what the leader of this rank's group encodes, until it dismisses the group."""
    while images := _receive(parallel):
        try:
            stages.run(images)
        except ValueError:
            logger.debug("the leader handles this", exc_info=True)


def _send(images: Sequence[Prepared], parallel: ParallelContext) -> None:
    pixels = [image.pixels for image in images]
    header = [
        (part.shape, image.grid_thw, image.times)
        for part, image in zip(pixels, images, strict=True)
    ]
    with connected():
        dist.broadcast_object_list([header], group_src=0, group=parallel.control)
        if images:
            joined = np.concatenate([part.reshape(-1) for part in pixels])
            dist.broadcast(torch.from_numpy(joined), group_src=0, group=parallel.control)


def _receive(parallel: ParallelContext) -> list[PreparedImage]:
    box: list[list[tuple[tuple[int, ...], tuple[int, int, int], Any]]] = [[]]
    with connected():
        dist.broadcast_object_list(box, group_src=0, group=parallel.control)
        header = box[0]
        sizes = [torch.Size(shape).numel() for shape, _, _ in header]
        joined = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
        if header:
            dist.broadcast(joined, group_src=0, group=parallel.control)
    return [
        PreparedImage(part.view(shape).numpy(), grid, times)
        for part, (shape, grid, times) in zip(joined.split(sizes), header, strict=True)
    ]
