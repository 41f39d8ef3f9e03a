"""What a transformers model that accepts features takes: placeholders, and features as pixels go.

Shapes: T patches, C width of a token's concatenated features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitrt.config import integer
from vitrt.features import ImageFeatures
from vitrt.models.config_file import family_of


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
    input_ids: Sequence[int] | Tensor,
    images: Sequence[ImageFeatures] = (),
    videos: Sequence[ImageFeatures] = (),
) -> dict[str, Tensor]:
    """A processor's part of the text: `input_ids`, `attention_mask`, `mm_token_type_ids`, [1, n].

    The last one only where the model takes it: Omni models do not.

    `input_ids` holds one image token for each image, which becomes as many as the image has merged
    tokens. For a video it holds one video token (Qwen2-VL, Qwen2.5-VL, both Omni), or one for each
    frame of its grid, with the timestamps between them (Qwen3-VL and later). `config` is the
    model's.

    Raises ValueError where placeholders and features differ in number, and for a batch of prompts.
    """
    given = token_ids(input_ids)
    family, _ = family_of(config.to_dict())
    by_frame = family.clip_tokens == "frames"
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
        if given.count(token) != len(wanted):
            raise ValueError(
                f"input_ids holds {given.count(token)} placeholders {token}; the features take "
                f"{len(wanted)}"
            )
    kinds = {token: kind for kind, token in enumerate(counts, start=1)}
    left = {token: iter(wanted) for token, wanted in counts.items()}
    ids: list[int] = []
    types: list[int] = []
    for token in given:
        repeats = next(left[token]) if token in left else 1
        ids += [token] * repeats
        types += [kinds.get(token, 0)] * repeats
    tokens = torch.tensor([ids], device="cpu")
    text = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if family.token_types:
        text["mm_token_type_ids"] = torch.tensor([types], device="cpu")
    return text


def token_ids(input_ids: Sequence[int] | Tensor) -> list[int]:
    """The ids of one prompt as plain integers; ValueError for several, or what are no integers."""
    try:
        # A tensor's elements are tensors, which equal an id and yet are not found by it.
        return [integer(token) for token in input_ids]
    except TypeError as error:
        raise ValueError(
            f"input_ids must be the token ids of one prompt, a flat list of integers: {error}"
        ) from error


def _carried(features: Sequence[ImageFeatures]) -> tuple[Tensor, Tensor]:
    """(features by patch [T, C / merge^2], grid_thw [images, 3])."""
    rows = torch.cat([image.concatenated() for image in features])
    unit = features[0].merge_size ** 2
    if rows.shape[1] % unit:
        raise ValueError(f"features of width {rows.shape[1]} do not split over {unit} patches")
    grids = [image.grid_thw for image in features]
    grid_thw = torch.tensor(grids, dtype=torch.int64, device=rows.device)
    return rows.reshape(-1, rows.shape[1] // unit), grid_thw
