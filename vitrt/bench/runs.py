"""One benchmark run: what was asked for, what was measured, and in which order.

Order matters for honesty and for time: ceilings first and last; for each model, every contender on
one workload right after the other, and the compiled peer at the end, since compiling may use up the
time limit.
"""

from __future__ import annotations

import gc
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vitrt.attention import AttentionBackend, AutoBackend
from vitrt.bench.ablate import Ablation, ablate
from vitrt.bench.accuracy import Errors, compare, float32_reference
from vitrt.bench.options import PEER_NAMES, BenchConfig
from vitrt.bench.peers import (
    Contender,
    Eager,
    Output,
    UnavailableError,
    Vitrt,
    build_peer,
)
from vitrt.bench.profiling import Profile, profile_call
from vitrt.bench.timing import Ceilings, Timing, measure, measure_ceilings
from vitrt.bench.towers import Source, build_tower, float32_copy, resolve, save_checkpoint
from vitrt.bench.workloads import Workload, build_workloads
from vitrt.encoder import VisionEncoder
from vitrt.flops import count_flops
from vitrt.placement import resolve_device, resolve_dtype
from vitrt.runner import RunnerStats

logger = logging.getLogger(__name__)

INPUT_SETS = 3  # pixels that calls take in turn, so that none of them times a warm cache
ABLATED = ("1x560", "32x560")  # one bound by launches, one by arithmetic
MEMORY_WORKLOAD = "32x560"


@dataclass(slots=True)
class Row:
    """One workload."""

    workload: Workload
    flops: int
    timings: dict[str, Timing] = field(default_factory=dict)  # by contender
    errors: dict[str, Errors] = field(default_factory=dict)  # against transformers in float32
    reference_errors: Errors | None = None  # transformers' own in a lower precision
    failures: dict[str, str] = field(default_factory=dict)
    compile_seconds: float | None = None
    plan_ms: float | None = None  # a warm plan() on the host
    profile: Profile | None = None
    ablations: list[Ablation] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)  # peak bytes beyond weights and inputs


@dataclass(slots=True)
class ModelResult:
    source: Source
    attention: str
    rows: list[Row]
    stats: RunnerStats


@dataclass(slots=True)
class BenchResult:
    config: BenchConfig
    device: torch.device
    dtype: torch.dtype
    ceilings: list[Ceilings] = field(default_factory=list)
    models: list[ModelResult] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tflops(self) -> float:
        """The ceiling that shares refer to: the best product seen in this run."""
        return max(ceiling.tflops for ceiling in self.ceilings)


class Clock:
    """How much of the time limit is left."""

    def __init__(self, limit: float) -> None:
        self.start = time.monotonic()
        self.limit = limit

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        return self.limit - self.spent


def run_bench(config: BenchConfig, progress: Callable[[str], None]) -> BenchResult:
    """The whole benchmark; `progress` is told one line about each measurement."""
    clock, device = Clock(config.time_limit), resolve_device(config.device)
    result = BenchResult(config, device, resolve_dtype(config.dtype, device))
    config = _settled(config, device)
    sources = [resolve(model, tiny=bool(config.tiny)) for model in config.models]
    for source in sources:
        build_workloads(source.config.patch_size, config.workloads)  # a wrong name ends it here
    result.ceilings.append(measure_ceilings(device, result.dtype))
    for index, source in enumerate(sources):
        # Each model may spend its share of what is left.
        share = clock.spent + clock.left / (len(sources) - index)
        bench = _ModelBench(config, source, device, result.dtype, clock, share, progress)
        result.models.append(bench.run())
        del bench
        _release(device)
    result.ceilings.append(measure_ceilings(device, result.dtype))
    result.seconds = clock.spent
    return result


def _settled(config: BenchConfig, device: torch.device) -> BenchConfig:
    """What was left open depends on the device."""
    cuda = device.type == "cuda"
    peers = PEER_NAMES if cuda else ("sdpa",)
    return replace(
        config,
        peers=peers if config.peers is None else config.peers,
        tiny=not cuda if config.tiny is None else config.tiny,
    )


class _ModelBench:
    """One model: its tower, its encoder, its rows."""

    def __init__(
        self,
        config: BenchConfig,
        source: Source,
        device: torch.device,
        dtype: torch.dtype,
        clock: Clock,
        until: float,
        progress: Callable[[str], None],
    ) -> None:
        self.config, self.source, self.device, self.dtype = config, source, device, dtype
        self.peers = config.peers or ()
        self.clock, self.until, self.progress = clock, until, progress

    def run(self) -> ModelResult:
        config, source = self.config, self.source
        with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
            tower = build_tower(source, device=self.device, dtype=self.dtype)
            checkpoint = save_checkpoint(tower, source, Path(folder))
            encoder = VisionEncoder.from_pretrained(
                checkpoint,
                device=self.device,
                dtype=self.dtype,
                attention=config.attention,
                cuda_graphs="auto" if config.cuda_graphs is None else config.cuda_graphs,
            )
            self.progress(f"{source.name}: loaded after {self.clock.spent:.0f} s")
            workloads = build_workloads(
                source.config.patch_size, config.workloads, tiny=bool(config.tiny)
            )
            rows = [Row(w, count_flops(source.config, w.grids).total) for w in workloads]
            self._eager(tower, encoder, rows)
            self._extras(encoder, tower, rows)
            if "compile" in self.peers:
                self._compiled(tower, rows)
            return ModelResult(source, _attention_label(encoder), rows, encoder.stats())

    def _eager(self, tower: nn.Module, encoder: VisionEncoder, rows: list[Row]) -> None:
        reference = float32_copy(tower, self.source.config) if self.config.check else None
        contenders: list[Contender] = [Vitrt(encoder)]
        for name in self.peers:
            if name == "compile":
                continue
            try:
                contenders.append(build_peer(name, tower))
            except UnavailableError as error:
                for row in rows:
                    row.failures[name] = str(error)
        for row in rows:
            inputs = self._inputs(row.workload)
            expected = None
            if reference is not None:
                expected = float32_reference(reference, inputs[0], row.workload.grids)
                if self.dtype != torch.float32:
                    own = Eager(tower, "sdpa").prepare(row.workload.grids)(inputs[0])
                    row.reference_errors = compare(own, expected)
                    del own
            for contender in contenders:
                self._contest(contender, row, inputs, expected)
            del expected, inputs
            _release(self.device)

    def _compiled(self, tower: nn.Module, rows: list[Row]) -> None:
        try:
            contender = build_peer("compile", tower)
        except UnavailableError as error:
            for row in rows:
                row.failures["compile"] = str(error)
            return
        longest = 0.0
        for row in rows:
            if self.until - self.clock.spent < longest:
                row.failures["compile"] = "left out: the time limit"
                continue
            start = time.monotonic()
            self._contest(contender, row, self._inputs(row.workload), None)
            longest = max(longest, time.monotonic() - start)
            row.compile_seconds = time.monotonic() - start

    def _contest(
        self, contender: Contender, row: Row, inputs: Sequence[Tensor], expected: Output | None
    ) -> None:
        name = contender.name
        try:
            forward = contender.prepare(row.workload.grids)
            if expected is not None:
                row.errors[name] = compare(forward(inputs[0]), expected)
            row.timings[name] = measure(
                forward,
                inputs,
                self.device,
                seconds=self.config.seconds,
                latency=row.workload.single,
            )
        except Exception as error:
            # A peer that breaks is a finding of its own and must not cost the others their figures.
            logger.warning("%s on %s failed", name, row.workload.name, exc_info=True)
            row.failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            _release(self.device)
            return
        timing = row.timings[name]
        self.progress(
            f"{self.source.name} {row.workload.name} {name}: {timing.rate_ms:.3f} ms"
            f" +-{timing.spread:.1%} of {timing.calls}, {self.clock.spent:.0f} s"
        )

    def _extras(self, encoder: VisionEncoder, tower: nn.Module, rows: list[Row]) -> None:
        config = self.config
        for row in rows:
            inputs = self._inputs(row.workload)
            if row.workload.single:
                row.plan_ms = _plan_ms(encoder, row.workload)
            if config.profile:
                forward = Vitrt(encoder).prepare(row.workload.grids)
                row.profile = profile_call(forward, inputs, self.device)
            if config.memory and row.workload.name == MEMORY_WORKLOAD:
                row.memory = self._memory(encoder, tower, row, inputs[0])
            if config.ablate and row.workload.name in self._ablated():
                row.ablations = ablate(encoder, row.workload, inputs, seconds=config.seconds / 2)
                self.progress(f"{self.source.name} {row.workload.name}: ablations")

    def _ablated(self) -> tuple[str, ...]:
        chosen = tuple(name for name in ABLATED if name in self.config.workloads)
        return chosen or self.config.workloads[:1]

    def _memory(
        self, encoder: VisionEncoder, tower: nn.Module, row: Row, pixels: Tensor
    ) -> dict[str, int]:
        if self.device.type != "cuda":
            return {}
        peaks = {}
        names = [name for name in self.peers if name != "compile" and name in row.timings]
        for contender in (Vitrt(encoder), *(build_peer(name, tower) for name in names)):
            forward = contender.prepare(row.workload.grids)
            peaks[contender.name] = _peak_bytes(forward, pixels)
        return peaks

    def _inputs(self, workload: Workload) -> list[Tensor]:
        """Sets of random pixels [T, P], of the range that normalised images have."""
        device = self.device
        generator = torch.Generator(device).manual_seed(workload.patches)
        shape = (workload.patches, self.source.config.patch_dim)
        return [
            torch.randn(shape, generator=generator, device=device).to(self.dtype)
            for _ in range(INPUT_SETS)
        ]


def _attention_label(encoder: VisionEncoder) -> str:
    def label(backend: AttentionBackend) -> str:
        return repr(backend) if isinstance(backend, AutoBackend) else backend.name

    choice = encoder.attention
    if encoder.config.window_size is None:
        return label(choice.full)
    return f"{label(choice.full)} in full layers, {label(choice.window)} in windows"


def _plan_ms(encoder: VisionEncoder, workload: Workload) -> float:
    start = time.perf_counter()
    for _ in range(100):
        encoder.tower.plan(workload.grids)
    return 10 * (time.perf_counter() - start)


def _peak_bytes(forward: Callable[[Tensor], object], pixels: Tensor) -> int:
    for _ in range(2):
        forward(pixels)
    _release(pixels.device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward(pixels)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
