"""FlashAttention-3 for Hopper, from either of the modules that provide it."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from vitrt.attention.base import BackendSpec, attention_shape
from vitrt.attention.probe import installed, not_nvidia, wrong_shape
from vitrt.kernels.segments import Rotary, Segments

# module -> the namespace of torch.ops where importing it registers the kernels. We call the
# operator itself: the Python wrapper around it costs more time than a small image's attention, and
# cannot write into `out`.
_MODULES = {"flash_attn_interface": "flash_attn_3", "fa3_fwd_interface": "fa3_fwd"}


class FlashAttention3:
    """FlashAttention-3's variable-length forward over strided views of the packed qkv."""

    name = "fa3"
    capturable = True
    applies_rotary = False

    def __init__(self) -> None:
        module = next(name for name in _MODULES if installed(name))
        importlib.import_module(module)
        self._attend = getattr(torch.ops, _MODULES[module]).fwd.default

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        if out is None:
            out = qkv.new_empty(attention_shape(qkv))
        q, k, v = qkv.unbind(1)
        self._attend(
            q,
            k,
            v,
            out=out.view(q.shape),
            cu_seqlens_q=segments.cu_seqlens,
            cu_seqlens_k=segments.cu_seqlens,
            max_seqlen_q=segments.max_seqlen,
            max_seqlen_k=segments.max_seqlen,
            softmax_scale=q.shape[-1] ** -0.5,
            # The heuristic would split by the longest segment: results would depend on the batch.
            num_splits=1,
        )
        return out


def _unavailable(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if not any(installed(module) for module in _MODULES):
        return f"none of {', '.join(_MODULES)} is installed (pip install fa3-fwd)"
    # bfloat16 alone: the published builds leave float16 out.
    made_for = "a Hopper GPU (compute capability 9.0)"
    return not_nvidia(device, (9, 0), (10, 0), made_for) or wrong_shape(
        dtype, head_dim, (torch.bfloat16,), 256
    )


SPEC = BackendSpec("fa3", lambda *_: FlashAttention3(), _unavailable)
