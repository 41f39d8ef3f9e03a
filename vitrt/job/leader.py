"""One rank of a tensor-parallel group leads, and the others run what it tells them to.

The leader decodes, batches and writes. The others receive the prepared pixels of each batch, run
the same forwards, and drop the features, which every rank ends up with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from vitrt.images.processor import PreparedImage
from vitrt.job.device_stage import is_out_of_memory

if TYPE_CHECKING:
    from vitrt.engine.dense import AnyEncoder
    from vitrt.features import ImageFeatures
    from vitrt.images.processor import ImageProcessor
    from vitrt.models.work import Grid

logger = logging.getLogger(__name__)

# gloo and NCCL have no exception class for it.
_DISCONNECTED = ("Connection closed", "Connection reset", "Broken pipe", "NCCL", "gloo")


class GroupError(RuntimeError):
    """The ranks of a group cannot go on together: one lacks memory, or is gone."""


class Leader:
    """A VisionEncoder, as far as a pipeline knows it, on all ranks of its group."""

    def __init__(self, encoder: AnyEncoder) -> None:
        self.device: torch.device = encoder.device
        self.max_batch_tokens: int = encoder.max_batch_tokens
        self.processor: ImageProcessor = encoder.processor
        self._encoder = encoder

    def encode_prepared(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
        _send(self._encoder, images)
        return _run(self._encoder, images)

    def dismiss(self) -> None:
        """Nothing more comes: `follow` returns on the others."""
        _send(self._encoder, [])


@contextmanager
def leading(encoder: AnyEncoder) -> Iterator[AnyEncoder | Leader]:
    """What encodes: `encoder` itself, or the leader of its group until the block ends well."""
    if encoder.parallel.tp_size == 1:
        yield encoder
        return
    leader = Leader(encoder)
    yield leader
    leader.dismiss()


def follow(encoder: AnyEncoder) -> None:
    """Run what the leader of this rank's group encodes, until it dismisses the group."""
    while images := _receive(encoder):
        try:
            _run(encoder, images)
        except ValueError:
            logger.debug("the leader handles this", exc_info=True)


def _run(encoder: AnyEncoder, images: Sequence[PreparedImage]) -> list[ImageFeatures]:
    """A forward that all ranks of the group run. GroupError where one of them cannot."""
    try:
        with _connected():
            return encoder.encode_prepared(images)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        patches = sum(image.num_patches for image in images)
        raise GroupError(
            f"a batch of {len(images)} images with {patches} patches does not fit on "
            f"{encoder.device} (tp = {encoder.parallel.tp_size}): lower --max-batch-tokens (now "
            f"{encoder.max_batch_tokens}), or --max-pixels if it is one image"
        ) from error


@contextmanager
def _connected() -> Iterator[None]:
    """GroupError in place of what a broken connection raises."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error) or not any(sign in str(error) for sign in _DISCONNECTED):
            raise
        raise GroupError(f"another rank of this one's group is gone: {error}") from error


def _send(encoder: AnyEncoder, images: Sequence[PreparedImage]) -> None:
    group = encoder.parallel.control
    header = [(image.pixels.shape, image.grid_thw) for image in images]
    with _connected():
        dist.broadcast_object_list([header], group_src=0, group=group)
        if images:
            joined = np.concatenate([image.pixels.reshape(-1) for image in images])
            dist.broadcast(torch.from_numpy(joined), group_src=0, group=group)


def _receive(encoder: AnyEncoder) -> list[PreparedImage]:
    group = encoder.parallel.control
    box: list[list[tuple[tuple[int, ...], Grid]]] = [[]]
    with _connected():
        dist.broadcast_object_list(box, group_src=0, group=group)
        header = box[0]
        sizes = [torch.Size(shape).numel() for shape, _ in header]
        joined = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
        if header:
            dist.broadcast(joined, group_src=0, group=group)
    return [
        PreparedImage(part.view(shape).numpy(), grid)
        for part, (shape, grid) in zip(joined.split(sizes), header, strict=True)
    ]
