"""vitrt inside transformers: a drop-in for the visual tower, and features in place of pixels.

    accelerate(model)                        # pixels through vitrt, on the model's own weights
    model.generate(**processor(...))
    restore(model)

    accept_features(model)                   # no tower at all: features computed earlier
    inputs = placeholder_inputs(model.config, input_ids, images=[features, ...])
    model.generate(**inputs, **feature_inputs(images=[features, ...]))
    restore(model)

Both put a stand-in where the model has its `visual`. For inference only: neither trains nor saves
a tower.

Shapes: T patches, M merged tokens, P values of one patch, O output width, L deepstack levels.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrt.config import QWEN2_5_VL, PreprocessorConfig, RuntimeConfig, VisionConfig
from vitrt.encoder import VisionEncoder
from vitrt.features import ImageFeatures
from vitrt.integrations.sharing import SharedWeights, share_weights

__all__ = ["accelerate", "accept_features", "feature_inputs", "placeholder_inputs", "restore"]

logger = logging.getLogger(__name__)


def accelerate(
    model: nn.Module,
    *,
    attention: str = "auto",
    cuda_graphs: Literal["auto"] | bool = "auto",
    last_hidden_state: bool = True,
) -> SharedWeights:
    """Replace the visual tower of a loaded Qwen2.5-VL or Qwen3-VL model by vitrt, on its weights.

    The model's `visual` gives the same outputs: pooler_output, deepstack_features and
    last_hidden_state. `hidden_states` and `attentions` of the tower are never recorded.

    Args:
        model: loaded, on its device, in its dtype; or a module that holds such a model.
        attention, cuda_graphs: as in `VisionEncoder.from_pretrained`.
        last_hidden_state: `generate` never reads it, and CUDA graphs do not keep it: False gives
            None in its place and lets them run.

    Returns which tensors are shared with the model and which had to be laid out anew. The model
    keeps its own tower for `restore`.

    Raises ValueError for a model without such a tower, spread over devices, quantised, or already
    changed.
    """
    owner = _owner(model)
    original = owner.visual
    loaded = dict(original.named_parameters())
    device, dtype = _placement(loaded)
    config = VisionConfig.from_dict(owner.config.to_dict())
    tower, weights = share_weights(config, loaded)
    runtime = RuntimeConfig(
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        attention=attention,
        cuda_graphs=cuda_graphs,
    )
    encoder = VisionEncoder(tower, _no_images(config), runtime, device=device, dtype=dtype)
    owner.visual = _VitrtTower(original, dtype, device, encoder, last_hidden_state)
    logger.info(
        "%d tensors shared, %d laid out anew in %.1f MiB: %s",
        len(weights.shared),
        len(weights.copied),
        weights.added_bytes / 2**20,
        ", ".join(weights.copied) or "none",
    )
    return weights


def accept_features(model: nn.Module) -> None:
    """Make `model` take `feature_inputs` instead of pixels, until `restore`.

    Raises ValueError for a model without a visual tower, or already changed.
    """
    owner = _owner(model)
    device, dtype = _placement(dict(owner.visual.named_parameters()))
    owner.visual = _FeatureTower(owner.visual, dtype, device)


def feature_inputs(
    images: Sequence[ImageFeatures] = (), videos: Sequence[ImageFeatures] = ()
) -> dict[str, Tensor]:
    """What a model that accepts features takes beside `input_ids`, in prompt order.

    The keys are those of the processor's own output, so `generate` repeats and splits them as it
    does pixels: `pixel_values` carries `ImageFeatures.concatenated()`, a patch's share in each row.
    """
    inputs: dict[str, Tensor] = {}
    if images:
        inputs["pixel_values"], inputs["image_grid_thw"] = _carried(images)
    if videos:
        inputs["pixel_values_videos"], inputs["video_grid_thw"] = _carried(videos)
    return inputs


def placeholder_inputs(
    config: Any,
    input_ids: Sequence[int],
    images: Sequence[ImageFeatures] = (),
    videos: Sequence[ImageFeatures] = (),
) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `mm_token_type_ids` [1, n]: a processor's part of the text.

    `input_ids` holds one image token for each image, which becomes as many as the image has merged
    tokens. For a video it holds one video token (Qwen2.5-VL), or one for each frame of its grid,
    with the timestamps between them (Qwen3-VL). `config` is the model's.

    Raises ValueError where placeholders and features differ in number.
    """
    by_frame = config.model_type != QWEN2_5_VL  # there a clip is one run of tokens
    counts = {
        int(config.image_token_id): [len(image.embeddings) for image in images],
        int(config.video_token_id): [
            count
            for video in videos
            for count in (
                [len(video.embeddings) // video.grid_thw[0]] * video.grid_thw[0]
                if by_frame
                else [len(video.embeddings)]
            )
        ],
    }
    for token, wanted in counts.items():
        if list(input_ids).count(token) != len(wanted):
            raise ValueError(
                f"input_ids holds {list(input_ids).count(token)} placeholders {token}; the "
                f"features take {len(wanted)}"
            )
    kinds = {token: kind for kind, token in enumerate(counts, start=1)}
    left = {token: iter(wanted) for token, wanted in counts.items()}
    ids: list[int] = []
    types: list[int] = []
    for token in input_ids:
        repeats = next(left[token]) if token in left else 1
        ids += [token] * repeats
        types += [kinds.get(token, 0)] * repeats
    tokens = torch.tensor([ids])
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": torch.tensor([types]),
    }


def restore(model: nn.Module) -> None:
    """Give `model` its own visual tower back. ValueError if it has it."""
    for owner in _owners(model):
        if isinstance(owner.visual, _StandIn):
            owner.visual = owner.visual.original
            return
    raise ValueError(f"{type(model).__name__} has its own visual tower: nothing to restore")


# Where the tower is


def _owners(model: nn.Module) -> list[Any]:
    """The modules that have a visual tower as a child of their own: one, in a loaded model."""
    return [module for module in model.modules() if "visual" in dict(module.named_children())]


def _owner(model: nn.Module) -> Any:
    owners = [owner for owner in _owners(model) if hasattr(owner.visual, "config")]
    if not owners:
        raise ValueError(
            f"{type(model).__name__} has no visual tower; it must be a Qwen2.5-VL or Qwen3-VL model"
        )
    if isinstance(owners[0].visual, _StandIn):
        raise ValueError(f"{type(model).__name__} was changed already: restore(model) first")
    return owners[0]


def _placement(parameters: dict[str, Tensor]) -> tuple[torch.device, torch.dtype]:
    devices = sorted({str(tensor.device) for tensor in parameters.values()})
    dtypes = sorted({str(tensor.dtype) for tensor in parameters.values()})
    floating = all(tensor.is_floating_point() for tensor in parameters.values())
    if len(devices) != 1 or len(dtypes) != 1 or devices == ["meta"] or not floating:
        raise ValueError(
            f"the visual tower is on {', '.join(devices)} in {', '.join(dtypes)}; it must be "
            "loaded on one device in one floating-point dtype"
        )
    first = next(iter(parameters.values()))
    return first.device, first.dtype


def _no_images(config: VisionConfig) -> PreprocessorConfig:
    """A preprocessor for an encoder that is only ever given patches: its values are never used."""
    factor = config.patch_size * config.spatial_merge_size
    return PreprocessorConfig(
        min_pixels=factor**2,
        max_pixels=factor**2,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        merge_size=config.spatial_merge_size,
    )


# What takes its place


class _StandIn(nn.Module):
    """In the place of a model's `visual`, whose module it keeps aside, unregistered."""

    def __init__(self, original: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._kept = (original,)  # in a tuple, so that it is no submodule
        self.config = original.config
        self.spatial_merge_size: int = original.spatial_merge_size
        self.spatial_merge_unit: int = original.spatial_merge_unit
        self.patch_size: int = original.patch_size
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


class _VitrtTower(_StandIn):
    """Pixels in, vitrt's features out."""

    def __init__(
        self,
        original: Any,
        dtype: torch.dtype,
        device: torch.device,
        encoder: VisionEncoder,
        last_hidden_state: bool,
    ) -> None:
        super().__init__(original, dtype, device)
        self.encoder = encoder
        self.return_hidden = last_hidden_state

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """pixel_values [T, P], grid_thw [images, 3] -> [M, O] and [M, O] a deepstack level."""
        rows = grid_thw.tolist()
        out = self.encoder(hidden_states, rows, return_hidden=self.return_hidden)
        hidden = out.hidden
        if hidden is not None:
            order = self.encoder.tower.plan(rows).patch_order
            if order is not None:  # transformers leaves these rows in window order
                hidden = hidden[torch.from_numpy(order).to(hidden.device)]
        levels = [] if out.deepstack is None else list(out.deepstack.unbind(0))
        return self.output(
            None if hidden is None else hidden.to(self.dtype), out.embeddings, levels, kwargs
        )


class _FeatureTower(_StandIn):
    """Carried features in, the same features out."""

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """[T, O * (1 + L) / merge^2] as `feature_inputs` lays them out -> [M, O] each."""
        width = self.config.out_hidden_size
        levels = len(getattr(self.config, "deepstack_visual_indexes", ()))
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


def _carried(features: Sequence[ImageFeatures]) -> tuple[Tensor, Tensor]:
    """(features by patch [T, C / merge^2], grid_thw [images, 3])."""
    rows = torch.cat([image.concatenated() for image in features])
    unit = features[0].merge_size ** 2
    if rows.shape[1] % unit:
        raise ValueError(f"features of width {rows.shape[1]} do not split over {unit} patches")
    grids = torch.tensor([image.grid_thw for image in features], dtype=torch.int64)
    return rows.reshape(-1, rows.shape[1] // unit), grids.to(rows.device)
