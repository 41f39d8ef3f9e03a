"""Batches through the encoder, smaller ones where the device lacks memory, and to the host.

On a GPU nothing here waits for the device: features are copied into page-locked memory on a
stream of their own while the next batch runs, and `Encoded.wait` is for another thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from vitrt.engine.batcher import pack
from vitrt.features import ImageFeatures
from vitrt.images.processor import PreparedImage
from vitrt.sources.record import Record

logger = logging.getLogger(__name__)

Item = tuple[Record, PreparedImage]


class Encoder(Protocol):
    """What the pipeline needs of a VisionEncoder."""

    @property
    def device(self) -> torch.device: ...
    @property
    def max_batch_tokens(self) -> int: ...
    def encode_prepared(self, images: Sequence[PreparedImage]) -> list[ImageFeatures]: ...


class DeviceMemoryError(ValueError):
    """One image alone does not fit into the memory of the device."""


@dataclass(slots=True)
class Encoded:
    """A batch whose features are on the host, or on their way."""

    sources: list[Record]
    features: list[ImageFeatures]  # on the host; pooled ones have one row, float32
    seconds: float = 0.0  # on the device; known after `wait`
    events: tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event] | None = None
    on_device: list[ImageFeatures] | Tensor | None = None  # kept until it was copied

    def wait(self) -> None:
        """Until the features are there."""
        if self.events is not None:
            started, ended, copied = self.events
            copied.synchronize()
            self.seconds = started.elapsed_time(ended) / 1000
            self.events = None
        self.on_device = None


@dataclass(frozen=True, slots=True)
class Refused:
    """An image that was decoded and cannot be encoded."""

    source: Record
    error: ValueError


class DeviceStage:
    """Encodes batches and lowers its budget where they do not fit."""

    def __init__(self, encoder: Encoder, *, pool: bool) -> None:
        self.budget = encoder.max_batch_tokens  # patches of one batch
        self._encoder = encoder
        self._pool = pool
        self._largest = 0  # patches of the largest batch that fit so far
        self._copies = torch.cuda.Stream(encoder.device) if encoder.device.type == "cuda" else None

    def encode(self, batch: Sequence[Item]) -> Iterator[Encoded | Refused]:
        """The batch, in as many parts as the device's memory makes necessary."""
        parts = [list(batch)]
        while parts:
            part = parts.pop(0)
            try:
                yield self._run(part)
                continue
            except Exception as error:
                lacks_memory = is_out_of_memory(error)
                if not lacks_memory and not isinstance(error, ValueError):
                    raise
                if len(part) == 1:
                    yield Refused(part[0][0], self._explain(part[0], error))
                    continue
            if lacks_memory:
                self._lower_budget(part)
                waiting = [item for other in (part, *parts) for item in other]
                sizes = [image.num_patches for _, image in waiting]
                parts = [[waiting[n] for n in group] for group in pack(sizes, self.budget)]
                if self._copies is not None:
                    torch.cuda.empty_cache()  # what the failed batch was given in other sizes
            else:
                half = len(part) // 2
                parts[:0] = [part[:half], part[half:]]

    def _run(self, part: Sequence[Item]) -> Encoded:
        sources = [source for source, _ in part]
        images = [image for _, image in part]
        if self._copies is None:
            started = time.perf_counter()
            features = self._encoder.encode_prepared(images)
            if self._pool:
                features = _pooled(features, _pooled_rows(features))
            encoded = Encoded(sources, features)
            encoded.seconds = time.perf_counter() - started
        else:
            encoded = self._run_on_gpu(sources, images, self._copies)
        self._largest = max(self._largest, patches_of(part))
        return encoded

    def _run_on_gpu(
        self, sources: list[Record], images: list[PreparedImage], copies: torch.cuda.Stream
    ) -> Encoded:
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        compute = torch.cuda.current_stream(self._encoder.device)
        started.record(compute)
        features = self._encoder.encode_prepared(images)
        rows = _pooled_rows(features) if self._pool else None
        ended.record(compute)
        copied = torch.cuda.Event()
        copies.wait_event(ended)
        with torch.cuda.stream(copies):
            if rows is None:
                encoded = Encoded(sources, [_to_host(feature) for feature in features])
                encoded.on_device = features
            else:
                encoded = Encoded(sources, _pooled(features, _copy(rows)))
                encoded.on_device = rows
            copied.record(copies)
        encoded.events = started, ended, copied
        return encoded

    def _lower_budget(self, part: Sequence[Item]) -> None:
        patches = patches_of(part)
        lowered = max(min(patches // 2, self.budget), 1)
        logger.warning(
            "out of device memory with %d images of %d patches in one batch; going on with at "
            "most %d patches (was %d)",
            len(part),
            patches,
            lowered,
            self.budget,
        )
        self.budget = lowered

    def _explain(self, item: Item, error: Exception) -> ValueError:
        source, image = item
        if not is_out_of_memory(error):
            assert isinstance(error, ValueError)
            return error
        frames, height, width = image.pixels.shape[:3]
        patches = image.num_patches
        size = f"{height} x {width}" + (f", {frames} frames" if frames > 1 else "")
        fits = "nothing has fitted yet"
        if self._largest:
            # The area of an image with as many patches as the largest batch so far.
            pixels = height * width * self._largest // patches
            fits = f"{self._largest} patches have fitted so far: --max-pixels {pixels} makes it fit"
        return DeviceMemoryError(
            f"{source.id}: resized to {size} pixels it has {patches} patches, which alone exceed "
            f"the memory of {self._encoder.device}; {fits}"
        )


def patches_of(part: Sequence[Item]) -> int:
    return sum(image.num_patches for _, image in part)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, on any device, or Python could not get memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # PyTorch's CPU allocator, cuBLAS and cuDNN have no exception class of their own.
    text = str(error)
    signs = (
        "DefaultCPUAllocator",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "out of memory",
    )
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _pooled_rows(features: Sequence[ImageFeatures]) -> Tensor:
    """[images, out_hidden] float32."""
    return torch.stack([feature.pooled() for feature in features])


def _pooled(features: Sequence[ImageFeatures], rows: Tensor) -> list[ImageFeatures]:
    """`features` with their one row each instead of the tokens."""
    return [
        ImageFeatures(row, None, feature.grid_thw, feature.merge_size)
        for row, feature in zip(rows.split(1), features, strict=True)
    ]


def _to_host(features: ImageFeatures) -> ImageFeatures:
    deepstack = None if features.deepstack is None else _copy(features.deepstack)
    hidden = None if features.hidden is None else _copy(features.hidden)
    return replace(
        features, embeddings=_copy(features.embeddings), deepstack=deepstack, hidden=hidden
    )


def _copy(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
