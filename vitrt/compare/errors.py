"""Errors against the float32 reference: relative L2, ||out - ref|| / ||ref||."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrt.config import Grid

Output = tuple[Tensor, Sequence[Tensor]]  # embeddings [M, O], deepstack levels of the same shape

FLOAT32_BOUND = 1e-5
RATIO_BOUND = 1.05  # of the error that transformers itself has in the same dtype


@dataclass(frozen=True, slots=True)
class Errors:
    """The errors of one contender on one batch."""

    embeddings: float
    deepstack: tuple[float, ...]

    @property
    def values(self) -> tuple[float, ...]:
        """The embeddings' error, then each deepstack level's."""
        return self.embeddings, *self.deepstack

    @property
    def worst(self) -> float:
        return max(self.values)

    def ratio_to(self, others: Errors) -> float:
        """The largest quotient of an error and the other's; infinite where there is none."""
        if len(self.deepstack) != len(others.deepstack):
            return math.inf
        pairs = zip(self.values, others.values, strict=True)
        return max(ours / theirs if 0 < theirs < math.inf else math.inf for ours, theirs in pairs)


def relative_error(out: Tensor, reference: Tensor) -> float:
    """NaN or a wrong shape gives infinity: neither may pass a bound."""
    if out.shape != reference.shape:
        return float("inf")
    reference = reference.float()
    error = torch.linalg.vector_norm(out.float() - reference) / torch.linalg.vector_norm(reference)
    return float(error) if torch.isfinite(error) else float("inf")


def cosines(out: Output, reference: Output, sizes: Sequence[int]) -> tuple[float, ...]:
    """Cosine between the embeddings of each image and the reference's; `sizes` are their tokens.

    NaN gives -1: it may not look like an agreement.
    """
    pairs = zip(out[0].split(list(sizes)), reference[0].split(list(sizes)), strict=True)
    found = [
        torch.cosine_similarity(ours.double().flatten(), theirs.double().flatten(), dim=0)
        for ours, theirs in pairs
    ]
    return tuple(float(value) if torch.isfinite(value) else -1.0 for value in found)


def compare(out: Output, reference: Output) -> Errors:
    embeddings, levels = out
    ref_embeddings, ref_levels = reference
    deepstack = list(map(relative_error, levels, ref_levels))
    deepstack += [float("inf")] * abs(len(levels) - len(ref_levels))
    return Errors(relative_error(embeddings, ref_embeddings), tuple(deepstack))


def float32_reference(tower: nn.Module, pixels: Tensor, grids: tuple[Grid, ...]) -> Output:
    """The float32 tower's output for pixels of any dtype."""
    with full_precision():
        return output_of(tower(pixels.float(), grid_thw=torch.tensor(grids, device=pixels.device)))


def output_of(result: Any) -> Output:
    """What transformers' towers give, of a family with deepstack levels or without."""
    return result.pooler_output, getattr(result, "deepstack_features", None) or ()


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 anywhere: cuDNN's convolutions use it by default, and the patch embedding is one."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
