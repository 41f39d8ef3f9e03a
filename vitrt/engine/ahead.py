"""Compile what a tower runs on a GPU that this machine does not have, before there is one.

The tower is built without weights, on tensors without memory, and run on the grids that
`Engine.load_kernels` runs at start-up, once as an eager forward and once as a graph records it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrt.attention import AttentionBackend, AttentionChoice, attention_shape
from vitrt.config import RuntimeConfig, VisionConfig
from vitrt.engine.device import check_precision, resolve_dtype
from vitrt.engine.eager_runner import EagerRunner
from vitrt.engine.engine import attention_of, kernel_plans
from vitrt.kernels.ahead import Chip, compiling_for
from vitrt.kernels.patchify import patchify
from vitrt.kernels.segments import Rotary, Segments
from vitrt.models.families import build_tower
from vitrt.models.packed_plan import PlanLayout, view_plan

_COMPILED_HERE = ("fa4", "triton", "short", "window")  # the other backends bring machine code


class _Silent:
    """Stands in for a backend that compiles nothing; computes nothing."""

    capturable = True
    applies_rotary = False

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        return qkv.new_empty(attention_shape(qkv)) if out is None else out


def compile_tower(config: VisionConfig, runtime: RuntimeConfig, chip: Chip) -> int:
    """Fill the folders that kernels are kept in with what a tower of `config` runs on `chip`.

    Returns how many of Triton's kernels there are. Call it in a process of its own. ValueError for
    an attention backend, a dtype or a precision that does not run on `chip`.
    """
    with compiling_for(chip, launchers=True) as loaded, torch.no_grad():
        device = torch.device("cuda", 0)
        dtype = resolve_dtype(runtime.dtype, device)
        check_precision(runtime.precision, device, dtype)
        tower = build_tower(config)
        tower.allocate(lambda meta: torch.empty(meta.shape, dtype=dtype, device=device))
        if runtime.precision == "fp8":
            tower.use_float8(runtime.fp8_skip_blocks)
        if runtime.batch_invariant:
            tower.fix_products()
        tower.compile_kernels()
        runner = EagerRunner(tower.eval(), attention_of(tower, runtime))
        table = torch.empty(2, 3, 256, dtype=torch.float32, device=device)
        size, temporal = config.patch_size, config.temporal_patch_size
        for plan in kernel_plans(runner):
            chosen = runner.attention_for(plan)
            full, window = _or_silent(chosen.choice.full), _or_silent(chosen.choice.window)
            layout = PlanLayout.exact(plan).scheduled(chosen.schedule).with_origins("sources")
            for padded in (False, True):
                buffer = torch.empty(layout.size, dtype=torch.int32, device=device)
                views = view_plan(buffer, layout, plan, padded=padded)
                pixels = torch.empty(plan.num_patches * 3, dtype=torch.uint8, device=device)
                assert views.origins is not None
                patches = patchify(pixels, views.origins, table, size, temporal, dtype)
                runner.forward(patches, views, AttentionChoice(full, window))
    return len(loaded)


def _or_silent(backend: AttentionBackend) -> AttentionBackend:
    return backend if backend.name in _COMPILED_HERE else _Silent(backend.name)
