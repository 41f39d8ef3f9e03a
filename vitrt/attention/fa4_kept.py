"""FlashAttention-4's forward on Hopper, launched without the packages that compiled it.

The package picks a kernel by shapes, in `flash_attn.cute.interface._flash_attn_fwd`. Here the same
choice is made for what we ask of it: packed segments, as many key heads as query heads, no mask.
Where the choice might differ, the call goes through that function.
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
_MOST_SEGMENTS = 256  # with more, the package also passes the segment that each block lies in
_ROWS = 128, 192  # query rows of a tile: the head size decides which of the two
_ALIGNMENT = 16  # bytes
_TOLERANCE = 0.01  # relative: output and probabilities are each rounded by 0.2%


class CapturingError(RuntimeError):
    """A loaded kernel must be tested before it is used, and a graph is being recorded."""


Launch = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]


class Variant(NamedTuple):
    """What one compiled kernel is for."""

    kind: str  # the package's own, or with our parts
    dtype: torch.dtype
    head_dim: int
    scheduled: bool  # takes a count of query rows for each segment
    one_tile: bool  # no segment has more rows than a tile


def variant_of(qkv: Tensor, segments: Segments, kind: str, scheduled: bool) -> Variant | None:
    """The kernel that a batch on Hopper needs; None to let the package choose it."""
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


def any_kept() -> bool:
    """Whether a kernel was kept, so that the package works here."""
    return kept.any_of(_FAMILY)


def any_persistent() -> bool:
    """Whether a persistent kernel was kept, so that our parts fit the packages here."""
    return kept.any_of(_PERSISTENT)


def keys(attend: Any) -> set[Any]:
    """The keys of the kernels that the package has in memory."""
    return set(getattr(getattr(attend, "compile_cache", None), "cache", ()))


def keep(variant: Variant, attend: Any, before: set[Any]) -> None:
    """Keep the kernel that a call compiled; `before` it the package had kernels of those keys."""
    new = list(keys(attend) - before)
    cache = getattr(attend, "compile_cache", None)
    folder = getattr(cache, "cache_path", None)
    if len(new) == 1 and folder is not None:
        kept.keep(_family(variant), _key(variant), lambda: (_object_file(cache, new[0]), {}))


def _object_file(cache: Any, key: Any) -> Path:
    """Where the package keeps what it compiled under this key."""
    return Path(cache.cache_path, f"{cache._key_to_hash(key)}.o")


def load(variant: Variant, device: torch.device) -> Launch | None:
    """The kept kernel, tested; None without one. CapturingError while a graph is recorded."""
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
    """Whether it attends as float32 on the host does, over two segments of two heads."""
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
