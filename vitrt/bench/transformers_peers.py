"""transformers as its users run it: eager with sdpa or FlashAttention-3, and compiled."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from vitrt.bench.contenders import Forward, UnavailableError
from vitrt.compare.errors import Output, output_of
from vitrt.config import Grid

FA3_MODULES = ("flash_attn_interface", "fa3_fwd_interface")


class Eager:
    """transformers without a compiler: grids on the device, index arithmetic inside every call."""

    same_tower = True

    def __init__(self, tower: nn.Module, attention: str) -> None:
        self.name = "fa3" if attention == "flash_attention_3" else attention
        self.label = f"transformers eager, {attention}"
        self.tower = tower
        self.attention = attention

    def forward_for(self, grids: tuple[Grid, ...]) -> Forward:
        grid_thw = torch.tensor(grids, device=_device(self.tower))

        def forward(pixels: Tensor) -> Output:
            use_attention(self.tower, self.attention)
            return output_of(self.tower(pixels, grid_thw=grid_thw))

        return forward


class Compiled:
    """torch.compile over the whole tower at this one shape, index arithmetic done beforehand.

    That is more than a server can do (it does not see one shape only), and so the hardest peer.
    With FA3 where it can be imported, else sdpa.
    """

    name = "compile"
    same_tower = True

    def __init__(self, tower: nn.Module, attention: str, backend: str = "inductor") -> None:
        self.label = f"transformers under torch.compile, {attention}"
        self.tower = tower
        self.attention = attention
        self.backend = backend

    def forward_for(self, grids: tuple[Grid, ...]) -> Forward:
        torch._dynamo.reset()
        # The decorators around forward() keep context variables, which break the graph; they only
        # collect intermediate states that nobody asked for.
        forward: Any = inspect.unwrap(type(self.tower).forward)
        compiled = torch.compile(forward, dynamic=False, backend=self.backend)
        grid_thw = torch.tensor(grids, device=_device(self.tower))
        indexes = precomputed(self.tower, grid_thw)

        def call(pixels: Tensor) -> Output:
            use_attention(self.tower, self.attention)  # what was traced is guarded by it
            return output_of(compiled(self.tower, pixels, grid_thw, **indexes))

        return call


def best_attention() -> str:
    """The attention that serves transformers best here."""
    try:
        load_fa3()
    except UnavailableError:
        return "sdpa"
    return "flash_attention_3"


def load_fa3() -> None:
    """Give transformers' "flash_attention_3" whichever module provides FA3's functions here."""
    if not torch.cuda.is_available():
        raise UnavailableError("FlashAttention-3 needs a CUDA device")
    module, reasons = None, []
    for name in FA3_MODULES:
        try:
            module = importlib.import_module(name)
            break
        except (ImportError, OSError) as error:
            reasons.append(f"{name}: {error}")
    if module is None:
        raise UnavailableError("; ".join(reasons))
    give_flash_attention(module)


def give_flash_attention(module: Any) -> None:
    """Let transformers take its "flash_attention_3" functions from `module`.

    It imports them from `flash_attn_interface` once and keeps them, so that name has to stand for
    `module` only while it does so.
    """
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

    missing = object()
    before = sys.modules.get("flash_attn_interface", missing)
    sys.modules["flash_attn_interface"] = module
    try:
        lazy_import_flash_attention("flash_attention_3")
    finally:
        if before is missing:
            del sys.modules["flash_attn_interface"]
        else:
            sys.modules["flash_attn_interface"] = before  # type: ignore[assignment]


def use_attention(tower: Any, attention: str) -> None:
    """Switch a tower that is already built.

    Not by set_attn_implementation: it looks for the pip distribution by name, and the function it
    would use is in place already.
    """
    tower.config._attn_implementation_internal = attention


def precomputed(tower: Any, grid_thw: Tensor) -> dict[str, Any]:
    """The index tensors and lengths of a batch, under the names transformers' forward looks for."""
    from transformers import vision_utils

    config = tower.config
    merge = config.spatial_merge_size
    cu_seqlens = vision_utils.get_vision_cu_seqlens(grid_thw)
    indexes: dict[str, Any] = {
        "position_ids": vision_utils.get_vision_position_ids(grid_thw, merge),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": int(cu_seqlens.diff().max()),
    }
    if getattr(config, "window_size", None) is not None:
        window_index, windows = vision_utils.get_vision_window_index(
            grid_thw, merge, config.window_size, config.patch_size
        )
        # transformers leaves the index on the host, and copies it over in every forward.
        indexes["window_index"] = window_index.to(grid_thw.device)
        indexes["cu_window_seqlens"] = windows
        indexes["max_window_seqlen"] = int(windows.diff().max())
    if hasattr(tower, "num_grid_per_side"):
        taps, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid_thw,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        indexes["interp_indices"], indexes["interp_weights"] = taps, weights
    return indexes


def _device(tower: nn.Module) -> torch.device:
    return next(tower.parameters()).device
