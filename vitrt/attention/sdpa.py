"""Attention through PyTorch alone: works on every device and in every dtype.

Segments of equal length are one batch of one scaled_dot_product_attention call. On CUDA,
half-precision inputs go through torch's own variable-length attention, which needs no batching.

Shapes: T patches, N segments of one length L, H heads, Dh head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrt.attention.base import AttentionBackend, BackendSpec, attention_shape
from vitrt.attention.probe import HALF_PRECISION, cuda_capability, installed
from vitrt.kernels.segments import Rotary, Segments

# A run of neighbouring segments of one length is a view. Runs with fewer rows than this are
# gathered into one batch with the others of their length, so that there are never more than T / 256
# calls plus one for each length; above it, copying would cost more than a call.
_ROWS_WORTH_A_CALL = 256


@dataclass(frozen=True, slots=True)
class _Batch:
    """Segments of one length that share a call."""

    length: int
    count: int
    start: int  # first of count * length neighbouring rows; unused where `rows` lists them
    rows: Tensor | None  # int64 [count * length]; None where the rows are neighbours


@lru_cache(maxsize=32)
def _batches(lengths: tuple[int, ...], device: torch.device) -> tuple[_Batch, ...]:
    """Group segments by length; cached because each layer of a tower asks with the same lengths."""
    runs: dict[int, list[tuple[int, int]]] = {}  # length -> (first row, segments) of each run
    row, previous = 0, 0
    for length in lengths:
        if length > 0:
            of_length = runs.setdefault(length, [])
            if length == previous:
                start, count = of_length[-1]
                of_length[-1] = (start, count + 1)
            else:
                of_length.append((row, 1))
            previous = length
        row += length
    batches = []
    for length, of_length in runs.items():
        short = [run for run in of_length if run[1] * length < _ROWS_WORTH_A_CALL]
        if len(short) > 1:
            spans = [
                torch.arange(start, start + count * length, device=device) for start, count in short
            ]
            count = sum(count for _, count in short)
            batches.append(_Batch(length, count, 0, torch.cat(spans)))
            of_length = [run for run in of_length if run[1] * length >= _ROWS_WORTH_A_CALL]
        batches.extend(_Batch(length, count, start, None) for start, count in of_length)
    return tuple(batches)


class SdpaBackend:
    """Batches of equal segments through torch.nn.functional.scaled_dot_product_attention."""

    name = "sdpa"
    capturable = False  # the batches follow the segment lengths of this very call
    applies_rotary = False

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        tokens, _, heads, head_dim = qkv.shape
        batches = _batches(segments.lengths, qkv.device)
        if out is None and len(batches) == 1 and batches[0].count * batches[0].length == tokens:
            return _attend(qkv, batches[0]).reshape(tokens, heads * head_dim)
        if out is None:
            out = qkv.new_empty(attention_shape(qkv))
        for batch in batches:
            rows = batch.count * batch.length
            if batch.rows is None:
                attended = _attend(qkv[batch.start : batch.start + rows], batch)
                out[batch.start : batch.start + rows].view(attended.shape).copy_(attended)
            else:
                attended = _attend(qkv.index_select(0, batch.rows), batch)
                out.index_copy_(0, batch.rows, attended.reshape(rows, heads * head_dim))
        return out


def _attend(qkv: Tensor, batch: _Batch) -> Tensor:
    """[N * L, 3, H, Dh] -> [N, L, H, Dh]."""
    packed = qkv.view(batch.count, batch.length, *qkv.shape[1:])
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class VarlenSdpaBackend:
    """FlashAttention-2 as PyTorch ships it, torch.nn.attention.varlen, on strided views of qkv."""

    name = "sdpa"
    capturable = True
    applies_rotary = False

    def __init__(self) -> None:
        from torch.nn.attention import varlen

        self._attend = varlen.varlen_attn
        self._attend_into = getattr(varlen, "varlen_attn_out", None)  # torch 2.12 and newer

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        cu, longest = segments.cu_seqlens, segments.max_seqlen
        q, k, v = qkv.unbind(1)
        if out is None or self._attend_into is None:
            attended = cast(Tensor, self._attend(q, k, v, cu, cu, longest, longest))
            attended = attended.view(attention_shape(qkv))
            return attended if out is None else out.copy_(attended)
        self._attend_into(out.view(q.shape), q, k, v, cu, cu, longest, longest)
        return out


def _takes_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    capability = cuda_capability(device)
    return (
        capability is not None
        and capability >= (8, 0)
        and dtype in HALF_PRECISION
        and head_dim % 8 == 0
        and head_dim <= 256
        and installed("torch.nn.attention.varlen")
    )


def _load(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    return VarlenSdpaBackend() if _takes_varlen(device, dtype, head_dim) else SdpaBackend()


SPEC = BackendSpec("sdpa", _load, lambda *_: None)
