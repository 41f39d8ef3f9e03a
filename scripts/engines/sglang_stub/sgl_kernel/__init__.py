"""In place of SGLang's compiled kernels, for a CPU without their build: names, nothing computed.

SGLang imports these names on a CPU; under `torch_native` attention, in float32, it calls none of
them for Qwen-VL, but PyTorch. What is called raises NotImplementedError.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

# Operators that models/qwen3_5.py looks up when it is imported.
_LOOKED_UP = (
    "fused_gdn_gating_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_sigmoid_gating_delta_rule_update_cpu",
    "fused_sigmoid_mul_cpu",
)


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name}: this is a stub")

    return missing


class _Submodules(MetaPathFinder, Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Without its scalar types SGLang takes mocks of its own.
        if not name.startswith("sgl_kernel.") or name == "sgl_kernel.scalar_type":
            return None
        return ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__getattr__"] = __getattr__


sys.meta_path.append(_Submodules())
for _name in _LOOKED_UP:
    torch.library.define(f"sgl_kernel::{_name}", "() -> ()")
