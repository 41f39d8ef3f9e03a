"""A checkpoint, opened: what its configs say, and where its vision tensors lie.

Only the shards that hold vision tensors are opened, and of those only the headers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitrt.checkpoint.shards import CheckpointError, TensorInfo
from vitrt.checkpoint.tower_files import CONFIG, PREPROCESSOR, PROCESSOR, find_tensors, read_json
from vitrt.config import PreprocessorConfig, VisionConfig

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: what it says, and where its vision tensors lie."""

    name: str  # as the user gave it
    folder: Path
    config: Mapping[str, Any]  # config.json
    preprocessor: Mapping[str, Any]  # preprocessor_config.json or its like in processor_config.json
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)  # by name in the tower

    def vision_config(self) -> VisionConfig:
        """Raises CheckpointError for a config without a tower of a supported family."""
        with _naming(f"{self.name}: {CONFIG}"):
            return VisionConfig.from_dict(self.config)

    def preprocessor_config(self) -> PreprocessorConfig:
        """Raises CheckpointError naming the setting that is missing or not supported."""
        with _naming(f"{self.name}: {PREPROCESSOR}"):
            return PreprocessorConfig.from_dict(self.preprocessor)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tower's tensors as stored."""
        return sum(info.nbytes for info in self.tensors.values())


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool | None = None,
    weights: bool = True,
) -> Checkpoint:
    """Open a folder or a hub id: its configs, and the headers of the shards with vision tensors.

    A folder without weights opens with no tensors, which is enough to describe a tower.
    `weights=False` does not look for them, nor download them. The other options are the hub's own.

    Raises CheckpointError naming the file and what is wrong with it.
    """
    name = os.fspath(model)
    folder = Path(name).expanduser()
    if folder.is_dir():
        files = [file for file in (PREPROCESSOR, PROCESSOR) if (folder / file).is_file()]
        checkpoint = describe(name, folder, files)
        return _with_tensors(checkpoint, find_tensors(folder)) if weights else checkpoint
    if folder.exists():
        raise CheckpointError(f"{name}: is a file; a checkpoint is the folder that holds {CONFIG}")
    if not isinstance(model, str) or not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such folder, and no hub id (owner/name) either")

    # Not at the top: huggingface_hub takes long to import, and a folder does not need it.
    from vitrt.checkpoint.hub import HubSource

    hub = HubSource(name, revision, cache_dir, token, bool(local_files_only))
    folder = hub.fetch(CONFIG).parent
    found = next((file for file in (PREPROCESSOR, PROCESSOR) if hub.fetch_optional(file)), None)
    checkpoint = describe(name, folder, [found] if found else [])
    return _with_tensors(checkpoint, hub.fetch_tensors()) if weights else checkpoint


def describe(name: str, folder: Path, processors: Iterable[str]) -> Checkpoint:
    """A checkpoint without tensors, both configs checked: their errors come before a download."""
    config = read_json(folder / CONFIG)
    for file in processors:
        data = read_json(folder / file)
        preprocessor = data.get("image_processor") if file == PROCESSOR else data
        if isinstance(preprocessor, Mapping):
            break
    else:
        raise CheckpointError(
            f"{name}: holds no {PREPROCESSOR}, nor a {PROCESSOR} with an image_processor; the "
            f"pixel limits in it have no defaults (looked in {folder})"
        )
    checkpoint = Checkpoint(name, folder, config, preprocessor)
    vision, images = checkpoint.vision_config(), checkpoint.preprocessor_config()
    for ours, theirs in (
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("spatial_merge_size", "merge_size"),
    ):
        if getattr(vision, ours) != getattr(images, theirs):
            raise CheckpointError(
                f"{name}: {CONFIG} says {ours} {getattr(vision, ours)}, {PREPROCESSOR} says "
                f"{theirs} {getattr(images, theirs)}"
            )
    return checkpoint


def _with_tensors(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> Checkpoint:
    return Checkpoint(
        checkpoint.name, checkpoint.folder, checkpoint.config, checkpoint.preprocessor, tensors
    )


@contextmanager
def _naming(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
