"""One model: its contenders take turns on each workload, then what else was asked for.

Peers that compile for every shape come last, since that may use up the time limit; vitrt takes its
turns beside them once more.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vitrt.attention import label
from vitrt.bench.ablate import ablate
from vitrt.bench.clocks import ClockSampler
from vitrt.bench.contenders import Contender, UnavailableError, Vitrt
from vitrt.bench.options import BenchConfig
from vitrt.bench.peers import COMPILED, Subject, build_peer
from vitrt.bench.profiling import profile_call
from vitrt.bench.results import ModelResult, Row
from vitrt.bench.timing import Clock, Samples
from vitrt.bench.transformers_peers import Eager
from vitrt.bench.workloads import Workload, build_workloads
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.compare.errors import Output, compare, float32_reference
from vitrt.compare.reference import NamedModel, build_tower, float32_copy, save_checkpoint
from vitrt.encoder import VisionEncoder
from vitrt.models.work import count_flops

logger = logging.getLogger(__name__)

OURS = "vitrt"
INPUT_SETS = 3  # pixels that calls take in turn, so that none of them times a warm cache
TURNS = 6
ABLATED = ("1x560", "32x560")  # one bound by launches, one by arithmetic
MEMORY_WORKLOAD = "32x560"


@dataclass(frozen=True, slots=True)
class Setting:
    """What the models of a run have in common."""

    config: BenchConfig
    device: torch.device
    dtype: torch.dtype
    clock: Clock
    until: float  # seconds of the run, after which this model compiles nothing more
    clocks: ClockSampler
    progress: Callable[[str], None]


class ModelBench:
    """One model: its tower, its encoder, its rows."""

    def __init__(self, setting: Setting, model: NamedModel) -> None:
        self.setting, self.model = setting, model
        self.config, self.device, self.dtype = setting.config, setting.device, setting.dtype
        self.peers: list[Contender] = []

    def run(self, models: list[ModelResult]) -> None:
        """Append this model's result to `models`, and fill it figure by figure."""
        config, model = self.config, self.model
        with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
            tower = build_tower(model, device=self.device, dtype=self.dtype)
            reference = float32_copy(tower, model.config) if config.check else None
            checkpoint = open_checkpoint(save_checkpoint(tower, model, Path(folder)))
            encoder = VisionEncoder.from_checkpoint(checkpoint, config.runtime)
            self._say(f"loaded after {self.setting.clock.spent:.0f} s")
            workloads = build_workloads(
                model.config.patch_size, config.workloads, tiny=config.scale == "tiny"
            )
            promised = config.runtime.precision == "auto"
            rows = [Row(w, count_flops(model.config, w.grids).total, promised) for w in workloads]
            result = ModelResult(model, _attention_label(encoder), rows, encoder.stats(), {})
            models.append(result)
            self._build_peers(Subject(tower, checkpoint, config.runtime), result)
            for row in rows:
                peers = [peer for peer in self.peers if peer.name != COMPILED]
                self._take_turns([Vitrt(encoder), *peers], row, tower, reference)
            for row in rows:
                self._extras(encoder, row)
            if any(peer.name == COMPILED for peer in self.peers):
                self._compiled(encoder, tower, reference, rows)

    def _build_peers(self, subject: Subject, result: ModelResult) -> None:
        for name in self.config.peers or ():
            try:
                peer = build_peer(name, subject)
            except UnavailableError as error:
                result.unavailable[name] = str(error)
            else:
                self.peers.append(peer)
                result.peers[name] = peer.label

    def _take_turns(
        self,
        contenders: Sequence[Contender],
        row: Row,
        tower: nn.Module,
        reference: nn.Module | None,
    ) -> None:
        """Contenders on one workload, vitrt first: A B C, A B C, ..."""
        inputs, grids = self._inputs(row.workload), row.workload.grids
        expected = None
        if reference is not None:
            expected = float32_reference(reference, inputs[0], grids)
            if self.dtype != torch.float32 and row.reference_errors is None:
                forward = Eager(tower, "sdpa").forward_for(grids)
                row.reference_errors = compare(forward(inputs[0]), expected)
        samples: dict[str, Samples] = {}
        for contender in contenders:
            with self._surviving(row, contender.name):
                samples[contender.name] = self._warm(contender, row, inputs, expected)
        start = time.monotonic()
        for _ in range(TURNS):
            for name, mine in samples.items():
                if name not in row.failures:
                    with self._surviving(row, name):
                        mine.take_turn(self.config.seconds / TURNS, single=row.workload.single)
        row.clocks = row.clocks or self.setting.clocks.since(start)
        self._record(row, {n: s for n, s in samples.items() if n not in row.failures})
        release(self.device)

    def _warm(
        self, contender: Contender, row: Row, inputs: Sequence[Tensor], expected: Output | None
    ) -> Samples:
        forward = contender.forward_for(row.workload.grids)
        if expected is not None and contender.same_tower:
            row.errors[contender.name] = compare(forward(inputs[0]), expected)
        chosen = getattr(contender, "chosen", {}).get(row.workload.grids)
        if chosen is not None:
            row.settings[contender.name] = chosen
        return Samples(forward, inputs, self.device)

    def _record(self, row: Row, samples: dict[str, Samples]) -> None:
        for name, mine in samples.items():
            timing = mine.timing()
            row.timings.setdefault(name, timing)  # of vitrt beside a compiled peer, the first one
            text = f"{row.workload.name} {name}: {timing.rate_ms:.3f} ms"
            if name != OURS and OURS in samples:
                row.ratios[name] = mine.ratio_to(samples[OURS])
                text += f" ({row.ratios[name].rate:.3f} of vitrt's)"
            text += f" +-{timing.spread:.1%} of {timing.calls}"
            self._say(f"{text}, {self.setting.clock.spent:.0f} s")

    def _compiled(
        self,
        encoder: VisionEncoder,
        tower: nn.Module,
        reference: nn.Module | None,
        rows: Sequence[Row],
    ) -> None:
        (contender,) = (peer for peer in self.peers if peer.name == COMPILED)
        longest = 0.0
        for row in rows:
            if self.setting.until - self.setting.clock.spent < longest:
                row.failures[COMPILED] = "left out: the time limit"
                continue
            start = time.monotonic()
            vitrt = [] if OURS in row.failures else [Vitrt(encoder)]
            self._take_turns([*vitrt, contender], row, tower, reference)
            row.compile_seconds = time.monotonic() - start
            longest = max(longest, row.compile_seconds)

    @contextlib.contextmanager
    def _surviving(self, row: Row, name: str) -> Iterator[None]:
        """Record in `row` what fails inside the block, so that the others keep their figures."""
        try:
            yield
        except UnavailableError as error:
            row.failures[name] = str(error)
        except Exception as error:
            logger.warning("%s on %s failed", name, row.workload.name, exc_info=True)
            row.failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            release(self.device)

    def _extras(self, encoder: VisionEncoder, row: Row) -> None:
        config, workload = self.config, row.workload
        if OURS in row.failures:
            return
        inputs = self._inputs(workload)
        if workload.single:
            row.plan_ms = _plan_ms(encoder, workload)
        if config.profile:
            with self._surviving(row, "profile"):
                forward = Vitrt(encoder).forward_for(workload.grids)
                row.profile = profile_call(forward, inputs, self.device)
        if config.memory and workload.name == MEMORY_WORKLOAD and self.device.type == "cuda":
            for contender in (Vitrt(encoder), *self.peers):
                if contender.name in row.timings:
                    with self._surviving(row, "memory"):
                        forward = contender.forward_for(workload.grids)
                        row.memory[contender.name] = _peak_bytes(forward, inputs[0])
        if config.ablate and workload.name in self._ablated():
            with self._surviving(row, "ablate"):
                row.ablations = ablate(encoder, workload, inputs, seconds=config.seconds / 2)
                self._say(f"{workload.name}: ablations")

    def _ablated(self) -> tuple[str, ...]:
        chosen = tuple(name for name in ABLATED if name in self.config.workloads)
        return chosen or self.config.workloads[:1]

    def _inputs(self, workload: Workload) -> list[Tensor]:
        """Sets of random pixels [T, P], of the range that normalised images have."""
        device = self.device
        generator = torch.Generator(device).manual_seed(workload.patches)
        shape = (workload.patches, self.model.config.patch_dim)
        return [
            torch.randn(shape, generator=generator, device=device).to(self.dtype)
            for _ in range(INPUT_SETS)
        ]

    def _say(self, text: str) -> None:
        self.setting.progress(f"{self.model.name} {text}")


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
