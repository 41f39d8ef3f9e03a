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

from vitrt.attention import AttentionChoice, AutoBackend
from vitrt.bench.timing import measure
from vitrt.bench.workloads import Workload
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.encoder import VisionEncoder
from vitrt.engine.batch import PixelValues
from vitrt.engine.device import dtype_name
from vitrt.engine.engine import Engine
from vitrt.kernels.segments import Rotary
from vitrt.layers.cache import ByteCache
from vitrt.layers.linear import padded_width

logger = logging.getLogger(__name__)

Run = Callable[[PixelValues], object]  # what an engine does with a batch
Variant = Callable[[VisionEncoder], contextlib.AbstractContextManager[Run]]

_LARGE = 1 << 14  # patches of an image for which any backend of "auto" is at its best


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

    def milliseconds(run: Run, latency: bool) -> float:
        def call(pixels: Tensor) -> object:
            return run(PixelValues(pixels, workload.grids))

        timing = measure(call, inputs, encoder.device, seconds=seconds, latency=latency)
        return timing.rate_ms if timing.wall_ms is None else timing.wall_ms

    rows = []
    for pair in _pairs(encoder):
        with pair.kept(encoder) as kept:
            with_ms = milliseconds(kept, pair.latency)
        try:
            with pair.taken_out(encoder) as without:
                without_ms = milliseconds(without, pair.latency)
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
    yield _Pair("attention=auto", "sdpa", _as_it_is, _with(attention="sdpa"))
    if encoder.config.window_size is not None:
        yield _Pair("window kernel", "the full layers' backend", _eager, _one_backend)
    width = encoder.config.intermediate_size
    if padded_width(width, 1) != width:
        yield _Pair("padded MLP", "the checkpoint's width", _eager, _unpadded)
    if encoder.device.type == "cuda":
        yield _Pair("CUDA graphs", "eager", _graphs, _eager, latency=True)


def _variant(encoder: VisionEncoder, **runtime: Any) -> Engine:
    """Another engine on the same weights."""
    return Engine(encoder.tower, replace(encoder.runtime, **runtime))


@contextlib.contextmanager
def _as_it_is(encoder: VisionEncoder) -> Iterator[Run]:
    yield encoder.engine.run


def _with(**runtime: Any) -> Variant:
    """The same weights under other choices."""
    return lambda encoder: contextlib.nullcontext(_variant(encoder, **runtime).run)


_eager, _graphs = _with(cuda_graphs=False), _with(cuda_graphs=True)


@contextlib.contextmanager
def _one_backend(encoder: VisionEncoder) -> Iterator[Run]:
    """The backend of large images for all: rotation is a step of its own everywhere."""
    variant = _variant(encoder, cuda_graphs=False)
    backend = variant.attention.full
    if isinstance(backend, AutoBackend):
        backend = backend.select([_LARGE])
    variant.runner.attention = AttentionChoice(backend, backend)
    yield variant.run


@contextlib.contextmanager
def _native_rope(encoder: VisionEncoder) -> Iterator[Run]:
    with _one_backend(encoder) as run, mock.patch("vitrt.layers.attention.rope_", native_rope_):
        yield run


@contextlib.contextmanager
def _uncached(encoder: VisionEncoder) -> Iterator[Run]:
    """Every call finds all index caches empty."""
    variant = _variant(encoder)
    caches = [
        (owner, name, value)
        for owner in (variant.tower, variant.runner)
        for name, value in vars(owner).items()
        if isinstance(value, ByteCache)
    ]

    def run(batch: PixelValues) -> object:
        for owner, name, cache in caches:
            setattr(owner, name, ByteCache(cache.max_bytes))
        return variant.run(batch)

    try:
        yield run
    finally:
        for owner, name, cache in caches:
            setattr(owner, name, cache)


@contextlib.contextmanager
def _unpadded(encoder: VisionEncoder) -> Iterator[Run]:
    runtime = replace(
        encoder.runtime,
        device=str(encoder.device),
        dtype=dtype_name(encoder.dtype),
        cuda_graphs=False,
    )
    with mock.patch("vitrt.layers.mlp.padded_width", lambda width, tp_size: width):
        yield VisionEncoder.from_checkpoint(open_checkpoint(encoder.name), runtime).engine.run


def native_rope_(qkv: Tensor, rotary: Rotary) -> None:
    """q and k rotated in place by PyTorch operators, as a model written without kernels does it."""
    half = qkv.shape[-1] // 2
    positions = rotary.positions.long()
    cos = rotary.cos[positions].flatten(1).repeat(1, 2)[:, None, None]
    sin = rotary.sin[positions].flatten(1).repeat(1, 2)[:, None, None]
    turned = qkv[:, :2].float()
    swapped = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    qkv[:, :2] = (turned * cos + swapped * sin).to(qkv.dtype)
