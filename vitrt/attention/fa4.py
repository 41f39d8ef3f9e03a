"""FlashAttention-4 (CuTe) for Hopper and Blackwell, from the `flash-attn-4` package."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrt.attention import fa4_kept
from vitrt.attention.base import BackendSpec, Schedule, attention_shape
from vitrt.attention.last_wave import MOST_SEGMENTS, schedule_last_wave, tail_rows
from vitrt.attention.probe import HALF_PRECISION, installed, not_nvidia, wrong_shape
from vitrt.kernels.disk_cache import keep_kernels
from vitrt.kernels.dispatch import NotCompiledError
from vitrt.kernels.persistent import is_hopper, processors
from vitrt.kernels.segments import Rotary, Segments
from vitrt.kernels.tail_attention import tail_attention

logger = logging.getLogger(__name__)

_MODULE = "flash_attn.cute"
_TILE_ROWS = 192  # query rows of a block on Hopper, for heads of at most _TILE_HEAD_DIM
_TILE_HEAD_DIM = 96

# What kernels/fa4_hopper.py was written for, and the head sizes whose tile it was measured with.
_RELEASE = "4.0.0b36"
_OWN_HEAD_DIMS = range(65, 97)
_TILE_COST = 256  # keys that take as long as the start and the end of a tile
_MOST_UNEVEN = 1.02


class FlashAttention4:
    """FlashAttention-4's variable-length forward over strided views of the packed qkv.

    The first call for each head size and dtype compiles for some seconds, or loads what an earlier
    process compiled; segment lengths do not matter. We call the function below the public one,
    which allocates its output and enters autograd.

    On Hopper it has parts of our own. There a batch of one to four segments leaves its last rows to
    another kernel (tail_attention.py) where that saves a wave of blocks, and a longer one runs in
    persistent blocks where these end together.
    """

    name = "fa4"
    capturable = True  # once compiled: graph capture must follow one eager call
    applies_rotary = False

    def __init__(self, device: torch.device, head_dim: int) -> None:
        self._device = device
        self._processors = processors(device)
        self._hopper = is_hopper(device)
        self._knows_tiles = self._hopper and head_dim <= _TILE_HEAD_DIM
        self._own = self._hopper and head_dim in _OWN_HEAD_DIMS and _release() == _RELEASE
        self._kept: dict[fa4_kept.Variant, fa4_kept.Launch | None] = {}
        if not (self._hopper and fa4_kept.any_kept()):
            _ = self._forwards  # a broken installation is to be found now, not in a forward

    @cached_property
    def _forwards(self) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
        """The forwards that compile, the package's or with our parts: importing takes seconds."""
        keep_kernels()
        return _forwards(self._own, self._processors)

    @cached_property
    def _has_persistent(self) -> bool:
        return self._own and (fa4_kept.any_persistent() or self._forwards[1] is not None)

    def schedule(self, lengths: Sequence[int], heads: int) -> Schedule | None:
        if not self._knows_tiles:
            return None
        if len(lengths) > MOST_SEGMENTS:
            even = runs_even(tuple(lengths), heads, self._processors)
            if even and self._has_persistent:
                return Schedule("persistent", np.zeros(0, np.int32), np.zeros(0, np.int32))
            return None
        return schedule_last_wave(lengths, heads, tile_rows=_TILE_ROWS, processors=self._processors)

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = qkv.new_empty(attention_shape(qkv))
        schedule = segments.schedule
        persistent = schedule is not None and not schedule.work.numel()
        if persistent:
            schedule = None
        # The package's blocks for rows past these counts end at once, and write nothing.
        used = None if schedule is None else schedule.per_segment
        variant = self._variant(qkv, segments, used, persistent)
        tried = variant in self._kept
        launch = None if variant is None else self._launch(variant)
        if launch is not None:
            launch(qkv.detach(), out.detach().view(qkv[:, 0].shape), segments.cu_seqlens, used)
        elif variant is None or tried:
            self._by_package(qkv, segments, used, out, persistent)
        else:
            forward = self._forward(persistent)
            before = fa4_kept.keys(forward)
            self._by_package(qkv, segments, used, out, persistent)
            fa4_kept.keep(variant, forward, before)
        return out if schedule is None else tail_attention(qkv, tail_rows(schedule), out)

    def _variant(
        self, qkv: Tensor, segments: Segments, used: Tensor | None, persistent: bool
    ) -> fa4_kept.Variant | None:
        if not self._hopper:
            return None
        kind = "lazy" if self._own else "package"
        if persistent:  # it was compiled for so many blocks
            kind = f"persistent-{self._processors}"
        return fa4_kept.variant_of(qkv, segments, kind, used is not None)

    def _launch(self, variant: fa4_kept.Variant) -> fa4_kept.Launch | None:
        """The kernel that an earlier process kept; None without one, or while untestable."""
        if variant not in self._kept:
            try:
                self._kept[variant] = fa4_kept.load(variant, self._device)
            except fa4_kept.CapturingError:
                return None
        return self._kept[variant]

    def _forward(self, persistent: bool) -> Callable[..., Any]:
        usual, in_persistent_blocks = self._forwards
        if persistent and in_persistent_blocks is not None:
            return in_persistent_blocks
        return usual

    def _by_package(
        self,
        qkv: Tensor,
        segments: Segments,
        used: Tensor | None,
        out: Tensor,
        persistent: bool = False,
    ) -> None:
        q, k, v = qkv.unbind(1)
        options = {
            "cu_seqlens_q": segments.cu_seqlens,
            "cu_seqlens_k": segments.cu_seqlens,
            "seqused_q": used,
            "max_seqlen_q": segments.max_seqlen,
            "max_seqlen_k": segments.max_seqlen,
            "out": out.view(q.shape),
        }
        try:
            self._forward(persistent)(q, k, v, **options)
        except NotCompiledError as error:
            logger.warning("FlashAttention-4 runs without our parts: %s", error)
            self._own, self._has_persistent = False, False
            self._forwards = _forwards(False, self._processors)
            self._forward(False)(q, k, v, **options)


def _forwards(own: bool, processors: int) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """The forward for any batch, and the persistent one, which only our own parts have."""
    if own:
        try:
            from vitrt.kernels import fa4_hopper

            return (
                fa4_hopper.forward(persistent=False, processors=processors),
                fa4_hopper.forward(persistent=True, processors=processors),
            )
        except (ImportError, AttributeError) as error:  # with another CUTLASS or quack
            logger.warning("FlashAttention-4 runs without our parts, which do not fit: %s", error)
    from flash_attn.cute import interface

    return interface._flash_attn_fwd, None


def _release() -> str | None:
    try:
        return metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:  # a copy without its metadata
        return None


@lru_cache(maxsize=1024)
def runs_even(lengths: tuple[int, ...], heads: int, processors: int) -> bool:
    """Whether persistent blocks end together, about as early as blocks that are not persistent.

    Each takes every `processors`-th tile, whose time depends on the length of its segment; to the
    others the hardware gives the next tile as they become free.
    """
    if min(lengths) == max(lengths):
        return True
    keys = np.asarray(lengths, dtype=np.int64)
    costs = np.repeat(keys + _TILE_COST, -(-keys // _TILE_ROWS) * heads)
    rounds = -(-len(costs) // processors)
    mine = np.pad(costs, (0, rounds * processors - len(costs))).reshape(rounds, processors)
    free = costs.sum() / processors + costs.max() / 2  # about where the hardware's order ends
    return bool(mine.sum(axis=0).max() <= _MOST_UNEVEN * free)


def _unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    missing = [m for m in (_MODULE, "cutlass", "quack") if not installed(m)]
    if missing:
        return f"{', '.join(missing)} is not installed (pip install flash-attn-4)"
    # Compute capability 12 is left out: there the package runs its Ampere kernels, untested by us.
    return not_nvidia(
        device, (9, 0), (12, 0), "a Hopper or Blackwell GPU (compute capability 9 to 11)"
    ) or wrong_shape(dtype, head_dim, HALF_PRECISION, 128)


SPEC = BackendSpec(
    "fa4", lambda device, _, head_dim: FlashAttention4(device, head_dim), _unavailable
)
