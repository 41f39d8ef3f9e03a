"""Features of a batch to the host, beside the work on the next one.

On a GPU nothing here waits for the device: features are copied into page-locked memory on a stream
of their own, and `Transfer.wait` is for another thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from vitrt.engine.memory import page_locked
from vitrt.features import ImageFeatures


@dataclass(slots=True)
class Transfer:
    """A batch whose features are on the host, or on their way."""

    seconds: float = 0.0  # that the device computed; known after `wait`
    events: tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event] | None = None
    on_device: list[ImageFeatures] | None = None  # kept until it was copied

    def wait(self) -> None:
        """Until the features are there."""
        if self.events is not None:
            started, ended, copied = self.events
            copied.synchronize()
            self.seconds = started.elapsed_time(ended) / 1000
            self.events = None
        self.on_device = None


OnHost: TypeAlias = tuple[ImageFeatures, Transfer]  # an image's, and what it waits for


class ToHost:
    """Delivers what a batch computes on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, compute: Callable[[], list[ImageFeatures]]) -> list[OnHost]:
        if self._copies is None:
            began = time.perf_counter()
            features = compute()
            transfer = Transfer(time.perf_counter() - began)
            return [(each, transfer) for each in features]
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        copied = torch.cuda.Event()
        stream = torch.cuda.current_stream(self._device)
        started.record(stream)
        features = compute()
        ended.record(stream)
        self._copies.wait_event(ended)
        with torch.cuda.stream(self._copies):
            on_host = [_on_host(each) for each in features]
            copied.record(self._copies)
        transfer = Transfer(events=(started, ended, copied), on_device=features)
        return [(each, transfer) for each in on_host]


def _on_host(features: ImageFeatures) -> ImageFeatures:
    deepstack, hidden = features.deepstack, features.hidden
    return replace(
        features,
        embeddings=_copy(features.embeddings),
        deepstack=None if deepstack is None else _copy(deepstack),
        hidden=None if hidden is None else _copy(hidden),
    )


def _copy(tensor: Tensor) -> Tensor:
    return page_locked(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)
