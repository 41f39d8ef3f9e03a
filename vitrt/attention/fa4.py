"""FlashAttention-4 (CuTe) for Hopper and Blackwell, from the `flash-attn-4` package."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitrt.attention.base import BackendSpec, Schedule, attention_shape
from vitrt.attention.last_wave import schedule_last_wave, tail_rows
from vitrt.attention.probe import HALF_PRECISION, installed, not_nvidia, wrong_shape
from vitrt.kernels.disk_cache import keep_kernels
from vitrt.kernels.persistent import is_hopper, processors
from vitrt.kernels.segments import Rotary, Segments
from vitrt.kernels.tail_attention import tail_attention

_MODULE = "flash_attn.cute"
_TILE_ROWS = 192  # query rows of a block on Hopper, for heads of at most _TILE_HEAD_DIM
_TILE_HEAD_DIM = 96


class FlashAttention4:
    """FlashAttention-4's variable-length forward over strided views of the packed qkv.

    The first call for each head size and dtype compiles for some seconds, or loads what an earlier
    process compiled; segment lengths do not matter. The public function allocates its output and
    enters autograd, so we call the one below it. On Hopper, where that saves a wave of blocks, it
    computes whole tiles of query rows only and our own kernel the rest.
    """

    name = "fa4"
    capturable = True  # once compiled: graph capture must follow one eager call
    applies_rotary = False

    def __init__(self, device: torch.device, head_dim: int) -> None:
        keep_kernels()
        from flash_attn.cute import interface

        self._attend = interface._flash_attn_fwd
        self._processors = processors(device)
        self._knows_tiles = is_hopper(device) and head_dim <= _TILE_HEAD_DIM

    def schedule(self, lengths: Sequence[int], heads: int) -> Schedule | None:
        if not self._knows_tiles:
            return None
        return schedule_last_wave(lengths, heads, tile_rows=_TILE_ROWS, processors=self._processors)

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = qkv.new_empty(attention_shape(qkv))
        q, k, v = qkv.unbind(1)
        schedule = segments.schedule
        self._attend(
            q,
            k,
            v,
            cu_seqlens_q=segments.cu_seqlens,
            cu_seqlens_k=segments.cu_seqlens,
            # Blocks past it end, and write nothing.
            seqused_q=None if schedule is None else schedule.per_segment,
            max_seqlen_q=segments.max_seqlen,
            max_seqlen_k=segments.max_seqlen,
            out=out.view(q.shape),
        )
        return out if schedule is None else tail_attention(qkv, tail_rows(schedule), out)


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
