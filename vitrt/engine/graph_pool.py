"""The memory that recorded graphs share, how much of it they took, and the stream they record on.

Intermediates of all graphs lie in one pool of the allocator: replays follow each other, so each may
overwrite what the last one left. The pool grows to what the largest recording needs. It is tied to
one stream, because the allocator never hands a block that one stream used to another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitrt.engine.graph_pieces import Pieces


class GraphPool:
    """Records graphs into shared memory and measures it."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.handle: Any = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.nbytes = 0  # of the pool; graphs' own bytes come on top
        with torch.cuda.stream(self.stream):
            # Each stream has workspaces of the matrix library, made at its first products. Made
            # while a graph is recorded, they would lie in its pool.
            operand = torch.zeros(64, 64, dtype=dtype, device=device)
            torch.addmm(operand[0], operand, operand)
            torch.mm(operand, operand)
        self.stream.synchronize()

    def record(self, record: Callable[[Any, torch.cuda.Stream], Pieces]) -> tuple[Pieces, int, int]:
        """What `record(handle, stream)` made, by how much the pool grew, its own bytes."""
        torch.cuda.synchronize(self.device)
        free, reserved = self._memory()
        pieces = record(self.handle, self.stream)
        torch.cuda.synchronize(self.device)
        free_after, reserved_after = self._memory()
        grown = max(reserved_after - reserved, 0)
        return pieces, grown, max(free - free_after - grown, 0)

    def _memory(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self.device)[0], torch.cuda.memory_reserved(self.device)
