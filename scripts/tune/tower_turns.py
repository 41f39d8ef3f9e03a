"""A tower of random weights whose forward is changed, and the changes timed in turns.

What the programs beside this have in common. Shapes: T patches, P values of one patch.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitrt.bench.timing import Samples, Timing
from vitrt.bench.workloads import Workload, build_workloads
from vitrt.compare.errors import relative_error
from vitrt.compare.reference import find_model, shrink
from vitrt.config import RuntimeConfig, VisionConfig
from vitrt.engine.eager_runner import EagerRunner
from vitrt.engine.engine import attention_of
from vitrt.models.families import build_tower
from vitrt.models.packed_plan import PlanLayout, pack_plan, view_plan
from vitrt.models.tower import VisionTower

Change = Callable[[VisionTower], AbstractContextManager[Any]]  # of a forward, while it lasts
TURNS = 8
FEW_SEGMENTS = 8  # that every graph has room for
MOST_CHECKED = 12000  # patches: the reference holds a layer's values in float32


def config_named(model: str, *, tiny: bool, depth: int | None = None) -> VisionConfig:
    config = find_model(model, weights=False).config
    if tiny:
        return shrink(config)
    return config if depth is None else replace(config, depth=depth)


def random_tower(config: VisionConfig, device: torch.device, dtype: torch.dtype) -> VisionTower:
    """Activations near 1, and norms' weights as far apart as in trained towers."""
    tower = build_tower(config)
    generator = torch.Generator(device).manual_seed(0)

    def values(parameter: nn.Parameter) -> Tensor:
        found = torch.randn(parameter.shape, generator=generator, device=device)
        return (found / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else found).to(dtype)

    tower.allocate(values)
    for name, parameter in tower.named_parameters():
        if parameter.dim() == 1:
            parameter.mul_(0.1 if name.endswith("bias") else 0.5)
            if not name.endswith("bias"):
                parameter.exp_()
    return tower.eval()


def float32_copy(tower: VisionTower) -> VisionTower:
    copy = build_tower(tower.config)
    device = tower.block(0).norm1.weight.device
    copy.allocate(lambda meta: torch.empty(meta.shape, dtype=torch.float32, device=device))
    for name, parameter in tower.named_parameters():
        copy.get_parameter(name).copy_(parameter)
    return copy.eval()


class Batch:
    """One workload as a tower reads it, on the device."""

    def __init__(
        self,
        tower: VisionTower,
        workload: Workload,
        attention: str = "auto",
        bucket: int | None = None,
    ) -> None:
        """`bucket`: padded to so many patches, as the package records its graphs."""
        weight = tower.block(0).norm1.weight
        self.tower, self.workload = tower, workload
        self.device, self.dtype = weight.device, weight.dtype
        plan = tower.plan(workload.grids)
        choice = attention_of(tower, RuntimeConfig(attention=attention))
        self.runner = EagerRunner(tower, choice)
        chosen = self.runner.attention_for(plan)
        layout = PlanLayout.exact(plan)
        if bucket is not None:
            layout = PlanLayout.bucket(plan, bucket, max(FEW_SEGMENTS, layout.segments))
        layout = layout.scheduled(chosen.schedule)
        packed = pack_plan(plan, layout, origins=None, pinned=False, schedule=chosen.schedule).to(
            self.device
        )
        self.plan = view_plan(packed, layout, plan, padded=bucket is not None)
        self.choice = chosen.choice
        generator = torch.Generator(self.device).manual_seed(1)
        self.patches = torch.zeros(
            layout.patches, tower.config.patch_dim, dtype=self.dtype, device=self.device
        )
        values = self.patches[: plan.num_patches]
        values.copy_(torch.randn(values.shape, generator=generator, device=self.device))
        self.tokens = plan.num_patches // tower.config.merge_unit

    def forward(self) -> Tensor:
        """Embeddings, then the deepstack levels, in rows below each other."""
        out = self.runner.forward(self.patches, self.plan, self.choice)
        if out.deepstack is None:
            return out.embeddings[: self.tokens]
        levels = out.deepstack[:, : self.tokens].flatten(0, 1)
        return torch.cat([out.embeddings[: self.tokens], levels])

    def reference(self) -> Tensor | None:
        """The same in float32, by PyTorch's attention; None where that is too large."""
        if self.workload.patches > MOST_CHECKED:
            return None
        other = Batch(float32_copy(self.tower), self.workload, "sdpa")
        other.patches.copy_(self.patches[: len(other.patches)])
        return other.forward()


@dataclass(frozen=True)
class Result:
    timing: Timing
    ratio: float  # milliseconds of what runs today over this one's, turn by turn
    error: float | None  # against float32
    off: float  # against what runs today


def recorded(batch: Batch, change: AbstractContextManager[Any]) -> tuple[Callable[[], Tensor], Any]:
    """The forward with a change in it, as a graph where there is a GPU; and what keeps it alive."""
    with change:
        if batch.device.type != "cuda":
            raise AssertionError("a change lasts only while it is recorded")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                batch.forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = batch.forward()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay, graph


def take_turns(
    batch: Batch, changes: dict[str, Change], *, seconds: float = 1.0, single: bool = False
) -> dict[str, Result]:
    """Every change of the forward, A B C, A B C, ...; the first one is what runs today.

    Without a GPU each runs once: that shows what it computes, and its time is no measurement.
    """
    reference = batch.reference()
    calls: dict[str, Callable[[], Tensor]] = {}
    outs: dict[str, Tensor] = {}
    kept, once = [], {}
    for name, change in changes.items():
        if batch.device.type == "cuda":
            calls[name], graph = recorded(batch, change(batch.tower))
            kept.append(graph)
            outs[name] = calls[name]().clone()
        else:
            start = time.perf_counter()
            with change(batch.tower):
                outs[name] = batch.forward()
            once[name] = Timing(1e3 * (time.perf_counter() - start), None, None, 0.0, 1)
    samples = {
        name: Samples(lambda _, call=call: call(), [batch.patches], batch.device)  # type: ignore[misc]
        for name, call in calls.items()
    }
    for _ in range(TURNS):
        for sample in samples.values():
            sample.take_turn(seconds / TURNS, single=single)
    today = next(iter(changes))
    results = {}
    for name, out in outs.items():
        ratio = 1.0
        if name in samples:
            both = samples[today].ratio_to(samples[name])
            ratio = both.wall if single and both.wall is not None else both.rate
        results[name] = Result(
            samples[name].timing() if name in samples else once[name],
            ratio,
            None if reference is None else relative_error(out, reference),
            relative_error(out, outs[today].float()),
        )
    return results


def microseconds(step: Callable[[int], object], calls: int = 20) -> float:
    """The median time of `step(index)` inside a graph of many; without a GPU that of one."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        step(0)
        return 1e6 * (time.perf_counter() - began)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(0)
        step(1)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(calls):
            step(index)
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls * 1e3)
    return statistics.median(times[1:])


def workloads_of(config: VisionConfig, names: str, *, tiny: bool) -> list[Workload]:
    return build_workloads(config.patch_size, tuple(names.split(",")), tiny=tiny)
