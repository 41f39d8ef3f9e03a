"""What each part of the design is worth: the time without it over the time with it, in one run.

A part is taken out by replacing a function or an object here; the product has no switches for it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vitrt.attention import AttentionChoice
from vitrt.bench.timing import measure
from vitrt.bench.workloads import Workload
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.encoder import VisionEncoder
from vitrt.engine.device import dtype_name
from vitrt.kernels.segments import Rotary
from vitrt.layers.cache import ByteCache
from vitrt.layers.linear import padded_width

logger = logging.getLogger(__name__)

Encode = Callable[[Tensor, Tensor], object]  # pixels, grid_thw: what an encoder is called with
Variant = Callable[[VisionEncoder], contextlib.AbstractContextManager[Encode]]


@dataclass(frozen=True, slots=True)
class Ablation:
    """One part of the design, taken out."""

    part: str
    without: str  # what stands in its place
    with_ms: float
    without_ms: float | None  # None where that cannot run
    reason: str = ""

    @property
    def ratio(self) -> float | None:
        return None if self.without_ms is None else self.without_ms / self.with_ms


@dataclass(frozen=True, slots=True)
class _Pair:
    part: str
    without: str
    kept: Variant
    taken_out: Variant
    latency: bool = False  # judged by wall clock, one call at a time


def ablate(
    encoder: VisionEncoder, workload: Workload, inputs: Sequence[Tensor], *, seconds: float = 0.5
) -> list[Ablation]:
    """All ablations of one encoder on one workload."""
    grid_thw, device = torch.tensor(workload.grids), encoder.device
    rows = []
    for pair in _pairs(encoder):
        with pair.kept(encoder) as kept:
            with_ms = _milliseconds(kept, device, grid_thw, inputs, seconds, pair.latency)
        try:
            with pair.taken_out(encoder) as without:
                without_ms = _milliseconds(without, device, grid_thw, inputs, seconds, pair.latency)
        except Exception as error:
            logger.warning("%s without %s failed", workload.name, pair.part, exc_info=True)
            reason = f"{type(error).__name__}: {error}"
            rows.append(Ablation(pair.part, pair.without, with_ms, None, reason))
        else:
            rows.append(Ablation(pair.part, pair.without, with_ms, without_ms))
    return rows


def _pairs(encoder: VisionEncoder) -> Iterator[_Pair]:
    yield _Pair("RoPE kernel", "PyTorch operators", _one_backend, _native_rope)
    yield _Pair("cached positions", "computed in every call", _as_it_is, _uncached, latency=True)
    yield _Pair("attention=auto", "sdpa", _as_it_is, _sdpa)
    if encoder.config.window_size is not None:
        yield _Pair("window kernel", "the full layers' backend", _eager, _one_backend)
    width = encoder.config.intermediate_size
    if padded_width(width, 1) != width:
        yield _Pair("padded MLP", "the checkpoint's width", _eager, _unpadded)
    if encoder.device.type == "cuda":
        yield _Pair("CUDA graphs", "eager", _graphs, _eager, latency=True)


def _milliseconds(
    encode: Encode,
    device: torch.device,
    grid_thw: Tensor,
    inputs: Sequence[Tensor],
    seconds: float,
    latency: bool,
) -> float:
    def call(pixels: Tensor) -> object:
        return encode(pixels, grid_thw)

    timing = measure(call, inputs, device, seconds=seconds, latency=latency)
    return timing.rate_ms if timing.wall_ms is None else timing.wall_ms


def _variant(encoder: VisionEncoder, **runtime: Any) -> VisionEncoder:
    """Another encoder on the same weights."""
    return VisionEncoder(
        encoder.tower,
        encoder.preprocessor,
        replace(encoder.runtime, **runtime),
        device=encoder.device,
        dtype=encoder.dtype,
    )


@contextlib.contextmanager
def _as_it_is(encoder: VisionEncoder) -> Iterator[VisionEncoder]:
    yield encoder


@contextlib.contextmanager
def _eager(encoder: VisionEncoder) -> Iterator[VisionEncoder]:
    yield _variant(encoder, cuda_graphs=False)


@contextlib.contextmanager
def _graphs(encoder: VisionEncoder) -> Iterator[VisionEncoder]:
    yield _variant(encoder, cuda_graphs=True)


@contextlib.contextmanager
def _sdpa(encoder: VisionEncoder) -> Iterator[VisionEncoder]:
    yield _variant(encoder, attention="sdpa")


@contextlib.contextmanager
def _one_backend(encoder: VisionEncoder) -> Iterator[VisionEncoder]:
    """Windows through the full layers' backend too: rotation is a step of its own everywhere."""
    variant = _variant(encoder, cuda_graphs=False)
    variant.runner.attention = AttentionChoice(variant.attention.full, variant.attention.full)
    yield variant


@contextlib.contextmanager
def _native_rope(encoder: VisionEncoder) -> Iterator[VisionEncoder]:
    with (
        _one_backend(encoder) as variant,
        mock.patch("vitrt.layers.attention.rope_", native_rope_),
    ):
        yield variant


@contextlib.contextmanager
def _uncached(encoder: VisionEncoder) -> Iterator[Encode]:
    """Every call finds all index caches empty."""
    variant = _variant(encoder)
    caches = [
        (owner, name, value)
        for owner in (variant.tower, variant.runner)
        for name, value in vars(owner).items()
        if isinstance(value, ByteCache)
    ]

    def encode(pixels: Tensor, grid_thw: Tensor) -> object:
        for owner, name, cache in caches:
            setattr(owner, name, ByteCache(cache.max_bytes))
        return variant(pixels, grid_thw)

    try:
        yield encode
    finally:
        for owner, name, cache in caches:
            setattr(owner, name, cache)


@contextlib.contextmanager
def _unpadded(encoder: VisionEncoder) -> Iterator[VisionEncoder]:
    runtime = replace(
        encoder.runtime,
        device=str(encoder.device),
        dtype=dtype_name(encoder.dtype),
        cuda_graphs=False,
    )
    with mock.patch("vitrt.layers.mlp.padded_width", lambda width, tp_size: width):
        yield VisionEncoder.from_checkpoint(open_checkpoint(encoder.name), runtime)


def native_rope_(qkv: Tensor, rotary: Rotary) -> None:
    """q and k rotated in place by PyTorch operators, as a model written without kernels does it."""
    half = qkv.shape[-1] // 2
    positions = rotary.positions.long()
    cos = rotary.cos[positions].flatten(1).repeat(1, 2)[:, None, None]
    sin = rotary.sin[positions].flatten(1).repeat(1, 2)[:, None, None]
    turned = qkv[:, :2].float()
    swapped = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    qkv[:, :2] = (turned * cos + swapped * sin).to(qkv.dtype)
