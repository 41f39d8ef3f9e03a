"""What quack's products do before they store: each a function over the float32 accumulator.

Importing this imports quack and CUTLASS, which takes seconds: only gemm_quack.py does, where the
device can use them.

quack keeps compiled kernels on disk under these functions' names; disk_cache.py adds their text.
"""

from __future__ import annotations

from typing import Any

from quack.activation import gelu_erf, gelu_tanh_approx
from quack.activation import quick_gelu as silu_1702
from quack.activation import swiglu as silu_mul
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.math import unpack
from quack.epilogue.ops import RowVecLoad

# Pinned: quack would otherwise guess from the shapes whether the vector runs along M or N.
_BIAS = {"bias": RowVecLoad("bias")}


@gemm_epilogue(ops=_BIAS)
def add_bias(acc: Any, bias: Any) -> dict[str, Any]:
    return {"D": acc + bias}


@gemm_epilogue(ops=_BIAS)
def add_bias_residual(acc: Any, c: Any, bias: Any) -> dict[str, Any]:
    return {"D": c + (acc + bias)}


@gemm_epilogue(ops=_BIAS)
def gelu(acc: Any, bias: Any) -> dict[str, Any]:
    return {"D": gelu_erf(acc + bias)}


@gemm_epilogue(ops=_BIAS)
def gelu_tanh(acc: Any, bias: Any) -> dict[str, Any]:
    return {"D": gelu_tanh_approx(acc + bias)}


@gemm_epilogue(ops=_BIAS)
def quick_gelu(acc: Any, bias: Any) -> dict[str, Any]:
    return {"D": silu_1702(acc + bias)}


@gemm_epilogue(outputs=("out",), mode="acc_pair", ops=_BIAS)
def swiglu(acc: Any, bias: Any) -> dict[str, Any]:
    gate, up = unpack(acc + bias)  # neighbouring columns: weight rows come as g0, u0, g1, u1, ...
    return {"out": silu_mul(gate, up)}


# The same over products of e4m3 operands, whose scales come off the accumulator first.

_SCALED = {"scale": RowVecLoad("scale"), **_BIAS}


@gemm_epilogue(ops=_SCALED)
def scaled_add_bias(acc: Any, scale: Any, bias: Any) -> dict[str, Any]:
    return {"D": acc * scale + bias}


@gemm_epilogue(ops=_SCALED)
def scaled_add_bias_residual(acc: Any, c: Any, scale: Any, bias: Any) -> dict[str, Any]:
    return {"D": c + (acc * scale + bias)}


@gemm_epilogue(ops={"out_scale": RowVecLoad("out_scale"), **_SCALED})
def scaled_gelu_tanh(acc: Any, scale: Any, bias: Any, out_scale: Any) -> dict[str, Any]:
    return {"D": gelu_tanh_approx(acc * scale + bias) * out_scale}


@gemm_epilogue(ops={"out_scale": RowVecLoad("out_scale"), **_SCALED})
def scaled_quick_gelu(acc: Any, scale: Any, bias: Any, out_scale: Any) -> dict[str, Any]:
    return {"D": silu_1702(acc * scale + bias) * out_scale}


@gemm_epilogue(outputs=("out",), mode="acc_pair", ops=_SCALED)
def scaled_swiglu(acc: Any, scale: Any, bias: Any) -> dict[str, Any]:
    gate, up = unpack(acc * scale + bias)
    return {"out": silu_mul(gate, up)}


SCALED_EPILOGUES = {
    "bias": scaled_add_bias,
    "residual": scaled_add_bias_residual,
    "gelu_tanh": scaled_gelu_tanh,
    "quick_gelu": scaled_quick_gelu,
    "swiglu": scaled_swiglu,
}

EPILOGUES = {
    "bias": add_bias,
    "residual": add_bias_residual,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "swiglu": swiglu,
}
