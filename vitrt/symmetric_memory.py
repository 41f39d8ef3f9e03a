"""Sums over memory that all GPUs of a group can reach, through PyTorch's symmetric memory.

A sum is one kernel here, which reads and writes the peers' buffers over NVLink: for messages of a
few megabytes that is faster than NCCL. NVLink multicast is never used here, since a fault in it
takes down every GPU of the host. (NCCL's own use of it is for NCCL_NVLS_ENABLE to say.)
"""

from __future__ import annotations

import os
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

# Where symmetric memory beats NCCL: the largest message, in bytes, by ranks of the group, that goes
# in one shot (every rank reads all of its peers) and in two (each rank sums a part and writes it to
# all). scripts/bench_parallel.py measures them.
_ONE_SHOT_BYTES = {2: 16 << 20, 3: 64 << 10, 4: 64 << 10}
_TWO_SHOT_BYTES = {2: 16 << 20, 3: 16 << 20, 4: 16 << 20, 8: 16 << 20}
_DTYPES = (torch.bfloat16, torch.float32)  # that the ops know


class SymmetricMemory:
    """Buffers that all ranks of a group can read and write, and sums over them.

    The ops wait for the peers before they read and after they have written, so one buffer serves
    one sum after the other on one stream, recorded in a CUDA graph or not.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, *, always: bool) -> None:
        """Collective. `always` uses it for messages of every size. RuntimeError where the GPUs
        cannot reach each other's memory.
        """
        self.always = always
        self._group = group
        self._device = device
        size = group.size()
        self._one_shot = _ONE_SHOT_BYTES.get(size, 0)
        self._limit = 1 << 62 if always else max(self._one_shot, _TWO_SHOT_BYTES.get(size, 0))
        self._first_bytes = max(self._one_shot, _TWO_SHOT_BYTES.get(size, 0), 1 << 20)
        self._buffers: dict[str, Tensor] = {}
        self._outgrown: list[Tensor] = []  # recorded graphs may hold on to them

    def _grown(self, use: str, nbytes: int) -> Tensor:
        """A buffer of at least `nbytes`. Collective: all ranks come here at the same message, and
        never inside a recording, since the same sizes ran eagerly right before it.
        """
        # Read at the rendezvous, which would set multicast up.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        import torch.distributed._symmetric_memory as symm_mem

        size = max(1 << (nbytes - 1).bit_length(), self._first_bytes)
        buffer = symm_mem.empty(size, dtype=torch.uint8, device=self._device)
        symm_mem.rendezvous(buffer, self._group)
        if use in self._buffers:
            self._outgrown.append(self._buffers[use])
        self._buffers[use] = buffer
        return buffer

    def sums_right(self) -> bool:
        """Whether sums of known values come out. Collective."""
        size, rank = self._group.size(), self._group.rank()
        partials = (self.buffer("check", (rows, 512), torch.float32) for rows in (16, 512))
        totals = [self.all_reduce(p.fill_(rank + 1)).clone() for p in partials if p is not None]
        return all(bool((total == size * (size + 1) // 2).all()) for total in totals)

    def way(self, nbytes: int) -> Literal["one-shot", "two-shot"] | None:
        """How a message of so many bytes travels; None: not through here."""
        # The ops take 16 bytes at a time from every rank's part.
        if nbytes > self._limit or nbytes == 0 or nbytes % (16 * self._group.size()):
            return None
        return "one-shot" if nbytes <= self._one_shot else "two-shot"

    def buffer(self, use: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """Where to put a message that this is the fastest way for; None for another. Valid until
        the next call for the same `use`.
        """
        nbytes = shape[0] * shape[1] * dtype.itemsize
        if dtype not in _DTYPES or self.way(nbytes) is None:
            return None
        buffer = self._buffers.get(use)
        if buffer is None or nbytes > buffer.numel():
            buffer = self._grown(use, nbytes)
        return buffer[:nbytes].view(dtype).view(shape)

    def holds(self, partial: Tensor) -> bool:
        start = partial.untyped_storage().data_ptr()
        return any(buffer.data_ptr() == start for buffer in self._buffers.values())

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum of all ranks' `partial`, which `buffer` gave. It may lie in the buffer."""
        ops, name = torch.ops.symm_mem, self._group.group_name
        if self.way(partial.nbytes) == "one-shot":
            return cast(Tensor, ops.one_shot_all_reduce(partial, "sum", name))
        return cast(Tensor, ops.two_shot_all_reduce_(partial, "sum", name))
