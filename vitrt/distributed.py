"""The torchrun environment as one object: which tensor-parallel and data-parallel rank this process
is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """This process's place in a world of `dp_size` groups of `tp_size` ranks each."""

    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    tp_group: dist.ProcessGroup | None = field(default=None, repr=False)

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Sum `partial` over the tensor-parallel group, in place; returns it."""
        if self.tp_size > 1:
            dist.all_reduce(partial, group=self.tp_group)
        return partial


SINGLE = ParallelContext()
