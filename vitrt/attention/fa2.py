"""FlashAttention-2 from the `flash-attn` package."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrt.attention.base import BackendSpec, attention_shape
from vitrt.attention.probe import HALF_PRECISION, installed, not_nvidia, wrong_shape
from vitrt.kernels.segments import Rotary, Segments

_MODULE = "flash_attn.flash_attn_interface"


class FlashAttention2:
    """flash_attn_varlen_func over strided views of the packed qkv.

    It has no way to write into a given tensor.
    """

    name = "fa2"
    capturable = True
    applies_rotary = False

    def __init__(self) -> None:
        from flash_attn.flash_attn_interface import flash_attn_varlen_func

        self._attend = flash_attn_varlen_func

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        cu, longest = segments.cu_seqlens, segments.max_seqlen
        q, k, v = qkv.unbind(1)
        attended = self._attend(q, k, v, cu, cu, longest, longest).view(attention_shape(qkv))
        return attended if out is None else out.copy_(attended)


def _unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if not installed(_MODULE):
        return f"{_MODULE} is not installed (pip install flash-attn)"
    made_for = "an NVIDIA GPU of compute capability 8.0 or newer"
    return not_nvidia(device, (8, 0), (13, 0), made_for) or wrong_shape(
        dtype, head_dim, HALF_PRECISION, 256
    )


SPEC = BackendSpec("fa2", lambda *_: FlashAttention2(), _unavailable)
