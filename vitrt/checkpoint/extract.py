"""A vision-only checkpoint: the tower's tensors in one file, beside its two configs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitrt.checkpoint.opened import Checkpoint
from vitrt.checkpoint.shards import (
    CheckpointError,
    TensorInfo,
    aligned_order,
    build_header,
    copy_bytes,
)
from vitrt.checkpoint.tower_files import CONFIG, PREPROCESSOR, SINGLE
from vitrt.engine.loader import check_complete
from vitrt.models import build_tower

_FILES = (SINGLE, PREPROCESSOR, CONFIG)


def extract_tower(
    checkpoint: Checkpoint, output_dir: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write the tower of `checkpoint` into `output_dir`: two configs, one safetensors file.

    Bytes and dtypes are those of the checkpoint, names lose the tower's prefix. transformers' own
    tower classes load the folder with `from_pretrained`. Tensors are copied in bounded pieces, and
    nothing stands under its final name before it is complete.

    Raises CheckpointError for an incomplete checkpoint, and for a folder that holds anything else
    unless `overwrite` says to replace its three files.
    """
    output = Path(output_dir).expanduser()
    with torch.device("meta"):
        tower = build_tower(checkpoint.vision_config())
    check_complete(tower.weight_targets(), checkpoint)
    _check_output(checkpoint, output, overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # On the same file system, so that renaming is atomic.
        staging = output.parent / f".{output.name}-{os.getpid()}.partial"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            _write_json(staging / CONFIG, tower_config(checkpoint))
            _write_json(staging / PREPROCESSOR, checkpoint.preprocessor)
            write_tensors(staging / SINGLE, checkpoint.tensors)
            _publish(staging, output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be written: {error.strerror}") from error
    return output


def _publish(staging: Path, output: Path) -> None:
    """Give the finished folder its name; in a folder that is in use, its files one by one."""
    if output.is_dir() and any(output.iterdir()):
        for name in _FILES:
            (staging / name).replace(output / name)
        return
    if output.is_dir():
        output.rmdir()
    staging.rename(output)


def tower_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """A config.json of the same model type that keeps nothing but the vision part and the dtype."""
    vision = checkpoint.config.get("vision_config", checkpoint.config)
    kept = {
        key: checkpoint.config[key] for key in ("dtype", "torch_dtype") if key in checkpoint.config
    }
    family = checkpoint.vision_config().model_type
    return {"model_type": family, **kept, "vision_config": dict(vision)}


def write_tensors(file: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Copy `tensors` into one safetensors file, flushed to disk."""
    ordered = aligned_order(tensors)
    header, _ = build_header(ordered, {"format": "pt"})
    with file.open("wb") as target:
        target.write(header)
        for info in ordered.values():
            with info.file.open("rb") as source:
                copy_bytes(source, target, info)
        target.flush()
        os.fsync(target.fileno())


def _check_output(checkpoint: Checkpoint, output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise CheckpointError(f"{output}: is a file; the output is a folder")
    if output.is_dir():
        sources = {info.file.resolve().parent for info in checkpoint.tensors.values()}
        if output.resolve() in sources | {checkpoint.folder.resolve()}:
            raise CheckpointError(f"{output}: is the checkpoint itself")
        if (present := sorted(path.name for path in output.iterdir())) and not overwrite:
            raise CheckpointError(
                f"{output}: is not empty ({', '.join(present[:5])}); overwrite=True (--overwrite) "
                f"replaces {', '.join(_FILES)}"
            )


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n")
