"""Fill a tower from a checkpoint: every parameter exactly once.

A layer reads only its rank's part of a tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Protocol

import torch

from vitrt.checkpoint.opened import Checkpoint
from vitrt.checkpoint.shards import CheckpointError, StoredTensor
from vitrt.layers.weights import WeightTarget

logger = logging.getLogger(__name__)


class Tower(Protocol):
    """What can be filled: it names every tensor of the checkpoint's tower, once."""

    def weight_targets(self) -> Iterator[WeightTarget]: ...


def check_complete(
    targets: Iterable[WeightTarget], checkpoint: Checkpoint
) -> dict[str, WeightTarget]:
    """The targets by name. CheckpointError lists every missing, left-over and misshapen tensor."""
    if not checkpoint.tensors:
        raise CheckpointError(f"{checkpoint.name}: holds no weights ({checkpoint.folder})")
    by_name: dict[str, WeightTarget] = {}
    for target in targets:
        assert target.name not in by_name, f"two targets for {target.name}"
        by_name[target.name] = target
    tensors = checkpoint.tensors
    misshapen = [
        f"{tensors[name].full_name} is {list(tensors[name].shape)} in {tensors[name].file.name}, "
        f"should be {list(target.shape)}"
        for name, target in by_name.items()
        if name in tensors and tensors[name].shape != target.shape
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
    targets = check_complete(model.weight_targets(), checkpoint)
    in_order = sorted(
        targets.values(),
        key=lambda target: (
            checkpoint.tensors[target.name].file,
            checkpoint.tensors[target.name].offset,
        ),
    )
    for file, group in groupby(in_order, key=lambda target: checkpoint.tensors[target.name].file):
        try:
            with file.open("rb", buffering=0) as stream, torch.no_grad():
                for target in group:
                    target.store(StoredTensor(stream, checkpoint.tensors[target.name]))
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    size = checkpoint.num_bytes / 2**20
    logger.info("%s: %d tensors, %.0f MiB", checkpoint.name, len(targets), size)
