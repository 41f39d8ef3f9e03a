"""What a contender of the benchmark is; vitrt is the first.

A contender turns a batch's grids into a function of the pixels alone. What cannot run says why
(`UnavailableError`) and is reported with its reason; it never ends the benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from vitrt.compare.errors import Output
from vitrt.config import Grid
from vitrt.encoder import VisionEncoder

Forward = Callable[[Tensor], Output]


class UnavailableError(RuntimeError):
    """This contender cannot run here, or not on this workload; the message says why."""


class Contender(Protocol):
    name: str
    label: str  # what exactly it is
    same_tower: bool  # whether its output can be compared

    def forward_for(self, grids: tuple[Grid, ...]) -> Forward:
        """A function of the pixels [T, P] on the device. Raises UnavailableError.

        Contenders take turns, so a call finds whatever the others have left switched.
        """
        ...


class Vitrt:
    """The encoder as a user calls it: grids on the host, plans and graphs as it sees fit."""

    same_tower = True

    def __init__(self, encoder: VisionEncoder, name: str = "vitrt") -> None:
        self.encoder, self.name = encoder, name
        self.label = f"vitrt, precision {encoder.runtime.precision}"

    def forward_for(self, grids: tuple[Grid, ...]) -> Forward:
        grid_thw = torch.tensor(grids)

        def forward(pixels: Tensor) -> Output:
            out = self.encoder(pixels, grid_thw)
            return out.embeddings, () if out.deepstack is None else out.deepstack.unbind(0)

        return forward
