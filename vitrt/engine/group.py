"""Batches of ranks that share a tower: they go on together, or none of them does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vitrt.engine.memory import memory_lacking
from vitrt.features import ImageFeatures
from vitrt.messages import counted
from vitrt.parallel.context import ParallelContext

Run = Callable[[Sequence[Any]], list[ImageFeatures]]

# gloo and NCCL have no exception class for it.
_DISCONNECTED = ("Connection closed", "Connection reset", "Broken pipe", "NCCL", "gloo")


class GroupError(RuntimeError):
    """The ranks of a group cannot go on together: one lacks memory, or is gone."""


def in_group(run: Run, parallel: ParallelContext, device: torch.device, budget: int) -> Run:
    """`run` as a rank of a group does it: GroupError where its forward cannot be finished.

    The others are in the middle of it then, so a smaller batch cannot be tried.
    """

    def checked(images: Sequence[Any]) -> list[ImageFeatures]:
        try:
            with connected():
                return run(images)
        except Exception as error:
            lacking = memory_lacking(error, device)
            if lacking is None:
                raise
            patches = sum(image.num_patches for image in images)
            whose = device if lacking == "device" else "this rank's host"
            raise GroupError(
                f"a batch of {counted(len(images), 'image')} with {patches} patches does not fit "
                f"on {whose} (tp = {parallel.tp_size}): lower --max-batch-tokens (now {budget}), "
                f"or --max-pixels if it is one image: {error}"
            ) from error

    return checked


@contextmanager
def connected() -> Iterator[None]:
    """GroupError in place of what a broken connection raises."""
    try:
        yield
    except RuntimeError as error:
        lacking = memory_lacking(error, torch.device("cuda"))
        if lacking or not any(sign in str(error) for sign in _DISCONNECTED):
            raise
        raise GroupError(f"another rank of this one's group is gone: {error}") from error
