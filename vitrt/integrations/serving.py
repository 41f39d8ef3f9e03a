"""What serving engines take in place of images: features computed here, earlier or elsewhere.

Shapes: M merged tokens of all images, O output width, L deepstack levels, N images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitrt.features import ImageFeatures
from vitrt.integrations.feature_inputs import token_ids
from vitrt.messages import counted

__all__ = ["for_sglang", "for_vllm"]


def for_vllm(
    images: Sequence[ImageFeatures] = (),
    videos: Sequence[ImageFeatures] = (),
    *,
    timestamps: Sequence[Sequence[float]] | None = None,
    second_per_grid_ts: Sequence[float] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """`multi_modal_data` of a vLLM prompt that holds one placeholder for each image and video.

    The engine must be started with `enable_mm_embeds=True`. This is the form with a grid: the plain
    tensor that vLLM also takes has room for the language model's width only, and so refuses
    deepstack.

    Args:
        images, videos: in prompt order.
        timestamps: with videos, Qwen3-VL: the seconds of every frame of each grid, from which vLLM
            sizes the placeholder. It keeps them as one tensor, so the videos of one prompt must be
            equally long.
        second_per_grid_ts: with videos, Qwen2.5-VL: the seconds between two frames of each grid.
            Qwen2-VL counts no time and reads none: anything will do.

    Returns `{"image": {"image_embeds": [M, O * (1 + L)], "image_grid_thw": int64 [N, 3]}}` and the
    like for videos, on the CPU. Raises ValueError for features that do not belong together.
    """
    data: dict[str, dict[str, Tensor]] = {}
    if images:
        rows, grids = _joined(images)
        data["image"] = {"image_embeds": rows, "image_grid_thw": grids}
    if videos:
        rows, grids = _joined(videos)
        data["video"] = {"video_embeds": rows, "video_grid_thw": grids}
        data["video"] |= _times(videos, timestamps, second_per_grid_ts)
    elif timestamps is not None or second_per_grid_ts is not None:
        raise ValueError("timestamps and second_per_grid_ts describe videos, and there are none")
    return data


def for_sglang(
    images: Sequence[ImageFeatures], *, input_ids: Sequence[int] | Tensor | None = None
) -> dict[str, Any]:
    """The one entry of `image_data` that stands for all images of an SGLang request.

    Images of one request go in together: SGLang splits the rows by their grids. Give `input_ids`
    with every placeholder repeated as often as its image has merged tokens (see
    `vitrt.integrations.transformers.placeholder_inputs`), here or to the engine.

    Returns `format`, `precomputed_embeddings` [M, O * (1 + L)] and `image_grid_thw` int64 [N, 3],
    on the CPU. Raises ValueError for no images, or features that do not belong together.
    """
    if not images:
        raise ValueError("no images: a request without any needs no image_data")
    rows, grids = _joined(images)
    entry: dict[str, Any] = {
        "format": "processor_output",
        "precomputed_embeddings": rows,
        "image_grid_thw": grids,
    }
    if input_ids is not None:
        entry["input_ids"] = torch.tensor(token_ids(input_ids), device="cpu")
    return entry


def _joined(features: Sequence[ImageFeatures]) -> tuple[Tensor, Tensor]:
    """([M, O * (1 + L)], int64 [N, 3]) on the CPU."""
    kinds = {
        (image.embeddings.shape[1], 0 if image.deepstack is None else len(image.deepstack))
        for image in features
    }
    if len(kinds) > 1:
        described = ", ".join(
            f"{width} wide with {levels} levels" for width, levels in sorted(kinds)
        )
        raise ValueError(f"features of different models do not go into one request: {described}")
    for image in features:
        t, h, w = image.grid_thw
        tokens = t * h * w // image.merge_size**2
        if len(image.embeddings) != tokens:
            raise ValueError(
                f"features of grid {image.grid_thw} have {len(image.embeddings)} tokens, "
                f"not {tokens}"
            )
    rows = torch.cat([image.concatenated().cpu() for image in features])
    return rows, torch.tensor(
        [image.grid_thw for image in features], dtype=torch.int64, device="cpu"
    )


def _times(
    videos: Sequence[ImageFeatures],
    timestamps: Sequence[Sequence[float]] | None,
    second_per_grid_ts: Sequence[float] | None,
) -> Mapping[str, Tensor]:
    frames = [video.grid_thw[0] for video in videos]
    if timestamps is not None and second_per_grid_ts is None:
        if [len(times) for times in timestamps] != frames:
            raise ValueError(
                f"timestamps of {[len(times) for times in timestamps]} frames; the grids of the "
                f"videos have {frames}"
            )
        if len(set(frames)) > 1:
            raise ValueError(f"videos of {frames} frames: those of one prompt must be equally long")
        rows = [list(times) for times in timestamps]
        return {"timestamps": torch.tensor(rows, device="cpu")}
    if second_per_grid_ts is not None and timestamps is None:
        if len(second_per_grid_ts) != len(videos):
            raise ValueError(
                f"second_per_grid_ts has {counted(len(second_per_grid_ts), 'value')} for "
                f"{counted(len(videos), 'video')}"
            )
        return {"second_per_grid_ts": torch.tensor(list(second_per_grid_ts), device="cpu")}
    raise ValueError("videos need either timestamps (Qwen3-VL) or second_per_grid_ts (Qwen2.5-VL)")
