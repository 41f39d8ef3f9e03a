"""The torchrun environment as one object: which tensor-parallel and data-parallel rank this process
is, and how the ranks of a tensor-parallel group sum what each of them computed.

The world is `dp_size` groups of `tp_size` neighbouring ranks; each group holds one copy of a tower.
"""

from __future__ import annotations

import itertools
import logging
import os
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

logger = logging.getLogger(__name__)

AllReduce = Literal["auto", "nccl", "symmetric"]
_METHODS = ("auto", "nccl", "symmetric")

# A peer that is late for a sum by this much is lost. (One that died is noticed long before.)
_COLLECTIVE_TIMEOUT = timedelta(minutes=5)
# Between batches a rank may wait for its leader's disk for as long as that takes.
_CONTROL_TIMEOUT = timedelta(days=7)
_RENDEZVOUS_TIMEOUT = timedelta(minutes=5)

# Where symmetric memory beats NCCL: the largest message, in bytes, by ranks of the group, that goes
# in one shot (every rank reads all of its peers) and in two (each rank sums a part and writes it to
# all). scripts/bench_parallel.py measures them.
_ONE_SHOT_BYTES = {2: 16 << 20, 3: 64 << 10, 4: 64 << 10}
_TWO_SHOT_BYTES = {2: 16 << 20, 3: 16 << 20, 4: 16 << 20, 8: 16 << 20}


class SymmetricMemory:
    """A buffer that all ranks of a group can read and write, and sums over it.

    The ops wait for the peers before they read and after they have written, so one buffer serves
    one sum after the other on one stream, recorded in a CUDA graph or not.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, *, always: bool) -> None:
        """Collective. `always` uses it for messages of every size. RuntimeError where the GPUs
        cannot reach each other's memory.
        """
        self._group = group
        self._device = device
        size = group.size()
        self._one_shot = _ONE_SHOT_BYTES.get(size, 0)
        self._limit = 1 << 62 if always else max(self._one_shot, _TWO_SHOT_BYTES.get(size, 0))
        self._buffers: list[Tensor] = []  # recorded graphs hold on to outgrown ones
        self._grow(max(self._one_shot, _TWO_SHOT_BYTES.get(size, 0), 1 << 20))

    def _grow(self, nbytes: int) -> None:
        # NVLink multicast is never used: a fault in it takes down every GPU of the host. The
        # variable is read at the rendezvous.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        import torch.distributed._symmetric_memory as symm_mem

        buffer = symm_mem.empty(nbytes, dtype=torch.uint8, device=self._device)
        symm_mem.rendezvous(buffer, self._group)
        self._buffers.append(buffer)

    def sums_right(self) -> bool:
        """Whether sums of known values come out. Collective."""
        size, rank = self._group.size(), self._group.rank()
        partials = (self.buffer((rows, 512), torch.float32) for rows in (16, 512))
        totals = [self.all_reduce(p.fill_(rank + 1)).clone() for p in partials if p is not None]
        return all(bool((total == size * (size + 1) // 2).all()) for total in totals)

    def buffer(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """Where to put a message that this is the fastest way for; None for another. Valid until
        the next call.
        """
        nbytes = shape[0] * shape[1] * dtype.itemsize
        # The ops take 16 bytes at a time from every rank's part.
        if nbytes > self._limit or nbytes == 0 or nbytes % (16 * self._group.size()):
            return None
        if nbytes > self._buffers[-1].numel():
            # All ranks grow at the same message. Never inside a recording: the same sizes ran
            # eagerly right before it.
            self._grow(1 << (nbytes - 1).bit_length())
        return self._buffers[-1][:nbytes].view(dtype).view(shape)

    def holds(self, partial: Tensor) -> bool:
        return partial.untyped_storage().data_ptr() == self._buffers[-1].data_ptr()

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum of all ranks' `partial`, which `buffer` gave. It may lie in the buffer."""
        ops, name = torch.ops.symm_mem, self._group.group_name
        if partial.nbytes <= self._one_shot:
            return cast(Tensor, ops.one_shot_all_reduce(partial, "sum", name))
        return cast(Tensor, ops.two_shot_all_reduce_(partial, "sum", name))


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """This process's place in a world of `dp_size` groups of `tp_size` ranks each.

    All ranks of a tensor-parallel group must run the same forwards in the same order, from one
    thread.
    """

    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    tp_group: dist.ProcessGroup | None = field(default=None, repr=False)
    dp_group: dist.ProcessGroup | None = field(default=None, repr=False)  # the same tp_rank each
    control: dist.ProcessGroup | None = field(default=None, repr=False)  # tp_group, host memory
    store: Store | None = field(default=None, repr=False)  # of the whole world
    symmetric: SymmetricMemory | None = field(default=None, repr=False)
    owns_process_group: bool = field(default=False, repr=False)

    @classmethod
    def from_env(
        cls,
        tp: int = 1,
        *,
        all_reduce: AllReduce = "auto",
        device: str = "auto",
    ) -> ParallelContext:
        """The context of a process that torchrun started; of a lone one without torchrun.

        Collective. Makes the GPU of its local rank this process's device.

        Args:
            tp: ranks that share one tower; the others are copies of it.
            all_reduce: how partial products are summed on GPUs. "auto" picks by message size,
                "nccl" and "symmetric" (PyTorch's symmetric memory) are always that.
            device: "auto" is "cuda" where there is one; "cpu" goes through gloo.

        Raises ValueError where the world is not made of groups of `tp`, or has more ranks on this
        host than there are GPUs.
        """
        if all_reduce not in _METHODS:
            raise ValueError(f"all_reduce {all_reduce!r} is none of {', '.join(_METHODS)}")
        rank, world, local_rank = _environment()
        if tp < 1 or world % tp:
            raise ValueError(
                f"tp = {tp} does not divide the {world} rank(s) of this job: start a multiple of "
                "it (torchrun --nproc-per-node N ... --tp M, N a multiple of M)"
            )
        if world == 1:
            return SINGLE
        cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        if cuda:
            _select_gpu(local_rank)
        elif all_reduce == "symmetric":
            raise ValueError(f"all_reduce 'symmetric' needs GPUs, and device is {device!r}")
        backend, timeout = ("nccl", _COLLECTIVE_TIMEOUT) if cuda else ("gloo", _CONTROL_TIMEOUT)
        store, owns = _join(backend, rank, world, eager=cuda and tp > 1)
        dp = world // tp
        neighbours = [range(g * tp, (g + 1) * tp) for g in range(dp)]
        counterparts = [range(r, world, tp) for r in range(tp)]
        tp_group = control = _group_of(rank, neighbours, timeout=timeout)
        if cuda:
            control = _group_of(rank, neighbours, backend="gloo", timeout=_CONTROL_TIMEOUT)
        context = cls(
            tp_rank=rank % tp,
            tp_size=tp,
            dp_rank=rank // tp,
            dp_size=dp,
            tp_group=tp_group,
            dp_group=_group_of(rank, counterparts, timeout=timeout),
            control=control,
            store=store,
            owns_process_group=owns,
        )
        if not cuda or tp == 1 or all_reduce == "nccl":
            return context
        return replace(context, symmetric=context._symmetric(all_reduce))

    def _symmetric(self, method: AllReduce) -> SymmetricMemory | None:
        """Symmetric memory, where it works on every rank of the group."""
        assert self.tp_group is not None
        problem = "the ranks of a group are on several hosts"
        works = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) % self.tp_size == 0
        if works:
            device = torch.device("cuda", torch.cuda.current_device())
            try:
                symmetric = SymmetricMemory(self.tp_group, device, always=method == "symmetric")
                works = symmetric.sums_right()
                problem = "a sum came out wrong"
            except RuntimeError as error:
                works, problem = False, str(error)
        if self.agree_min(works):
            return symmetric
        problem = "another rank has none" if works else problem
        if method == "symmetric":
            raise ValueError(f"all_reduce 'symmetric' cannot be had here: {problem}")
        logger.info("sums go through NCCL; there is no symmetric memory: %s", problem)
        return None

    # Sums

    def partial_out(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
        """Where this rank's part of a sum should be written; None: anywhere. Valid until the next
        call, on one stream.
        """
        return None if self.symmetric is None else self.symmetric.buffer((rows, columns), dtype)

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum of `partial` over the tensor-parallel group; may overwrite it. What comes back is
        valid until the next `partial_out`.
        """
        if self.tp_size == 1:
            return partial
        if self.symmetric is not None and self.symmetric.holds(partial):
            return self.symmetric.all_reduce(partial)
        dist.all_reduce(partial, group=self.tp_group)
        return partial

    def start_all_reduce(self, partial: Tensor) -> dist.Work | None:
        """The same in place, beside what is launched next; `wait` on the result before reading."""
        if self.tp_size == 1:
            return None
        return cast("dist.Work", dist.all_reduce(partial, group=self.tp_group, async_op=True))

    def agree_max(self, value: int) -> int:
        """The largest of the group's values, on all of its ranks. Blocks the host."""
        if self.tp_size == 1:
            return value
        box = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.control)
        return int(box)

    def agree_min(self, value: int) -> int:
        """The smallest of the group's values, on all of its ranks. Blocks the host."""
        return -self.agree_max(-value)

    def close(self) -> None:
        """Leave the process group, if `from_env` made it. Drop encoders first: NCCL waits for
        recorded graphs to be freed.
        """
        if self.owns_process_group and dist.is_initialized():
            dist.destroy_process_group()


SINGLE = ParallelContext()
_JOINED = itertools.count()  # a job that is joined again finds none of its old keys


def _environment() -> tuple[int, int, int]:
    """(rank, world size, local rank). ValueError for an environment that is only half there."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found:
        return 0, 1, 0
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"{', '.join(found)} set without {', '.join(missing)}: start the ranks with torchrun"
        )
    return tuple(int(found[name]) for name in names)  # type: ignore[return-value]


def _select_gpu(local_rank: int) -> None:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"local rank {local_rank} has no GPU: this host has {count}; start at most {count} "
            "ranks on it"
        )
    torch.cuda.set_device(local_rank)


def _join(backend: str, rank: int, world: int, *, eager: bool) -> tuple[Store, bool]:
    """The store of the job, and whether the process group is ours. `eager`: connect the GPUs now,
    not at the first collective, if ever.
    """
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
    from torch.distributed.rendezvous import rendezvous

    joined = next(_JOINED)
    if dist.is_initialized():
        return PrefixStore(f"vitrt/{joined}", _get_default_store()), False
    store, _, _ = next(rendezvous("env://", rank, world, timeout=_RENDEZVOUS_TIMEOUT))
    dist.init_process_group(
        backend,
        store=PrefixStore(f"groups/{joined}", store),
        rank=rank,
        world_size=world,
        timeout=_COLLECTIVE_TIMEOUT,
        device_id=torch.device("cuda", torch.cuda.current_device()) if eager else None,
    )
    return PrefixStore(f"vitrt/{joined}", store), True


def _group_of(rank: int, members: list[range], **options: Any) -> dist.ProcessGroup | None:
    """The group that `rank` is in; None for groups of one. Collective over the world."""
    if len(members[0]) == 1:
        return None
    groups = [dist.new_group(list(ranks), **options) for ranks in members]
    return next(group for group, ranks in zip(groups, members, strict=True) if rank in ranks)
