"""Features of a batch to the host, beside the work on the next one.

On a GPU nothing here waits for the device: features are copied into page-locked memory on a stream
of their own, and `OnHost.wait` is for another thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vitrt.engine.memory import page_locked
from vitrt.engine.stages import Stages
from vitrt.features import ImageFeatures

Join: TypeAlias = Callable[[Sequence[ImageFeatures]], ImageFeatures]


@dataclass(slots=True)
class Transfer:
    """A batch whose features are on the host, or on their way."""

    seconds: float = 0.0  # that the device computed; known after `wait`
    events: tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event] | None = None
    on_device: list[ImageFeatures] | None = None  # kept until it was copied

    def wait(self) -> None:
        """Wait until the features are there."""
        if self.events is not None:
            started, ended, copied = self.events
            copied.synchronize()
            self.seconds = started.elapsed_time(ended) / 1000
            self.events = None
        self.on_device = None

    def let_go(self) -> bool:
        """Free the features on the device, if they were copied; else False."""
        events = self.events
        if events is not None and not events[2].query():
            return False
        self.on_device = None
        return True


@dataclass(frozen=True, slots=True)
class OnHost:
    """An image's features, or those of a clip's runs of frames; each with what it waits for."""

    parts: list[tuple[ImageFeatures, Transfer]]
    join: Join

    @property
    def transfers(self) -> list[Transfer]:
        """One for each batch that had to do with it; several images may share one."""
        return [transfer for _, transfer in self.parts]

    def wait(self) -> ImageFeatures:
        """Wait for the features, and return them."""
        for transfer in self.transfers:
            transfer.wait()
        return self.join([features for features, _ in self.parts])


class ToHost:
    """Delivers what a batch computes on the host."""

    def __init__(self, stages: Stages[Any]) -> None:
        self._device = device = stages.device
        self._join_features = stages.join
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._under_way: deque[Transfer] = deque()

    def __call__(self, compute: Callable[[], list[ImageFeatures]]) -> list[OnHost]:
        # Nobody waits for a long clip before its last run: its other runs leave the device here.
        while self._under_way and self._under_way[0].let_go():
            self._under_way.popleft()
        if self._copies is None:
            began = time.perf_counter()
            features = compute()
            transfer = Transfer(time.perf_counter() - began)
            return [self._result(each, transfer) for each in features]
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        copied = torch.cuda.Event()
        stream = torch.cuda.current_stream(self._device)
        started.record(stream)
        features = compute()
        ended.record(stream)
        self._copies.wait_event(ended)
        with torch.cuda.stream(self._copies):
            on_host = [each.mapped(_copy) for each in features]
            copied.record(self._copies)
        transfer = Transfer(events=(started, ended, copied), on_device=features)
        self._under_way.append(transfer)
        return [self._result(each, transfer) for each in on_host]

    def join(self, results: Sequence[OnHost]) -> OnHost:
        """A clip's result from those of its runs of frames; `OnHost.wait` joins the features."""
        return OnHost([part for result in results for part in result.parts], self._join_features)

    def _result(self, features: ImageFeatures, transfer: Transfer) -> OnHost:
        return OnHost([(features, transfer)], self._join_features)


def _copy(tensor: Tensor) -> Tensor:
    return page_locked(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)
