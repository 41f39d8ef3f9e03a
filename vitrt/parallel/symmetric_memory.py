"""Sums over memory that all GPUs of a group can reach, through PyTorch's symmetric memory.

A sum is one kernel here, in which every rank reads one part of all its peers' buffers over NVLink
and writes the total to all of them: for messages of a few megabytes that is faster than NCCL.
NVLink multicast is never used here, since a fault in it takes down every GPU of the host. (NCCL's
own use of it is for NCCL_NVLS_ENABLE to say.)
"""

from __future__ import annotations

import os
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

# The largest message, in bytes, by ranks of the group, for which this beats NCCL. Measured on H200s
# (scripts/bench/parallel_gpus.py) for 2 and 4: 15.6 against 33.5 and 21.8 against 36.2 microseconds
# at 2.85 MiB, 120 against 159 and 192 against 199 at 36 MiB. The ops that sum in one step, where
# every rank reads all of its peers, were slower at every size.
_MOST_BYTES = {2: 36 << 20, 3: 16 << 20, 4: 36 << 20, 8: 16 << 20}
_FIRST_BYTES = 16 << 20  # of a buffer, so that it seldom has to grow
_DTYPES = (torch.bfloat16, torch.float32)  # that the op knows


class SymmetricMemory:
    """Buffers that all ranks of a group can read and write, and sums over them.

    The op waits for the peers before it reads and after it has written, so one buffer serves
    one sum after the other on one stream, recorded in a CUDA graph or not.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, *, always: bool) -> None:
        """Collective. `always` uses it for messages of every size. RuntimeError where the GPUs
        cannot reach each other's memory.
        """
        self.always = always
        self._group = group
        self._device = device
        self._limit = 1 << 62 if always else _MOST_BYTES.get(group.size(), 0)
        self._buffers: dict[str, Tensor] = {}
        self._outgrown: list[Tensor] = []  # recorded graphs may hold on to them

    def _grown(self, use: str, nbytes: int) -> Tensor:
        """A buffer of at least `nbytes`. Collective: all ranks come here at the same message, and
        never inside a recording, since the same sizes ran eagerly right before it.
        """
        # Read at the rendezvous, which would set multicast up.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        import torch.distributed._symmetric_memory as symm_mem

        size = max(1 << (nbytes - 1).bit_length(), _FIRST_BYTES)
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

    def takes(self, nbytes: int) -> bool:
        """Whether a message of so many bytes should go through here."""
        # The op takes 16 bytes at a time from every rank's part.
        return 0 < nbytes <= self._limit and nbytes % (16 * self._group.size()) == 0

    def buffer(self, use: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """Where to put a message that this is the fastest way for; None for another. Valid until
        the next call for the same `use`.
        """
        nbytes = shape[0] * shape[1] * dtype.itemsize
        if dtype not in _DTYPES or not self.takes(nbytes):
            return None
        buffer = self._buffers.get(use)
        if buffer is None or nbytes > buffer.numel():
            buffer = self._grown(use, nbytes)
        return buffer[:nbytes].view(dtype).view(shape)

    def holds(self, partial: Tensor) -> bool:
        start = partial.untyped_storage().data_ptr()
        return any(buffer.data_ptr() == start for buffer in self._buffers.values())

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum of all ranks' `partial`, which `buffer` gave and which it replaces."""
        name = self._group.group_name
        return cast(Tensor, torch.ops.symm_mem.two_shot_all_reduce_(partial, "sum", name))
