"""Images and clips -> uint8 pixels of the size that the tower takes, and their grid of patches.

Shapes: F frames, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import numpy as np
from PIL import UnidentifiedImageError

from vitrt.config import RuntimeConfig
from vitrt.images.animation import count_frames, frames_of
from vitrt.images.clips import clip_size
from vitrt.images.config import PreprocessorConfig, VideoConfig
from vitrt.images.cores import CORES
from vitrt.images.decode import check_array, decode, name_of, size_of
from vitrt.images.inputs import ImageError, ImageInput, PlainInput, plain_input
from vitrt.images.prepared import (
    MANY_FRAMES,
    MAX_HELD_BYTES,
    MAX_WHOLE_BYTES,
    Frames,
    LazyImage,
    Prepared,
    frame_size,
)
from vitrt.images.resize import RESIZE_NAMES, Resize, smart_resize
from vitrt.images.sampling import sample_frames
from vitrt.images.video import VideoFile, open_video


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """Decodes and resizes images. Holds no state, so threads may share one.

    Args:
        patch_size, merge_size, temporal_patch_size: of the tower.
        min_pixels, max_pixels: bounds of the resized area, in pixels.
        resize: "pillow" or "torch", bit-equal to transformers' PIL or torchvision backend.
        video: what the checkpoint says of clips, whose frames are then resized as its video
            processor does it, by torch; None: frames are resized as images.
        frame_min_pixels, frame_max_pixels: the user's bounds of a clip's frame, see `clip_size`.
        frames: of an animated GIF, WebP or PNG, the "first" frame as an image, "all" as a clip.

    Raises:
        ValueError: a size below 1, limits that cross or cannot hold one merged token, an unknown
            `resize`.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    resize: Resize = "pillow"
    video: VideoConfig | None = None
    frame_min_pixels: int | None = None
    frame_max_pixels: int | None = None
    frames: Literal["first", "all"] = "first"

    def __post_init__(self) -> None:
        for name in ("patch_size", "merge_size", "temporal_patch_size", "min_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_pixels < self.min_pixels:
            raise ValueError(
                f"max_pixels {self.max_pixels} is below min_pixels {self.min_pixels}: give both, "
                "where one of them is the checkpoint's"
            )
        if self.max_pixels < self.factor**2:
            raise ValueError(
                f"max_pixels is {self.max_pixels}; one merged token alone covers "
                f"{self.factor} x {self.factor} = {self.factor**2} pixels"
            )
        if self.resize not in RESIZE_NAMES:
            raise ValueError(f"resize is {self.resize!r}; it must be one of {RESIZE_NAMES}")

    @classmethod
    def from_configs(
        cls, preprocessor: PreprocessorConfig, runtime: RuntimeConfig
    ) -> ImageProcessor:
        """What the checkpoint says, under the pixel limits that the user chose, if any.

        `video_min_pixels` and `video_max_pixels` take the place of the video processor's limits;
        without them `min_pixels` and `max_pixels` bound a clip's frames as they bound images.
        """
        video = preprocessor.video
        if video is not None:
            video = replace(
                video,
                min_pixels=runtime.video_min_pixels or video.min_pixels,
                max_pixels=runtime.video_max_pixels or video.max_pixels,
                **runtime.sampling(),
            )
        return cls(
            patch_size=preprocessor.patch_size,
            merge_size=preprocessor.merge_size,
            temporal_patch_size=preprocessor.temporal_patch_size,
            min_pixels=runtime.min_pixels or preprocessor.min_pixels,
            max_pixels=runtime.max_pixels or preprocessor.max_pixels,
            resize=runtime.resize,
            video=video,
            frame_min_pixels=None if runtime.video_min_pixels else runtime.min_pixels,
            frame_max_pixels=None if runtime.video_max_pixels else runtime.max_pixels,
            frames=runtime.frames,
        )

    @property
    def factor(self) -> int:
        """Pixels a side of one merged token: every resized side is a multiple of it."""
        return self.patch_size * self.merge_size

    def resized(self, height: int, width: int, frames: int = 1) -> tuple[int, int]:
        """The (height, width) in pixels that an image, or a clip, of this size is resized to."""
        if frames > 1 and self.video is not None:
            return clip_size(
                self.video,
                frames,
                height,
                width,
                factor=self.factor,
                temporal_patch_size=self.temporal_patch_size,
                min_pixels=self.frame_min_pixels,
                max_pixels=self.frame_max_pixels,
            )
        return smart_resize(
            height,
            width,
            factor=self.factor,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )

    def grid(self, height: int, width: int, frames: int = 1) -> tuple[int, int, int]:
        """The grid (t, h, w) in patches of an image, or a clip, of height x width pixels."""
        height, width = self.resized(height, width, frames)
        rows = -(-frames // self.temporal_patch_size)
        return rows, height // self.patch_size, width // self.patch_size

    def grid_of(self, image: ImageInput) -> tuple[int, int, int]:
        """The grid that `prepare` will give an image or clip, from its header.

        Raises whatever an image that cannot be read makes its reader raise.
        """
        name = name_of(image)
        plain = plain_input(image, name)
        if isinstance(plain, np.ndarray):
            return self.grid(*size_of(plain), len(plain) if plain.ndim == 4 else 1)
        try:
            size = size_of(plain)
            return self.grid(*size, count_frames(plain) if self.frames == "all" else 1)
        except UnidentifiedImageError:
            if (video := open_video(plain, name)) is None:
                raise
        return self.grid(video.height, video.width, len(self._sampled(video)))

    def prepare(
        self,
        image: ImageInput,
        name: str | None = None,
        *,
        span: tuple[int, int] | None = None,
        shared: bool = False,
    ) -> Prepared:
        """Decode and resize an image, or a clip: an array [F, H, W, 3], a video file, an animation.

        A clip whose frames do not fill the last temporal patch has its last frame repeated; one of
        a single frame is an image. A video is sampled as its processor does it, and of a long one
        only the first frames are decoded before its pixels are asked for.

        Args:
            image: a path, a file: or data: URL, the bytes of a file, an open file, a PIL image,
                datasets' {"bytes", "path"}, a uint8 array, or a uint8 tensor whose layout its shape
                or `Pixels` says.
            name: what error messages call the image; None: its path, or a description of it.
            span: of a clip, only these frames of its grid, [start, stop): at the size that they
                have in the whole.
            shared: whether other ranks may take runs of a long video. Only the first frames of a
                file with many are then decoded now, however small they are.

        Raises:
            ImageError: the image cannot be read, decoded or resized.
        """
        arrival = CORES.arrive()  # before any other thread can come between
        name = name_of(image) if name is None else name
        source = self._source(plain_input(image, name), name, arrival)
        if isinstance(source, VideoFile):
            height, width = source.height, source.width
            indices = self._sampled(source)
        else:
            height, width = frame_size(source.frames[0])
            indices = list(range(len(source.frames)))
        try:
            grid = self.grid(height, width, len(indices))
        except ValueError as error:
            raise ImageError(f"{name}: {error}") from error
        whole = self._lazy(source, indices, grid)
        part = whole.rows(*span) if span is not None and len(indices) > 1 else whole
        if isinstance(source, VideoFile):
            source.wanted = part.indices
            many = shared and part.indices[-1] - part.indices[0] >= MANY_FRAMES
            if 3 * prod(part.shape) > (MAX_HELD_BYTES if many else MAX_WHOLE_BYTES):
                return part.begin()
        return part.decoded()

    def _source(self, plain: PlainInput, name: str, arrival: int) -> Frames | VideoFile:
        if isinstance(plain, np.ndarray):
            array = check_array(plain, name)
            return Frames(list(array) if array.ndim == 4 else [array])
        try:
            return frames_of(plain, name) if self.frames == "all" else Frames([decode(plain, name)])
        except ImageError as error:
            unknown = isinstance(error.__cause__, UnidentifiedImageError)
            video = open_video(plain, name, arrival) if unknown else None
            if video is None:
                raise
            return video

    def _sampled(self, video: VideoFile) -> list[int]:
        rule = self.video or VideoConfig("frame", 1, 1, (0, 0, 0), (1, 1, 1))
        try:
            return sample_frames(rule, len(video.times), video.rate, self.temporal_patch_size)
        except ValueError as error:
            raise ImageError(f"{video.name}: {error}") from error

    def _lazy(
        self, source: Frames | VideoFile, indices: list[int], grid: tuple[int, int, int]
    ) -> LazyImage:
        size = grid[1] * self.patch_size, grid[2] * self.patch_size
        if len(indices) == 1:
            return LazyImage(source, tuple(indices), grid, size, self.resize, None)
        step = self.temporal_patch_size
        filled = (*indices, *indices[-1:] * (grid[0] * step - len(indices)))
        times = None
        if source.times is not None:  # of a temporal patch, the middle of its frames
            seconds = [source.times[index] for index in filled]
            times = tuple(
                (seconds[first] + seconds[first + step - 1]) / 2
                for first in range(0, len(filled), step)
            )
        resize = self.resize if self.video is None else "torch"
        return LazyImage(source, filled, grid, size, resize, times)
