"""Batches through a forward, in as many parts as memory makes necessary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import groupby
from typing import Generic, TypeAlias, TypeVar

import torch

from vitrt.engine.batcher import pack
from vitrt.engine.memory import memory_lacking
from vitrt.engine.stages import Prepared, Stages
from vitrt.features import ImageFeatures
from vitrt.messages import counted

logger = logging.getLogger(__name__)

I = TypeVar("I")  # noqa: E741  an item
R = TypeVar("R")  # what is delivered of an image

# Takes what computes the features of some images, and gives one result for each of them.
Deliver: TypeAlias = Callable[[Callable[[], list[ImageFeatures]]], Sequence[R]]


class DeviceMemoryError(ValueError):
    """One image alone does not fit into the memory of the device."""


class StoppedError(RuntimeError):
    """The work was stopped between two runs of a clip's frames."""


class HostMemoryError(ValueError):
    """The host, not the device, has no memory left for one image."""


class Splitter(Generic[I, R]):
    """Runs batches: a clip over the budget, or a lazy one, in several forwards, others whole.

    What exceeds the device's memory goes in smaller parts, and so does all that comes later. What
    the host lacks memory for, and what is refused, is halved until it is one image's own error.
    """

    def __init__(
        self,
        stages: Stages[I],
        deliver: Deliver[R],
        join: Callable[[Sequence[R]], R],
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """`join` makes one result of those of a clip's runs of frames. StoppedError between two of
        these, where `is_stopped`.
        """
        self.budget = stages.max_batch_patches  # patches of one forward
        self._stages = stages
        self._deliver = deliver
        self._join = join
        self._is_stopped = is_stopped
        self._largest = 0  # patches of the largest forward that fitted so far

    def run(self, images: Sequence[Prepared]) -> Iterator[Sequence[R | Exception]]:
        """What is delivered of each image, or its error, in their order, part by part."""
        parts = self._parts(images)
        while parts:
            part = parts.pop(0)
            try:
                results = self._results(part)
            except Exception as error:  # which keeps the part's memory while it lives
                lacking = memory_lacking(error, self._stages.device)
                if lacking is None and not isinstance(error, ValueError):
                    raise
                refused = None
                if len(part) == 1 and not (lacking == "device" and self._divides(part[0])):
                    refused = self._explained(error, part[0], lacking)
            else:
                self._largest = max(self._largest, self._patches(part))
                yield results
                continue
            if refused is not None:
                yield [refused]
            elif lacking == "device":
                self._lower_budget(part)
                parts = self._parts([image for other in (part, *parts) for image in other])
            else:
                half = len(part) // 2
                parts[:0] = [part[:half], part[half:]]

    def _parts(self, images: Sequence[Prepared]) -> list[list[Prepared]]:
        """Batches under the budget; what is lazy goes alone."""
        parts: list[list[Prepared]] = []
        for lazy, together in groupby(images, key=lambda image: image.is_lazy):
            group = list(together)
            if lazy:
                parts += [[image] for image in group]
            else:
                parts += pack(group, self.budget, lambda image: image.num_patches)
        return parts

    def _results(self, part: Sequence[Prepared]) -> Sequence[R]:
        if len(part) > 1 or not (part[0].is_lazy or part[0].num_patches > self.budget):
            return self._deliver(partial(self._stages.run, part))
        results: list[R] = []
        with closing(self._pieces(part[0])) as pieces:
            for piece in pieces:
                if results and self._is_stopped():
                    raise StoppedError("stopped amid a clip")
                results += self._deliver(partial(self._stages.run, [piece]))
        return [self._join(results)]

    def _pieces(self, image: Prepared) -> Generator[Prepared]:
        """Its runs of frames, each to go through the device before the next is asked for."""
        with closing(image.runs()) as runs:
            for run in runs:
                yield from run.split(self.budget)

    def _patches(self, part: Sequence[Prepared]) -> int:
        """Patches of the largest forward that the part takes."""
        if len(part) == 1:
            return part[0].split(self.budget)[0].num_patches
        return sum(image.num_patches for image in part)

    def _divides(self, image: Prepared) -> bool:
        return image.split(self.budget)[0].grid_thw[0] > 1

    def _lower_budget(self, part: Sequence[Prepared]) -> None:
        patches = self._patches(part)
        lowered = max(min(patches // 2, self.budget), 1)
        logger.warning(
            "out of device memory with %s of %d patches in one batch; going on with at most %d "
            "patches (was %d)",
            counted(len(part), "image"),
            patches,
            lowered,
            self.budget,
        )
        self.budget = lowered
        if self._stages.device.type == "cuda":
            torch.cuda.empty_cache()  # blocks that the failed batch left in other sizes

    def _explained(self, error: Exception, image: Prepared, lacking: str | None) -> Exception:
        if lacking is None:
            return error
        frames, height, width = image.shape
        patches = image.num_patches
        size = f"{height} x {width}" + (f", {frames} frames" if frames > 1 else "")
        found = f"resized to {size} pixels it has {patches} patches"
        if lacking == "host":
            return HostMemoryError(f"{found}, and the host's memory does not suffice: {error}")
        fits = "nothing has fitted yet"
        if self._largest:
            # The area of an image with as many patches as the largest forward so far.
            pixels = height * width * self._largest // patches
            fits = f"{self._largest} patches have fitted so far: --max-pixels {pixels} makes it fit"
        return DeviceMemoryError(
            f"{found}, which alone exceed the memory of {self._stages.device}; {fits}"
        )
