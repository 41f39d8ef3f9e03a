"""The torchrun environment as one object.

Which tensor-parallel and data-parallel rank this process is, and how the ranks of a tensor-parallel
group sum what each of them computed.

The world is `dp_size` groups of `tp_size` neighbouring ranks; each group holds one copy of a tower.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from vitrt.messages import counted
from vitrt.parallel.symmetric_memory import SymmetricMemory

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

logger = logging.getLogger(__name__)

AllReduce = Literal["auto", "nccl", "symmetric"]
_METHODS: tuple[str, ...] = get_args(AllReduce)

# A peer that is late for a sum by this much is lost. (One that died is noticed long before.)
_COLLECTIVE_TIMEOUT = timedelta(minutes=5)
# Between batches a rank may wait for its leader's disk for as long as that takes.
_CONTROL_TIMEOUT = timedelta(days=7)
_RENDEZVOUS_TIMEOUT = timedelta(minutes=5)

# From so many rows on a block runs in two halves, one computing while the other is summed.
OVERLAP_ROWS = 8192


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
    control: dist.ProcessGroup | None = field(default=None, repr=False)  # tp_group's, by the host
    store: Store | None = field(default=None, repr=False)  # of the whole world
    symmetric: SymmetricMemory | None = field(default=None, repr=False)
    owns_process_group: bool = field(default=False, repr=False)

    @classmethod
    def from_env(
        cls, tp: int = 1, *, all_reduce: AllReduce = "auto", device: str = "auto"
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
        rank, world, local_rank = _environment(tp)
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

    def partial_out(self, use: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
        """Where this rank's part of a sum should be written; None: anywhere. Valid until the next
        call for the same `use`, on one stream.
        """
        if self.symmetric is None:
            return None
        return self.symmetric.buffer(use, (rows, columns), dtype)

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum of `partial` over the tensor-parallel group; may overwrite it. What comes back is
        valid until the next `partial_out` for the same use.
        """
        if self.tp_size == 1:
            return partial
        if self.symmetric is not None and self.symmetric.holds(partial):
            return self.symmetric.all_reduce(partial)
        dist.all_reduce(partial, group=self.tp_group)
        return partial

    def overlaps(self, rows: int) -> bool:
        """Whether a block over so many rows should compute one half while it sums the other."""
        forced = self.symmetric is not None and self.symmetric.always
        return self.tp_size > 1 and rows >= OVERLAP_ROWS and not forced

    def start_all_reduce(self, partial: Tensor) -> dist.Work:
        """Sum in place, beside what is launched next; `wait` on the result before reading."""
        return cast("dist.Work", dist.all_reduce(partial, group=self.tp_group, async_op=True))

    def agree_max(self, value: int) -> int:
        """The largest of the group's values, on all of its ranks. Blocks the host."""
        if self.tp_size == 1:
            return value
        box = torch.tensor([value], dtype=torch.int64, device="cpu")
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
            gc.collect()  # of dropped encoders that an exception, say, still refers to in a cycle
            dist.destroy_process_group()


SINGLE = ParallelContext()
_JOINED = itertools.count()  # of joins so far: one that joins again must find no old keys


def _environment(tp: int) -> tuple[int, int, int]:
    """(rank, world size, local rank).

    ValueError for an environment that is only half there, or a world not made of groups of `tp`.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: os.environ[name] for name in names if name in os.environ}
    missing = [name for name in names if name not in found]
    if found and missing:
        raise ValueError(
            f"{', '.join(found)} set without {', '.join(missing)}: start the ranks with torchrun"
        )
    rank, world, local_rank = (int(found[name]) for name in names) if found else (0, 1, 0)
    if isinstance(tp, bool) or tp < 1 or world % tp:
        raise ValueError(
            f"tp = {tp} does not divide the {counted(world, 'rank')} of this job: start a "
            "multiple of it (torchrun --nproc-per-node N ... --tp M, N a multiple of M)"
        )
    return rank, world, local_rank


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
    groups = []
    for ranks in members:
        if dist.get_backend() == "nccl" and "backend" not in options:
            # Sums run beside products (see `overlaps`), which would keep them waiting.
            nccl = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            nccl._timeout = options["timeout"]
            options["pg_options"] = nccl
        groups.append(dist.new_group(list(ranks), **options))
    return next(group for group, ranks in zip(groups, members, strict=True) if rank in ranks)
