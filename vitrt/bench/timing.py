"""The one timer: marks in the device's queue, medians of warm calls, ceilings, the time limit."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise

import torch
from torch import Tensor

Call = Callable[[Tensor], object]

WARM_CALLS = 4  # lazily recorded graphs need a shape twice
MIN_CALLS, MAX_CALLS = 5, 200


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one contender on one workload; medians."""

    rate_ms: float  # between the ends of successive calls on the device, queued without a pause
    wall_ms: float | None  # one call at a time, from before it to after the device has finished
    host_ms: float | None  # until a call returns, the device idle when it starts
    spread: float  # half the distance between the quartiles of rate_ms, over its median
    calls: int


@dataclass(frozen=True, slots=True)
class Turn:
    """Medians of one turn, in milliseconds."""

    rate_ms: float
    wall_ms: float | None


@dataclass(frozen=True, slots=True)
class Ratio:
    """A contender's times over vitrt's, medians of turns that followed one another."""

    rate: float
    wall: float | None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Samples:
    """What has been measured of one contender on one workload, burst by burst."""

    def __init__(self, call: Call, inputs: Sequence[Tensor], device: torch.device) -> None:
        self.call, self.inputs, self.device = call, inputs, device
        self.rates: list[float] = []
        self.walls: list[float] = []
        self.hosts: list[float] = []
        self.turns: list[Turn] = []
        self.seconds = warm(call, inputs, device)  # of one call, roughly

    def burst(self, count: int) -> None:
        """`count` calls queued without a pause; one more before them fills the queue."""
        self.rates += rates(self.call, self.inputs, self.device, count + 1)[1:]

    def single_calls(self, count: int) -> None:
        """`count` calls, each of which finds the device idle."""
        walls, hosts = latencies(self.call, self.inputs, self.device, count)
        self.walls += walls
        self.hosts += hosts

    def take_turn(self, seconds: float, *, single: bool) -> None:
        """Calls for about `seconds`, where contenders take turns: a burst, and for a `single` image
        calls one by one.
        """
        count = max(1, min(MAX_CALLS // 4, int(seconds / self.seconds)))
        rates, walls = len(self.rates), len(self.walls)
        self.burst(count)
        if single:
            self.single_calls(count)
        wall = statistics.median(self.walls[walls:]) if single else None
        self.turns.append(Turn(statistics.median(self.rates[rates:]), wall))

    def ratio_to(self, other: Samples) -> Ratio:
        """How many times as long as the other's, turn by turn; medians."""
        pairs = list(zip(self.turns, other.turns, strict=False))  # one may have failed before
        walls = [a.wall_ms / b.wall_ms for a, b in pairs if a.wall_ms and b.wall_ms]
        rate = statistics.median(a.rate_ms / b.rate_ms for a, b in pairs)
        return Ratio(rate, statistics.median(walls) if walls else None)

    def timing(self) -> Timing:
        """Medians of what was measured. ValueError before the second call of a burst."""
        if len(self.rates) < 2:
            raise ValueError(f"a timing takes at least 2 calls, there were {len(self.rates)}")
        quartiles = statistics.quantiles(self.rates, n=4)
        median = statistics.median(self.rates)
        spread = (quartiles[2] - quartiles[0]) / 2 / median
        wall, host = (
            statistics.median(times) if times else None for times in (self.walls, self.hosts)
        )
        return Timing(median, wall, host, spread, len(self.rates))


def measure(
    call: Call,
    inputs: Sequence[Tensor],
    device: torch.device,
    *,
    seconds: float = 1.0,
    latency: bool = False,
) -> Timing:
    """Time `call` on `inputs` in turn, for about `seconds` after warming up."""
    samples = Samples(call, inputs, device)
    count = max(MIN_CALLS, min(MAX_CALLS, int(seconds / samples.seconds)))
    samples.burst(count)
    if latency:
        samples.single_calls(count)
    return samples.timing()


def warm(call: Call, inputs: Sequence[Tensor], device: torch.device) -> float:
    """Run `call` until it is warm; the seconds that the last run took."""
    elapsed = 0.0
    for pixels in islice(cycle(inputs), WARM_CALLS):
        synchronize(device)
        start = time.perf_counter()
        call(pixels)
        synchronize(device)
        elapsed = time.perf_counter() - start
    return max(elapsed, 1e-6)


Mark = float | torch.cuda.Event


def mark(device: torch.device) -> Mark:
    """A moment in the device's queue; on a CPU, now."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(marks: Sequence[Mark]) -> list[float]:
    """The time from each mark to the next, once the device has passed the last."""
    times = []
    for first, last in pairwise(marks):
        if isinstance(first, float):
            assert isinstance(last, float)
            times.append(1e3 * (last - first))
        else:
            assert not isinstance(last, float)
            last.synchronize()
            times.append(float(first.elapsed_time(last)))
    return times


def rates(call: Call, inputs: Sequence[Tensor], device: torch.device, count: int) -> list[float]:
    """Milliseconds between the ends of successive calls, queued without a pause."""
    synchronize(device)
    marks = [mark(device)]
    for pixels in islice(cycle(inputs), count):
        call(pixels)
        marks.append(mark(device))
    return milliseconds(marks)


def latencies(
    call: Call, inputs: Sequence[Tensor], device: torch.device, count: int
) -> tuple[list[float], list[float]]:
    """Milliseconds until the device has finished, and until the call returns, one at a time."""
    walls, hosts = [], []
    for pixels in islice(cycle(inputs), count):
        synchronize(device)
        start = time.perf_counter()
        call(pixels)
        returned = time.perf_counter()
        synchronize(device)
        hosts.append(1e3 * (returned - start))
        walls.append(1e3 * (time.perf_counter() - start))
    return walls, hosts


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine gives at best: no forward is faster than its counted work at these rates."""

    tflops: float  # a square matrix product in the benchmark's dtype
    copy_tb_s: float  # a large copy on the device, bytes read plus bytes written


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A product of 8192^3 and a copy of 2 GiB on a GPU; small ones on a CPU.

    Random values: zeros run faster than any real input.
    """
    side, nbytes = (8192, 2**31) if device.type == "cuda" else (512, 2**25)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    product = measure(lambda x: torch.mm(x, b), [a, a.clone()], device, seconds=0.3)
    source = torch.randn(nbytes // 4, device=device, generator=generator).view(torch.uint8)
    target = torch.empty_like(source)
    copy = measure(lambda x: target.copy_(x), [source], device, seconds=0.3)
    return Ceilings(
        tflops=2 * side**3 / product.rate_ms / 1e9, copy_tb_s=2 * source.nbytes / copy.rate_ms / 1e9
    )


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
