"""FlashAttention-4's forward on Hopper, launched without the packages that compiled it.

What `flash_attn.cute.interface._flash_attn_fwd` decides from shapes before it looks for a kernel,
for what we ask of it: packed segments, as many heads of keys as of queries, no mask. Whatever is
not sure to be decided alike goes through that function.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vitrt.kernels import kept
from vitrt.kernels.segments import Segments

_FAMILY, _PERSISTENT = "fa4", "fa4-persistent"
_MOST_SEGMENTS = 256  # of more, it is told in which segment each block lies
_ROWS = 128, 192  # its tiles of query rows: by head size one of these
_ALIGNMENT = 16  # bytes
_TOLERANCE = 0.01  # of the output: it and the probabilities are rounded by 0.2%


class CapturingError(RuntimeError):
    """A kernel would be tried out while a graph is recorded, which allows no such thing."""


Launch = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]


class Variant(NamedTuple):
    """What tells its kernels apart."""

    kind: str  # the package's own, or with our parts
    dtype: torch.dtype
    head_dim: int
    scheduled: bool  # with a count of query rows for each segment
    one_tile: bool  # a segment has no more rows than a tile


def variant_of(qkv: Tensor, segments: Segments, kind: str, scheduled: bool) -> Variant | None:
    """Of a batch on Hopper; None where only the package knows, and where nobody wants others."""
    if not kept.wanted():
        return None
    longest, rows = segments.max_seqlen, qkv.shape[0]
    if not qkv.is_cuda or not qkv.is_contiguous() or rows == 0 or qkv.data_ptr() % _ALIGNMENT:
        return None
    if len(segments.cu_seqlens) > _MOST_SEGMENTS + 1 or _ROWS[0] < longest <= _ROWS[1]:
        return None
    return Variant(kind, qkv.dtype, qkv.shape[-1], scheduled, longest <= _ROWS[0])


def _key(variant: Variant) -> str:
    return f"sm_90a {variant}"


def _family(variant: Variant) -> str:
    return _PERSISTENT if variant.kind.startswith("persistent") else _FAMILY


def any_persistent() -> bool:
    """Whether a process here could import our parts, and compiled a persistent kernel."""
    return kept.wanted() and kept.any_of(_PERSISTENT)


def keys(attend: Any) -> set[Any]:
    """Those of the kernels that the package has in memory."""
    return set(getattr(getattr(attend, "compile_cache", None), "cache", ()))


def keep(variant: Variant, attend: Any, before: set[Any]) -> None:
    """Keep the one kernel that a call brought into memory, `before` which there were others."""
    new = list(keys(attend) - before)
    cache = getattr(attend, "compile_cache", None)
    folder = getattr(cache, "cache_path", None)
    if len(new) == 1 and cache is not None and folder is not None:
        object_file = Path(folder, f"{cache._key_to_hash(new[0])}.o")
        kept.keep(_family(variant), _key(variant), object_file, {})


def load(variant: Variant, device: torch.device) -> Launch | None:
    """The kernel if it was kept, and computes what it should; CapturingError in a graph."""
    found = kept.load(_family(variant), _key(variant))
    if found is None:
        return None
    if torch.cuda.is_current_stream_capturing():
        raise CapturingError
    launch = _launch(found[0], variant.head_dim**-0.5)
    right = kept.proven(_family(variant), _key(variant), lambda: _is_right(launch, variant, device))
    return launch if right else None


def _launch(function: kept.Function, scale: float) -> Launch:
    def launch(qkv: Tensor, out: Tensor, cu_seqlens: Tensor, used: Tensor | None) -> None:
        """qkv [T, 3, H, Dh], out [T, H, Dh], cu_seqlens [S + 1], used query rows [S] or None."""
        q, k, v = qkv.unbind(1)
        function(
            q, k, v, out,
            None,  # log-sum-exp
            scale, cu_seqlens, cu_seqlens, used,
            None, None,  # used keys, page table
            None, None, None, None,  # window to the left, to the right, sink, sparse blocks
            (None, None),  # what masks and scores take
            None, None,  # where each segment's blocks begin
        )  # fmt: skip

    return launch


def _is_right(launch: Launch, variant: Variant, device: torch.device) -> bool:
    """Two segments of two heads, held against float32 on the host."""
    lengths = (120, 40) if variant.one_tile else (300, 260)
    whole = (64, lengths[1]) if variant.scheduled else lengths
    rows = sum(lengths)
    random = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, 3, 2, variant.head_dim, generator=random).to(variant.dtype)
    bounds = [0, lengths[0], rows]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    used = torch.tensor(whole, dtype=torch.int32, device=device) if variant.scheduled else None
    out = torch.zeros(rows, 2, variant.head_dim, dtype=variant.dtype, device=device)
    launch(qkv.to(device), out, cu_seqlens, used)
    actual, wanted = out.cpu().float(), torch.zeros(out.shape)
    for (start, end), count in zip(pairwise(bounds), whole, strict=True):
        q, k, v = qkv[start:end].float().permute(1, 2, 0, 3)
        values = scaled_dot_product_attention(q[None, :, :count], k[None], v[None])[0]
        wanted[start : start + count] = values.transpose(0, 1)
        actual[start + count : end] = 0  # rows that are not used may hold anything
    return bool((actual - wanted).norm() / wanted.norm() < _TOLERANCE)
