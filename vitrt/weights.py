"""Open and check a checkpoint; fill a tower from it.

Only the vision tensors of only the shards that hold them are opened, and a layer reads only its
rank's part of a tensor.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch

from vitrt.checkpoint.shards import CheckpointError, StoredTensor, TensorInfo
from vitrt.checkpoint.tower_files import CONFIG, PREPROCESSOR, PROCESSOR, find_tensors, read_json
from vitrt.config import PreprocessorConfig, VisionConfig
from vitrt.layers.slots import WeightSlot

logger = logging.getLogger(__name__)

__all__ = ["Checkpoint", "CheckpointError", "check_complete", "load_weights", "open_checkpoint"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Tower(Protocol):
    """What can be filled: it names every tensor of the checkpoint's tower, once."""

    def weight_slots(self) -> Iterator[WeightSlot]: ...


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


def check_complete(slots: Iterable[WeightSlot], checkpoint: Checkpoint) -> dict[str, WeightSlot]:
    """The slots by name. CheckpointError lists every missing, left-over and misshapen tensor."""
    if not checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.name}: holds no weights ({checkpoint.folder})")
    by_name: dict[str, WeightSlot] = {}
    for slot in slots:
        assert slot.name not in by_name, f"two slots for {slot.name}"
        by_name[slot.name] = slot
    tensors = checkpoint.tensors
    misshapen = [
        f"{tensors[name].full_name} is {list(tensors[name].shape)} in {tensors[name].file.name}, "
        f"should be {list(slot.shape)}"
        for name, slot in by_name.items()
        if name in tensors and tensors[name].shape != slot.shape
    ]
    problems = {
        "missing": [name for name in by_name if name not in tensors],
        "left over": [info.full_name for name, info in tensors.items() if name not in by_name],
        "wrong shape": misshapen,
    }
    lines = [
        f"  {kind} ({len(names)}): {', '.join(names)}" for kind, names in problems.items() if names
    ]
    if lines:
        raise CheckpointError(
            f"{checkpoint.name}: its tensors are not those of its config\n" + "\n".join(lines)
        )
    return by_name


def load_weights(model: Tower, checkpoint: Checkpoint) -> None:
    """Fill every parameter of `model`, each exactly once, one file open at a time.

    Names and shapes are all checked before the first byte is read; see `check_complete`.
    """
    slots = check_complete(model.weight_slots(), checkpoint)
    in_order = sorted(
        slots.values(),
        key=lambda slot: (checkpoint.tensors[slot.name].file, checkpoint.tensors[slot.name].offset),
    )
    for file, group in groupby(in_order, key=lambda slot: checkpoint.tensors[slot.name].file):
        try:
            with file.open("rb", buffering=0) as stream, torch.no_grad():
                for slot in group:
                    slot.store(StoredTensor(stream, checkpoint.tensors[slot.name]))
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    size = checkpoint.num_bytes / 2**20
    logger.info("%s: %d tensors, %.0f MiB", checkpoint.name, len(slots), size)
