"""What a benchmark run found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from vitrt.bench.ablate import Ablation
from vitrt.bench.clocks import Clocks
from vitrt.bench.options import BenchConfig
from vitrt.bench.profiling import Profile
from vitrt.bench.timing import Ceilings, Ratio, Timing
from vitrt.bench.workloads import Workload
from vitrt.compare.errors import FLOAT32_BOUND, RATIO_BOUND, Errors
from vitrt.compare.reference import NamedModel
from vitrt.engine.eager_runner import RunnerStats


@dataclass(slots=True)
class Row:
    """One workload."""

    workload: Workload
    flops: int
    promised: bool = True  # whether errors have a bound; in fp8 they are only measured
    timings: dict[str, Timing] = field(default_factory=dict)  # by contender
    ratios: dict[str, Ratio] = field(default_factory=dict)  # of peers to vitrt beside them
    settings: dict[str, str] = field(default_factory=dict)  # of a peer that has several
    clocks: Clocks | None = None  # while the contenders took turns
    errors: dict[str, Errors] = field(default_factory=dict)  # against transformers in float32
    reference_errors: Errors | None = None  # transformers' own in a lower precision
    failures: dict[str, str] = field(default_factory=dict)
    compile_seconds: float | None = None
    plan_ms: float | None = None  # a warm plan() on the host
    profile: Profile | None = None
    ablations: list[Ablation] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)  # peak bytes beyond weights and inputs

    def tflops(self, milliseconds: float) -> float:
        """The rate at which the counted work was done."""
        return self.flops / milliseconds / 1e9

    @property
    def error_ratio(self) -> float | None:
        """The worst of vitrt's errors over transformers' own; None in float32."""
        ours, theirs = self.errors.get("vitrt"), self.reference_errors
        return None if ours is None or theirs is None else ours.ratio_to(theirs)

    @property
    def agrees(self) -> bool:
        """Whether vitrt's output is as close as promised; true where nobody looked."""
        ours, ratio = self.errors.get("vitrt"), self.error_ratio
        if ours is None:
            return True
        if not self.promised:
            return math.isfinite(ours.worst)
        return ours.worst <= FLOAT32_BOUND if ratio is None else ratio <= RATIO_BOUND


@dataclass(slots=True)
class ModelResult:
    named: NamedModel
    attention: str
    rows: list[Row]
    stats: RunnerStats
    peers: dict[str, str]  # what exactly the peers that ran are, by name
    unavailable: dict[str, str] = field(default_factory=dict)  # why the others cannot, by name


@dataclass(slots=True)
class BenchResult:
    config: BenchConfig
    device: torch.device
    dtype: torch.dtype
    ceilings: list[Ceilings] = field(default_factory=list)
    models: list[ModelResult] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False  # then it holds what was measured until then

    @property
    def passed(self) -> bool:
        """Whether vitrt ran every workload and agrees with the reference."""
        rows = [row for model in self.models for row in model.rows]
        return all("vitrt" not in row.failures and row.agrees for row in rows)

    @property
    def tflops(self) -> float:
        """The ceiling that shares refer to: the best product seen in this run."""
        return max(ceiling.tflops for ceiling in self.ceilings)
