"""Which frames of a video are looked at, as transformers' video processors choose them."""

from __future__ import annotations

import logging
import math

import numpy as np

from vitrt.images.config import VideoConfig

logger = logging.getLogger(__name__)

_UNKNOWN_RATE = 24.0  # frames a second of a video that does not say: transformers' guess


def sample_frames(
    video: VideoConfig, total: int, rate: float | None, temporal_patch_size: int
) -> list[int]:
    """The frames that stand for a video of `total` frames, in order; one may come twice.

    `rate` is the video's, in frames a second; None where it is not known. As Qwen2-VL's processor
    does it where the limits bound a frame, as Qwen3-VL's where they bound the clip. A video of one
    frame is an image.

    Raises:
        ValueError: more frames are asked for than there are, where Qwen2-VL's processor refuses.
    """
    if total == 1:
        return [0]
    if video.fps is not None and rate is None:
        logger.warning("a video does not say its frame rate; taking %g a second", _UNKNOWN_RATE)
    seconds = total / (rate or _UNKNOWN_RATE)
    if video.rule == "clip":
        if video.num_frames is not None:
            count = video.num_frames
        else:
            wanted = total if video.fps is None else int(seconds * video.fps)
            count = min(max(wanted, video.min_frames), video.max_frames, total)
        return [int(index) for index in np.linspace(0, total - 1, count).round()]
    step = temporal_patch_size
    if video.num_frames is not None:
        count = round(video.num_frames / step) * step
        if not 0 < count <= total:
            raise ValueError(
                f"num_frames {video.num_frames}, rounded to {count}, of a video of {total} frames"
            )
    else:
        most = min(video.max_frames, total) // step * step
        looked_at = total if video.fps is None else seconds * video.fps
        count = math.floor(min(max(looked_at, video.min_frames), most) / step) * step
    import torch  # its arange rounds as the reference does, and may give one too many at the end

    return torch.arange(0, total, total / count).int().tolist()[:count]
