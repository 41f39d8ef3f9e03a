"""The memory that recorded graphs share, how much of it they took, and the stream they record on.

Intermediates of all graphs lie in one pool of the allocator: replays follow each other, so each may
overwrite what the last one left. The pool grows to what the largest recording needs. It is tied to
one stream and one beside it, because the allocator never hands a block that one stream used to
another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitrt.engine.recording import Pieces
from vitrt.layers.side_stream import SideStream

_MOST_OF_A_GRAPH = 32 << 20  # bytes; those of a released tower's forward take about 4 MiB


class GraphPool:
    """Records graphs into shared memory and measures it."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.handle: Any = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.nbytes = 0  # of the pool; graphs' own bytes come on top
        self.side_stream = SideStream(device)
        for stream in (self.stream, self.side_stream.stream):
            with torch.cuda.stream(stream):
                # Each stream has workspaces of the matrix library, made at its first products. Made
                # while a graph is recorded, they would lie in its pool.
                operand = torch.zeros(64, 64, dtype=dtype, device=device)
                torch.addmm(operand[0], operand, operand)
                torch.mm(operand, operand)
            stream.synchronize()

    def record(self, record: Callable[[Any, torch.cuda.Stream], Pieces]) -> tuple[Pieces, int, int]:
        """What `record(handle, stream)` made, the bytes of the pool, and those of the graph itself.

        The latter is what is free before and after, less what the process reserved meanwhile. Other
        processes take and give back memory too, so no more is believed than a graph can take.
        """
        torch.cuda.synchronize(self.device)
        free, reserved = self._memory()
        pieces = record(self.handle, self.stream)
        torch.cuda.synchronize(self.device)
        free_after, reserved_after = self._memory()
        grown = reserved_after - reserved
        own = min(max(free - free_after - grown, 0), _MOST_OF_A_GRAPH)
        return pieces, self._pool_bytes(grown), own

    def _memory(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self.device)[0], torch.cuda.memory_reserved(self.device)

    def _pool_bytes(self, grown: int) -> int:
        """What the allocator holds for this pool; other threads' allocations are none of it.

        Only torch's own allocator can tell; of another one, by how much the whole process has
        `grown` is added up.
        """
        if torch.cuda.get_allocator_backend() != "native":
            return self.nbytes + max(grown, 0)
        return sum(
            segment["total_size"]
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment["segment_pool_id"]) == tuple(self.handle)
        )
