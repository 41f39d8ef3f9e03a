"""Modules that replace a transformers model's `visual`: vitrt's tower, or features as they are.

Shapes: T patches, M merged tokens, O output width, L deepstack levels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrt.engine.batch import PixelValues
from vitrt.engine.engine import Engine
from vitrt.engine.outside_compiler import outside_compiler
from vitrt.engine.request import Request
from vitrt.models.config_file import read_vision_config


class ReplacementVisual(nn.Module):
    """Takes the place of a model's `visual`, and keeps that module aside, unregistered."""

    def __init__(self, original: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._kept = (original,)  # in a tuple, so that it is no submodule
        self.config = original.config
        self.vision = read_vision_config(original.config.to_dict())
        self.spatial_merge_size = self.vision.spatial_merge_size
        self.spatial_merge_unit = self.vision.merge_unit
        self.patch_size = self.vision.patch_size
        self.dtype = dtype
        self.device = device

    @property
    def original(self) -> Any:
        return self._kept[0]

    def output(
        self, hidden: Tensor | None, embeddings: Tensor, deepstack: Sequence[Tensor], kwargs: Any
    ) -> Any:
        """The output object of the original's own class, or a tuple where that is asked for."""
        family = sys.modules[type(self.original).__module__]
        fields: dict[str, Any] = {"last_hidden_state": hidden, "pooler_output": embeddings}
        kind = getattr(family, "BaseModelOutputWithDeepstackFeatures", None)
        if kind is None:
            kind = family.BaseModelOutputWithPooling
        else:
            fields["deepstack_features"] = list(deepstack)
        output = kind(**fields)
        return output.to_tuple() if kwargs.get("return_dict") is False else output

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if (moved.device, moved.dtype) != (self.device, self.dtype):
            raise ValueError(
                f"the visual tower is vitrt's, on {self.device} in {self.dtype}: restore(model) "
                f"before moving it to {moved.device} in {moved.dtype}"
            )
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise ValueError("the visual tower is vitrt's: restore(model) before saving the model")


class VitrtVisual(ReplacementVisual):
    """Pixels in, vitrt's features out."""

    def __init__(self, original: Any, engine: Engine, last_hidden_state: bool) -> None:
        super().__init__(original, engine.dtype, engine.device)
        self.engine = engine
        self.request = Request((engine.config.depth - 1,) if last_hidden_state else ())

    @outside_compiler
    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """pixel_values [T, P], grid_thw [images, 3] -> [M, O] and [M, O] a deepstack level."""
        batch = PixelValues(hidden_states, grid_thw)
        out = self.engine.run(batch, self.request)
        hidden = None
        if out.hidden:
            (hidden,) = out.hidden
            order = self.engine.tower.plan(batch.grids).patch_order
            if order is not None:  # transformers leaves these rows in window order
                hidden = hidden[torch.from_numpy(order).to(hidden.device)]
        levels = [] if out.deepstack is None else list(out.deepstack.unbind(0))
        return self.output(
            None if hidden is None else hidden.to(self.dtype), out.embeddings, levels, kwargs
        )


class FeatureVisual(ReplacementVisual):
    """Carried features in, the same features out."""

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """[T, O * (1 + L) / merge^2] as `feature_inputs` lays them out -> [M, O] each."""
        width = self.vision.out_hidden_size
        levels = len(self.vision.deepstack_visual_indexes)
        patches = int(grid_thw.prod(-1).sum())
        wanted = (patches, width * (1 + levels) // self.spatial_merge_unit)
        if tuple(hidden_states.shape) != wanted:
            raise ValueError(
                f"features of shape {tuple(hidden_states.shape)} do not fit grid_thw "
                f"{grid_thw.tolist()}: this model takes {wanted}, as made by feature_inputs from "
                f"{width} values and {levels} deepstack levels a token"
            )
        embeddings, *deepstack = hidden_states.reshape(-1, width * (1 + levels)).split(width, dim=1)
        return self.output(None, embeddings, deepstack, kwargs)
