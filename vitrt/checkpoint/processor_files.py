"""What a checkpoint's files say of its image and video processors, read in transformers' order.

First the nested part of processor_config.json, then the processor's own file, and for clips at last
the image processor's own file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from vitrt.checkpoint.shards import CheckpointError
from vitrt.config import VideoRule
from vitrt.images.config import PreprocessorConfig, VideoConfig, video_rule

logger = logging.getLogger(__name__)

PREPROCESSOR = "preprocessor_config.json"
VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
PROCESSOR = "processor_config.json"  # newer transformers nest both processors in it
PROCESSOR_FILES = (PROCESSOR, PREPROCESSOR, VIDEO_PREPROCESSOR)

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ProcessorSettings:
    """The settings of both processors, and the file that each comes from."""

    image: Settings
    image_file: str
    video: Settings
    video_file: str
    family_rule: VideoRule

    def with_limits(self, limits: Mapping[str, int | None]) -> ProcessorSettings:
        """These settings, with the user's pixel limits of images where the file has none."""
        if self.image.get("size"):
            return self
        stated = {key: value for key, value in self.image.items() if value is not None}
        return replace(self, image={**limits, **stated})

    def preprocessor_config(self) -> PreprocessorConfig:
        """Raises CheckpointError naming the file and the setting that is missing or unsupported."""
        try:
            PreprocessorConfig.from_dict(self.image)
        except ValueError as error:
            raise CheckpointError(f"{self.image_file}: {error}") from error
        try:
            return PreprocessorConfig.from_dict(self.image, self.video, self.family_rule)
        except ValueError as error:
            raise CheckpointError(f"{self.video_file}: of clips, {error}") from error


def read_processors(
    name: str, files: Mapping[str, Settings], family_rule: VideoRule
) -> ProcessorSettings:
    """The settings in those of PROCESSOR_FILES that the checkpoint `name` holds.

    What two files say differently is logged as a warning. Raises CheckpointError where no file
    holds an image processor.
    """
    nested = files.get(PROCESSOR, {})
    image_file, image = _first(files, nested.get("image_processor"), PREPROCESSOR)
    if image is None:
        raise CheckpointError(
            f"{name}: holds no {PREPROCESSOR}, nor a {PROCESSOR} with an image_processor; the "
            "pixel limits in it have no defaults"
        )
    video_file, video = _first(
        files, nested.get("video_processor"), VIDEO_PREPROCESSOR, PREPROCESSOR
    )
    settings = ProcessorSettings(image, image_file, video or {}, video_file, family_rule)
    if image_file == PROCESSOR and PREPROCESSOR in files:
        _warn_if_different(
            name, PREPROCESSOR, image, files[PREPROCESSOR], PreprocessorConfig.from_dict
        )
    if video_file == PROCESSOR and VIDEO_PREPROCESSOR in files:
        _warn_if_different(
            name,
            VIDEO_PREPROCESSOR,
            settings.video,
            files[VIDEO_PREPROCESSOR],
            lambda values: VideoConfig.from_dict(values, family_rule),
        )
    named = video_rule(settings.video) or family_rule
    if named != family_rule:
        logger.warning(
            "%s: %s names a processor whose limits bound a %s, its model family's bound a %s; "
            "the first is followed, as transformers does",
            name,
            video_file,
            named,
            family_rule,
        )
    return settings


def _first(files: Mapping[str, Settings], nested: object, *own: str) -> tuple[str, Settings | None]:
    """The file that counts, and its settings."""
    if isinstance(nested, Mapping):
        return PROCESSOR, nested
    for file in own:
        if file in files:
            return file, files[file]
    return PROCESSOR, None


def _warn_if_different(
    name: str,
    file: str,
    taken: Settings,
    other: Settings,
    read: Callable[[Settings], PreprocessorConfig | VideoConfig],
) -> None:
    try:
        ours, theirs = asdict(read(taken)), asdict(read(other))
    except ValueError:  # the settings taken are checked later, the others do no harm
        return
    differing = [key for key in ours if ours[key] != theirs[key]]
    if differing:
        logger.warning(
            "%s: %s and %s differ; the first is taken, as transformers does: %s",
            name,
            PROCESSOR,
            file,
            "; ".join(f"{key} {ours[key]} against {theirs[key]}" for key in differing),
        )
