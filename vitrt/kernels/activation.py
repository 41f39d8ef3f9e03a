"""SwiGLU and the GELUs for where no matrix product carries them in its epilogue.

All is float32 inside and rounded once.

Shapes: T patches (or merged tokens), F width after SwiGLU, N width of a plain activation.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrt.kernels.dispatch import ceil_div, jit, tl, use_triton

GeluKind = Literal["gelu", "gelu_tanh", "quick_gelu"]

# Four warps whose lanes hold one 16-byte load of bf16 each.
_BLOCK = 1024
_WARPS = 4


@jit()
def _bias(bias, start, index, mask, N: tl.constexpr, ALIGN: tl.constexpr):
    """The bias of values start + index. ALIGN divides N and start: wide loads."""
    first = tl.multiple_of((start % N).to(tl.int32), ALIGN)
    return tl.load(bias + (first + index) % N, mask=mask, other=0.0).to(tl.float32)


@jit(do_not_specialize=["tokens"])
def _swiglu_kernel(
    x, bias, out, tokens, N: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    """BLOCK inputs g0, u0, g1, u1, ... to BLOCK / 2 outputs, whatever rows they lie in."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    left = tokens.to(tl.int64) * N - start
    mask = index < left
    pairs = tl.load(x + start + index, mask=mask, other=0.0).to(tl.float32)
    if BIASED:
        pairs += _bias(bias, start, index, mask, N, ALIGN)
    gate, up = tl.split(tl.reshape(pairs, (BLOCK // 2, 2)))
    result = gate / (1.0 + tl.exp(-gate)) * up
    half_index = tl.arange(0, BLOCK // 2)
    tl.store(
        out + start // 2 + half_index, result.to(out.dtype.element_ty), mask=half_index < left // 2
    )


@jit(do_not_specialize=["tokens"])
def _bias_act_kernel(
    x, bias, out, tokens, N: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
    BIASED: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = tl.arange(0, BLOCK)
    mask = index < tokens.to(tl.int64) * N - start
    values = tl.load(x + start + index, mask=mask, other=0.0).to(tl.float32)
    if BIASED:
        values += _bias(bias, start, index, mask, N, ALIGN)
    if KIND == "quick_gelu":
        values = values / (1.0 + tl.exp(-1.702 * values))
    elif KIND == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), u = sqrt(2 / pi) (v + 0.044715 v^3)
        twice = 1.5957691216057308 * (values + 0.044715 * values * values * values)
        values = values / (1.0 + tl.exp(-twice))
    else:
        values = 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))
    tl.store(out + start + index, values.to(out.dtype.element_ty), mask=mask)


def _swiglu_triton(
    gate_up: Tensor, bias: Tensor | None = None, out: Tensor | None = None, **tiling: int
) -> Tensor:
    if out is None:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    return _launch(_swiglu_kernel, gate_up, bias, out, **tiling)


def _bias_act_triton(
    x: Tensor, bias: Tensor | None, kind: GeluKind, out: Tensor | None = None, **tiling: int
) -> Tensor:
    out = torch.empty_like(x) if out is None else out
    return _launch(_bias_act_kernel, x, bias, out, kind, **tiling)


def _launch(
    kernel: Any,
    x: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *kind: GeluKind,
    block: int = _BLOCK,
    warps: int = _WARPS,
) -> Tensor:
    assert x.is_contiguous()
    tokens, width = x.shape
    if tokens:
        kernel[(ceil_div(tokens * width, block),)](
            x, bias, out, tokens, width, min(width & -width, 16), block, bias is not None, *kind,
            num_warps=warps,
        )  # fmt: skip
    return out


def swiglu_ref(gate_up: Tensor, bias: Tensor | None = None) -> Tensor:
    """SwiGLU as the kernel does it: float32 inside, one rounding."""
    values = gate_up.float() if bias is None else gate_up.float() + bias.float()
    # Copied first: on the CPU, silu of every other value is slower than the copy and silu together.
    gate = values[..., ::2].contiguous()
    return F.silu(gate, inplace=True).mul_(values[..., 1::2]).to(gate_up.dtype)


def bias_act_ref(x: Tensor, bias: Tensor | None, kind: GeluKind) -> Tensor:
    """The activation as the kernel does it: float32 inside, one rounding."""
    values = x.float() if bias is None else x.float() + bias.float()
    if kind == "quick_gelu":
        return (values * torch.sigmoid(1.702 * values)).to(x.dtype)
    return F.gelu(values, approximate="tanh" if kind == "gelu_tanh" else "none").to(x.dtype)


def swiglu(gate_up: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """silu(g) * u of gate_up [T, 2F] + bias [2F], columns g0, u0, g1, u1, ...; returns [T, F]."""
    if use_triton(gate_up):
        return _swiglu_triton(gate_up, bias, out)
    result = swiglu_ref(gate_up, bias)
    return result if out is None else out.copy_(result)


def bias_act(
    x: Tensor, bias: Tensor | None, kind: GeluKind, *, out: Tensor | None = None
) -> Tensor:
    """GELU of x [T, N] + bias [N]: exact (erf), by tanh, or "quick", x * sigmoid(1.702 x).

    Returns [T, N], in `out` (may be x).
    """
    if kind not in get_args(GeluKind):
        raise ValueError(f"kind {kind!r} is none of {', '.join(get_args(GeluKind))}")
    if use_triton(x):
        return _bias_act_triton(x, bias, kind, out)
    result = bias_act_ref(x, bias, kind)
    return result if out is None else out.copy_(result)
