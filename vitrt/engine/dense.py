"""A VisionEncoder and a request as one object, for what encodes many images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from vitrt.engine.eager_runner import RunnerStats
from vitrt.engine.engine import Engine
from vitrt.engine.request import Request
from vitrt.features import ImageFeatures
from vitrt.parallel.context import ParallelContext


class AnyEncoder(Protocol):
    """A VisionEncoder, or one that answers another request."""

    @property
    def device(self) -> torch.device: ...
    @property
    def processor(self) -> Any: ...
    @property
    def parallel(self) -> ParallelContext: ...
    @property
    def max_batch_tokens(self) -> int: ...
    def encode_prepared(self, images: Sequence[Any]) -> list[ImageFeatures]: ...
    def stats(self) -> RunnerStats: ...


class _Whole(AnyEncoder, Protocol):
    @property
    def engine(self) -> Engine: ...
    def run_prepared(self, images: Sequence[Any], request: Request) -> list[ImageFeatures]: ...


class DenseEncoder:
    """A VisionEncoder that gives what `request` asks for: a view, not a copy."""

    def __init__(self, encoder: _Whole, request: Request) -> None:
        self.request = request
        self.device = encoder.device
        self.processor = encoder.processor
        self.parallel = encoder.parallel
        self.max_batch_tokens = encoder.engine.patches_for(request)
        self._encoder = encoder

    def encode_prepared(self, images: Sequence[Any]) -> list[ImageFeatures]:
        return self._encoder.run_prepared(images, self.request)

    def stats(self) -> RunnerStats:
        return self._encoder.stats()
