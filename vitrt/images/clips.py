"""The size that the frames of a clip are brought to: each family's own rule.

The limits are those of the checkpoint's video processor. Qwen2-VL and Qwen2.5-VL bound the area of
each frame; Qwen3-VL and newer bound frames x height x width of the whole clip, so that a long clip
has small frames.
"""

from __future__ import annotations

from vitrt.images.config import VideoConfig
from vitrt.images.resize import smart_resize


def clip_size(
    video: VideoConfig,
    frames: int,
    height: int,
    width: int,
    *,
    factor: int,
    temporal_patch_size: int,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> tuple[int, int]:
    """The (height, width) that `frames` frames of this size are resized to.

    As transformers' Qwen2-VL and Qwen3-VL video processors choose it, where the last two are None.

    Args:
        frames: of the clip, before the last one is repeated to fill a patch.
        factor: pixels a side of one merged token, of which both sides become multiples.
        min_pixels, max_pixels: the user's bounds of a frame. They replace the checkpoint's where
            those are a frame's, and hold beside those of a whole clip.

    Raises:
        ValueError: a side is zero, or one side is over 200 times as long as the other.
    """
    if video.rule == "frame":
        low, high = min_pixels or video.min_pixels, max_pixels or video.max_pixels
        if video.cap_pixels_per_frame:
            budget = int(video.max_video_tokens * factor * factor * 0.9)
            high = max(min(high, budget * temporal_patch_size // frames), int(low * 1.05))
        return smart_resize(
            height, width, factor=factor, min_pixels=min(low, high), max_pixels=high
        )
    low, high = video.min_pixels, video.max_pixels
    if video.cap_pixels_per_frame:
        share = min(video.max_video_tokens * factor * factor, high // frames)
        high = frames * max(share, int(low * 1.05))
    if max_pixels is not None:
        high = min(high, frames * max_pixels)
    low = min(max(low, frames * (min_pixels or 0)), high)
    if 0 < min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    return smart_resize(
        height,
        width,
        factor=factor,
        min_pixels=low,
        max_pixels=high,
        frames=frames,
        padded_frames=round(frames / temporal_patch_size) * temporal_patch_size,
    )
