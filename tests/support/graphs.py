"""Graphs where there is no GPU: the cache at work, with a pool that records nothing."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch


class FakePool:
    """Replays by running the forward."""

    nbytes = 10
    side_stream = None

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None: ...

    def record(self, record: partial[Any]) -> tuple[Any, int, int]:
        forward, choice = record.args
        pieces = SimpleNamespace(splits=[], replay=lambda plan: forward(choice))
        return pieces, self.nbytes, 30
