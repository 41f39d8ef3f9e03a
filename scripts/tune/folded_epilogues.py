"""Epilogues of quack's products that carry a norm: what one leaves of it, and what the next takes.

A module of its own, since quack keeps compiled kernels under where their functions lie. Only for
folded_norm.py, which says what they compute; imports quack and CUTLASS.
"""

from __future__ import annotations

from typing import Any

from quack.activation import gelu_tanh_approx
from quack.activation import swiglu as silu_mul
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.math import unpack
from quack.epilogue.ops import ColVecLoad, ColVecReduce, RowVecLoad

_BIAS = {"bias": RowVecLoad("bias")}
_SQUARES = {"squares": ColVecReduce("squares", scaled=True)}
_SUMS = {"sums": ColVecReduce("sums"), **_SQUARES}


@gemm_epilogue(outputs=("copy",), ops={**_BIAS, "weight": RowVecLoad("weight")}, reduces=_SQUARES)
def leave_rms(acc: Any, c: Any, bias: Any, weight: Any) -> dict[str, Any]:
    """The new residual, its copy times the next norm's weight, and each row's sum of squares."""
    value = c + (acc + bias)
    return {"D": value, "copy": value * weight, "squares": (value, value)}


@gemm_epilogue(outputs=("copy",), ops={**_BIAS, "weight": RowVecLoad("weight")}, reduces=_SUMS)
def leave_layer(acc: Any, c: Any, bias: Any, weight: Any) -> dict[str, Any]:
    """The same, and each row's sum."""
    value = c + (acc + bias)
    return {"D": value, "copy": value * weight, "sums": value, "squares": (value, value)}


_RMS = {**_BIAS, "inverse": ColVecLoad("inverse")}


@gemm_epilogue(ops=_RMS)
def take_rms(acc: Any, inverse: Any, bias: Any) -> dict[str, Any]:
    return {"D": acc * inverse + bias}


@gemm_epilogue(outputs=("out",), mode="acc_pair", ops=_RMS)
def take_rms_swiglu(acc: Any, inverse: Any, bias: Any) -> dict[str, Any]:
    gate, up = unpack(acc * inverse + bias)
    return {"out": silu_mul(gate, up)}


# mean: of a row, times its inverse; columns: sums over K of weight [N, K] times the norm's weight.
_LAYER = {**_RMS, "mean": ColVecLoad("mean"), "columns": RowVecLoad("columns")}


@gemm_epilogue(ops=_LAYER)
def take_layer(acc: Any, inverse: Any, mean: Any, columns: Any, bias: Any) -> dict[str, Any]:
    return {"D": acc * inverse - mean * columns + bias}


@gemm_epilogue(ops=_LAYER)
def take_layer_gelu(acc: Any, inverse: Any, mean: Any, columns: Any, bias: Any) -> dict[str, Any]:
    return {"D": gelu_tanh_approx(acc * inverse - mean * columns + bias)}
