"""A checkpoint, opened: what its configs say, and where its vision tensors lie.

Only the shards that hold vision tensors are opened, and of those only the headers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vitrt.checkpoint import scaled
from vitrt.checkpoint.adapter import ADAPTER_WEIGHTS, Adapter, read_adapter
from vitrt.checkpoint.processor_files import PROCESSOR_FILES, ProcessorSettings, read_processors
from vitrt.checkpoint.shards import CheckpointError, LazyTensor, TensorInfo
from vitrt.checkpoint.tower_files import ADAPTER_CONFIG, CONFIG, TowerSearch, read_json, taken_for
from vitrt.config import VisionConfig
from vitrt.images.config import PreprocessorConfig
from vitrt.messages import listed, reason_of, shorten
from vitrt.models.config_file import family_of, read_vision_config
from vitrt.models.families import build_tower

# cache_dir, token, local_files_only
_HubOptions = tuple[str | os.PathLike[str] | None, str | bool | None, bool]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: what it says, and where its vision tensors lie."""

    name: str  # as the user gave it
    folder: Path
    config: Mapping[str, Any]  # config.json
    processors: ProcessorSettings
    # What is stored of the tower, by name in it: parameters, and scales of those in fp8.
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    adapter: Adapter | None = None

    def vision_config(self) -> VisionConfig:
        """Raises CheckpointError for a config without a tower of a supported family."""
        with _naming(f"{self.name}: {CONFIG}"):
            return read_vision_config(self.config)

    @property
    def preprocessor(self) -> Mapping[str, Any]:
        """The settings of the image processor, as its file has them."""
        return self.processors.image

    def preprocessor_config(self) -> PreprocessorConfig:
        """Raises CheckpointError naming the setting that is missing or not supported."""
        with _naming(self.name):
            return self.processors.preprocessor_config()

    @property
    def quantization(self) -> Mapping[str, Any]:
        """What the config says of quantised weights, in the language model mostly."""
        text = self.config.get("text_config")
        places = [self.config, text if isinstance(text, Mapping) else {}]
        keys = ("quantization_config", "compression_config")
        found = [place[key] for place in places for key in keys if key in place]
        return found[0] if found and isinstance(found[0], Mapping) else {}

    def model_dtype(self) -> torch.dtype:
        """The dtype that the config gives the model; bfloat16 where it gives none."""
        named = self.config.get("dtype", self.config.get("torch_dtype"))
        dtype = getattr(torch, str(named).removeprefix("torch."), None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
        return torch.bfloat16

    def tower_search(self) -> TowerSearch:
        """What finds the tower among the checkpoint's tensors."""
        return TowerSearch(self.name, tower_shapes(self.vision_config()), self.quantization)

    def tower_tensors(self) -> Iterator[tuple[str, LazyTensor]]:
        """The tower's parameters by name, each read as it is indexed, in the order of the files.

        Weights in fp8 come dequantised and those that an adapter changes merged, in float32.

        Raises CheckpointError, before the first one, that lists every one that is missing, left
        over or of another shape.
        """
        stored = scaled.parameters(self.tensors, self.quantization)
        parameters = dict(self.adapter.merge(stored) if self.adapter else stored)
        self._check_complete(parameters)
        # Popped, so that each is freed once it was used: with an adapter, all sums together are as
        # large as the tower.
        return ((name, parameters.pop(name)) for name in list(parameters))

    def _check_complete(self, found: Mapping[str, LazyTensor]) -> None:
        if not self.tensors:
            raise CheckpointError(f"{self.name}: holds no weights ({self.folder})")
        shapes = tower_shapes(self.vision_config())
        problems = {
            "missing": [name for name in shapes if name not in found],
            "left over": [found[name].info.full_name for name in found if name not in shapes],
            "wrong shape": [
                f"{found[name].info.full_name} is {list(found[name].shape)} in "
                f"{found[name].info.file.name}, should be {list(shape)}"
                for name, shape in shapes.items()
                if name in found and found[name].shape != shape
            ],
        }
        if lines := listed(problems):
            raise CheckpointError(f"{self.name}: its tensors are not those of its config{lines}")

    @property
    def num_bytes(self) -> int:
        """Bytes of the tower's tensors as stored."""
        return sum(info.nbytes for info in self.tensors.values())


@cache
def tower_shapes(config: VisionConfig) -> Mapping[str, tuple[int, ...]]:
    """The shape of every tensor that a checkpoint of such a tower holds, by name in the tower."""
    with torch.device("meta"):
        tower = build_tower(config)
    return {target.name: target.shape for target in tower.weight_targets()}


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool | None = None,
    weights: bool = True,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Checkpoint:
    """Open a folder or a hub id: its configs, and the headers of the shards with vision tensors.

    A folder without weights opens with no tensors, which is enough to describe a tower.
    `weights=False` does not look for them, nor download them. `min_pixels` and `max_pixels` stand
    in for limits of images that the files leave out. `adapter` is a PEFT LoRA over the model, a
    folder or a hub id too; see `adapter.py`. The other options are the hub's own.

    Raises CheckpointError naming the file and what is wrong with it.
    """
    options = (cache_dir, token, bool(local_files_only))
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    checkpoint = _open(model, revision, options, limits, weights=weights)
    if adapter is None:
        return checkpoint
    folder, name = named_folder(adapter), os.fspath(adapter)
    if not (folder / ADAPTER_CONFIG).is_file():
        if folder.exists() or not _HUB_ID.fullmatch(name):
            raise CheckpointError(
                f"{shorten(name)}: an adapter is the folder, or the hub id, that holds "
                f"{ADAPTER_CONFIG}"
            )
        from vitrt.checkpoint.hub import HubRepository

        hub = HubRepository(name, None, *options)
        folder = hub.fetch(ADAPTER_CONFIG).parent
        hub.fetch(ADAPTER_WEIGHTS)
    shapes = tower_shapes(checkpoint.vision_config())
    return replace(checkpoint, adapter=read_adapter(name, folder, shapes))


def _open(
    model: str | os.PathLike[str],
    revision: str | None,
    options: _HubOptions,
    limits: Mapping[str, int | None],
    *,
    weights: bool,
) -> Checkpoint:
    folder, name = named_folder(model), os.fspath(model)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"{name}: holds no {CONFIG}{taken_for(folder)}")
        files = {file: folder / file for file in PROCESSOR_FILES if (folder / file).is_file()}
        checkpoint = _without_tensors(name, folder, files, limits)
        if not weights:
            return checkpoint
        return replace(checkpoint, tensors=checkpoint.tower_search().in_folder(folder))
    if folder.exists():
        raise CheckpointError(f"{name}: is a file; a checkpoint is the folder that holds {CONFIG}")
    if not isinstance(model, str) or not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{shorten(name)}: no such folder, and no hub id (owner/name) either")

    # Not at the top: huggingface_hub takes long to import, and a folder does not need it.
    from vitrt.checkpoint.hub import HubRepository

    hub = HubRepository(name, revision, *options)
    config = hub.fetch_optional(CONFIG)
    if config is None and (adapter := hub.fetch_optional(ADAPTER_CONFIG)):
        raise CheckpointError(f"{name}: holds no {CONFIG}{taken_for(adapter.parent)}")
    folder = (config or hub.fetch(CONFIG)).parent
    files = {file: path for file in PROCESSOR_FILES if (path := hub.fetch_optional(file))}
    checkpoint = _without_tensors(name, folder, files, limits)
    if not weights:
        return checkpoint
    return replace(checkpoint, tensors=hub.fetch_tensors(checkpoint.tower_search()))


def named_folder(name: str | os.PathLike[str]) -> Path:
    """The folder that a checkpoint's or an adapter's name would be, whether or not it is there.

    CheckpointError for what is no name, or none that the system takes.
    """
    if not isinstance(name, str | os.PathLike) or name == "":
        raise CheckpointError(f"{name!r}: expected a folder, or a hub id (owner/name)")
    folder = Path(name).expanduser()
    try:
        folder.exists()
    except OSError as error:
        shown = shorten(os.fspath(name))
        raise CheckpointError(f"{shown}: no folder, and no hub id: {reason_of(error)}") from error
    return folder


def _without_tensors(
    name: str, folder: Path, files: Mapping[str, Path], limits: Mapping[str, int | None]
) -> Checkpoint:
    """A checkpoint without tensors, all configs checked: their errors come before a download.

    `files` are those of PROCESSOR_FILES that it has; `limits` stand in for absent pixel limits.
    """
    config = read_json(folder / CONFIG)
    with _naming(f"{name}: {CONFIG}"):
        family, _ = family_of(config)
    data = {file: read_json(path) for file, path in files.items()}
    processors = read_processors(name, data, family.video_rule)
    checkpoint = Checkpoint(name, folder, config, processors.with_limits(limits))
    vision, images = checkpoint.vision_config(), checkpoint.preprocessor_config()
    for ours, theirs in (
        ("patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size"),
        ("spatial_merge_size", "merge_size"),
    ):
        if getattr(vision, ours) != getattr(images, theirs):
            raise CheckpointError(
                f"{name}: {CONFIG} says {ours} {getattr(vision, ours)}, "
                f"{processors.image_file} says {theirs} {getattr(images, theirs)}"
            )
        stated = processors.video.get(theirs)
        if stated not in (None, getattr(vision, ours)):
            raise CheckpointError(
                f"{name}: {CONFIG} says {ours} {getattr(vision, ours)}, of clips "
                f"{processors.video_file} says {theirs} {stated}"
            )
    return checkpoint


@contextmanager
def _naming(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
