"""One model: every contender on one workload right after the other, then what else was asked for.

The compiled peer comes last, since compiling may use up the time limit.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vitrt.attention import label
from vitrt.bench.ablate import ablate
from vitrt.bench.options import BenchConfig
from vitrt.bench.peers import (
    Contender,
    Eager,
    UnavailableError,
    Vitrt,
    build_peer,
)
from vitrt.bench.profiling import profile_call
from vitrt.bench.results import ModelResult, Row
from vitrt.bench.timing import Clock, measure
from vitrt.bench.workloads import Workload, build_workloads
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.compare.errors import compare, float32_reference
from vitrt.compare.reference import NamedModel, build_tower, float32_copy, save_checkpoint
from vitrt.encoder import VisionEncoder
from vitrt.models.work import count_flops

logger = logging.getLogger(__name__)

INPUT_SETS = 3  # pixels that calls take in turn, so that none of them times a warm cache
ABLATED = ("1x560", "32x560")  # one bound by launches, one by arithmetic
MEMORY_WORKLOAD = "32x560"


class ModelBench:
    """One model: its tower, its encoder, its rows."""

    def __init__(
        self,
        config: BenchConfig,
        model: NamedModel,
        device: torch.device,
        dtype: torch.dtype,
        clock: Clock,
        until: float,
        progress: Callable[[str], None],
    ) -> None:
        self.config, self.model, self.device, self.dtype = config, model, device, dtype
        self.peers = config.peers or ()
        self.clock, self.until, self.progress = clock, until, progress

    def run(self, models: list[ModelResult]) -> None:
        """Append this model's result to `models`, and fill it figure by figure."""
        config, model = self.config, self.model
        with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
            tower = build_tower(model, device=self.device, dtype=self.dtype)
            reference = float32_copy(tower, model.config) if config.check else None
            checkpoint = save_checkpoint(tower, model, Path(folder))
            encoder = VisionEncoder.from_checkpoint(open_checkpoint(checkpoint), config.runtime)
            self.progress(f"{model.name}: loaded after {self.clock.spent:.0f} s")
            workloads = build_workloads(
                model.config.patch_size, config.workloads, tiny=config.scale == "tiny"
            )
            rows = [Row(w, count_flops(model.config, w.grids).total) for w in workloads]
            peers = self._peers(tower, rows, compiled=False)
            compiled = self._peers(tower, rows, compiled=True)
            labels = {peer.name: peer.label for peer in (*peers, *compiled)}
            stats = encoder.stats()
            models.append(ModelResult(model, _attention_label(encoder), rows, stats, labels))
            for row in rows:
                self._contests([Vitrt(encoder), *peers], row, tower, reference)
            for row in rows:
                self._extras(encoder, tower, row)
            for contender in compiled:
                self._compiled(contender, tower, reference, rows)

    def _peers(self, tower: nn.Module, rows: list[Row], *, compiled: bool) -> list[Contender]:
        found = []
        for name in self.peers:
            if (name == "compile") != compiled:
                continue
            try:
                found.append(build_peer(name, tower))
            except UnavailableError as error:
                for row in rows:
                    row.failures[name] = str(error)
        return found

    def _contests(
        self,
        contenders: Sequence[Contender],
        row: Row,
        tower: nn.Module,
        reference: nn.Module | None,
    ) -> None:
        """Every contender on one workload, right after one another."""
        inputs, grids = self._inputs(row.workload), row.workload.grids
        expected = None
        if reference is not None:
            expected = float32_reference(reference, inputs[0], grids)
            if self.dtype != torch.float32 and row.reference_errors is None:
                row.reference_errors = compare(
                    Eager(tower, "sdpa").prepare(grids)(inputs[0]), expected
                )
        for contender in contenders:
            name = contender.name
            with self._surviving(row, name):
                forward = contender.prepare(grids)
                if expected is not None:
                    row.errors[name] = compare(forward(inputs[0]), expected)
                timing = measure(
                    forward,
                    inputs,
                    self.device,
                    seconds=self.config.seconds,
                    latency=row.workload.single,
                )
                row.timings[name] = timing
                self.progress(
                    f"{self.model.name} {row.workload.name} {name}: {timing.rate_ms:.3f} ms"
                    f" +-{timing.spread:.1%} of {timing.calls}, {self.clock.spent:.0f} s"
                )
        release(self.device)

    def _compiled(
        self, contender: Contender, tower: nn.Module, reference: nn.Module | None, rows: list[Row]
    ) -> None:
        longest = 0.0
        for row in rows:
            if self.until - self.clock.spent < longest:
                row.failures[contender.name] = "left out: the time limit"
                continue
            start = time.monotonic()
            self._contests([contender], row, tower, reference)
            row.compile_seconds = time.monotonic() - start
            longest = max(longest, row.compile_seconds)

    @contextlib.contextmanager
    def _surviving(self, row: Row, name: str) -> Iterator[None]:
        """What breaks is a finding of its own and must not cost the others their figures."""
        try:
            yield
        except Exception as error:
            logger.warning("%s on %s failed", name, row.workload.name, exc_info=True)
            row.failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            release(self.device)

    def _extras(self, encoder: VisionEncoder, tower: nn.Module, row: Row) -> None:
        config, workload = self.config, row.workload
        if "vitrt" in row.failures:
            return
        inputs = self._inputs(workload)
        if workload.single:
            row.plan_ms = _plan_ms(encoder, workload)
        if config.profile:
            with self._surviving(row, "profile"):
                forward = Vitrt(encoder).prepare(workload.grids)
                row.profile = profile_call(forward, inputs, self.device)
        if config.memory and workload.name == MEMORY_WORKLOAD:
            with self._surviving(row, "memory"):
                row.memory = self._memory(encoder, tower, row, inputs[0])
        if config.ablate and workload.name in self._ablated():
            with self._surviving(row, "ablate"):
                row.ablations = ablate(encoder, workload, inputs, seconds=config.seconds / 2)
                self.progress(f"{self.model.name} {workload.name}: ablations")

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
        shape = (workload.patches, self.model.config.patch_dim)
        return [
            torch.randn(shape, generator=generator, device=device).to(self.dtype)
            for _ in range(INPUT_SETS)
        ]


def _attention_label(encoder: VisionEncoder) -> str:
    choice = encoder.engine.attention
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
    release(pixels.device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward(pixels)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
