"""A vision-only checkpoint: the tower's tensors in one file, beside its two configs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrt.checkpoint.opened import Checkpoint
from vitrt.checkpoint.processor_files import PREPROCESSOR, PROCESSOR, VIDEO_PREPROCESSOR
from vitrt.checkpoint.shards import CheckpointError, LazyTensor
from vitrt.checkpoint.tower_files import CONFIG, SINGLE
from vitrt.messages import reason_of
from vitrt.models.config_file import family_of
from vitrt.tensor_file import DTYPE_NAMES, DTYPES, build_header

_FILES = (SINGLE, PREPROCESSOR, VIDEO_PREPROCESSOR, CONFIG)
PIECE_BYTES = 4 << 20


def extract_tower(
    checkpoint: Checkpoint, output_dir: str | os.PathLike[str], *, overwrite: bool = False
) -> Path:
    """Write the tower of `checkpoint` into `output_dir`: its configs, one safetensors file.

    `checkpoint` is what `vitrt.checkpoint.opened.open_checkpoint` gives for a folder or a hub id.
    Values and dtypes are those of the checkpoint, names lose the tower's prefix. Weights in fp8 are
    written dequantised, in the dtype that the config gives the model, and an adapter merged, in the
    dtypes of its base. transformers' own tower classes load the folder with `from_pretrained`.
    Tensors are written one by one, and nothing stands under its final name before it is complete.

    Raises CheckpointError for an incomplete checkpoint, and for a folder that holds anything else
    unless `overwrite` says to replace these files.
    """
    output = Path(output_dir).expanduser()
    processors = checkpoint.processors
    tensors = dict(checkpoint.tower_tensors())
    _check_output(checkpoint, output, overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # On the same file system, so that renaming is atomic.
        staging = output.parent / f".{output.name}-{os.getpid()}.partial"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            _write_json(staging / CONFIG, tower_config(checkpoint))
            _write_json(staging / PREPROCESSOR, processors.image)
            if processors.video != processors.image:
                _write_json(staging / VIDEO_PREPROCESSOR, processors.video)
            _write_tensors(staging / SINGLE, tensors, checkpoint)
            _publish(staging, output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be written: {reason_of(error)}") from error
    return output


def _publish(staging: Path, output: Path) -> None:
    """Give the finished folder its name; in a folder that is in use, its files one by one."""
    if output.is_dir() and any(output.iterdir()):
        (output / PROCESSOR).unlink(missing_ok=True)  # it would be read instead
        for name in _FILES:
            if (staging / name).exists():
                (staging / name).replace(output / name)
            else:
                (output / name).unlink(missing_ok=True)
        return
    if output.is_dir():
        output.rmdir()
    staging.rename(output)


def tower_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """A config.json of the same model type that keeps nothing but the vision part and the dtype."""
    family, vision = family_of(checkpoint.config)
    kept = {
        key: checkpoint.config[key] for key in ("dtype", "torch_dtype") if key in checkpoint.config
    }
    return {"model_type": family.name, **kept, "vision_config": dict(vision)}


def _write_tensors(file: Path, tensors: dict[str, LazyTensor], checkpoint: Checkpoint) -> None:
    """Write `tensors`, and let each go, into one safetensors file that is flushed to disk."""
    dtypes = {name: _saved_dtype(name, checkpoint) for name in tensors}
    # Widest dtypes first: every tensor is aligned to its elements, as safetensors writes them.
    order = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    layout = {name: (DTYPE_NAMES[dtypes[name]], tensors[name].shape) for name in order}
    with file.open("wb") as target:
        target.write(build_header(layout, {"format": "pt"}))
        for name in order:
            for part in _pieces(tensors.pop(name)):
                target.write(
                    part.to(dtypes[name]).contiguous().view(-1).view(torch.uint8).numpy().data
                )
        target.flush()
        os.fsync(target.fileno())


def _pieces(tensor: LazyTensor) -> Iterator[Tensor]:
    """A tensor in rows of bounded size."""
    if not tensor.shape:
        yield tensor[...].reshape(1)
        return
    row_bytes = prod(tensor.shape[1:]) * tensor.dtype.itemsize
    step = max(PIECE_BYTES // max(row_bytes, 1), 1)
    for first in range(0, tensor.shape[0], step):
        yield tensor[first : first + step]


def _saved_dtype(name: str, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype as stored; of a weight in fp8, the one that the config gives the model."""
    stored = DTYPES[checkpoint.tensors[name].dtype]
    return stored if stored.itemsize > 1 else checkpoint.model_dtype()


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
                f"replaces {', '.join(_FILES)} and removes {PROCESSOR}"
            )


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n")
