"""Fill a tower from a checkpoint: every parameter exactly once.

A layer reads only its rank's part of a tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Protocol

import torch

from vitrt.checkpoint.opened import Checkpoint
from vitrt.layers.weights import WeightTarget

logger = logging.getLogger(__name__)


class Tower(Protocol):
    """What can be filled: it names every tensor of the checkpoint's tower, once."""

    def weight_targets(self) -> Iterator[WeightTarget]: ...


def load_weights(model: Tower, checkpoint: Checkpoint) -> None:
    """Fill every parameter of `model`, each exactly once.

    Names and shapes are all checked before the first byte is read; see `tower_tensors`.
    """
    targets = {target.name: target for target in model.weight_targets()}
    tensors = checkpoint.tower_tensors()
    with torch.no_grad():
        for name, tensor in tensors:
            targets.pop(name).store(tensor)
    assert not targets, sorted(targets)
    logger.info("%s: %.0f MiB of weights", checkpoint.name, checkpoint.num_bytes / 2**20)
