"""The benchmark's tables."""

from __future__ import annotations

import math
from collections.abc import Iterator

from vitrt.bench.ablate import Ablation
from vitrt.bench.as_json import machine
from vitrt.bench.options import PEER_NAMES
from vitrt.bench.profiling import GROUP_NAMES, Profile
from vitrt.bench.results import BenchResult, ModelResult, Row
from vitrt.bench.timing import Timing
from vitrt.engine.device import dtype_name

TOP_KERNELS = 8


def to_text(result: BenchResult) -> str:
    """The tables, short enough for a terminal."""
    return "\n".join(_lines(result))


def _lines(result: BenchResult) -> Iterator[str]:
    found = machine(result.device)
    for model in result.models:
        yield from _extra_lines(model)
    yield ""
    yield (
        ", ".join(f"{key} {value}" for key, value in found.items())
        + f", {dtype_name(result.dtype)}"
    )
    products = " / ".join(f"{ceiling.tflops:.4g}" for ceiling in result.ceilings)
    copies = " / ".join(f"{ceiling.copy_tb_s:.3g}" for ceiling in result.ceilings)
    yield f"ceilings before / after: product {products} TFLOP/s, copy {copies} TB/s"
    for model in result.models:
        yield ""
        yield from _model_lines(model, result.tflops)
    yield f"took {result.seconds:.0f} s" + (", interrupted" if result.interrupted else "")


def _model_lines(model: ModelResult, ceiling: float) -> Iterator[str]:
    weights = "random weights" if model.named.checkpoint is None else "its own weights"
    yield f"{model.named.name} ({weights}); {model.attention}"
    peers = [p for p in PEER_NAMES if p in model.peers]
    yield (
        f"{'workload':<17}"
        + "".join(f"{'/ ' + peer:>10}" for peer in peers)
        + f"{'vitrt ms':>10}{'TFLOP/s':>9}{'share':>8}"
        + "".join(f"{peer + ' ms':>12}" for peer in peers)
        + f"{'error':>10}{'/ ref':>7}"
        + (f"{'MHz':>6}{'W':>5}" if any(row.clocks for row in model.rows) else "")
    )
    for row in model.rows:
        yield _row_line(row, peers, ceiling, wall=False)
        if row.workload.single:
            yield _row_line(row, peers, ceiling, wall=True)
    yield from _peer_lines(model)
    yield from _host_lines(model)
    for name, reason in model.unavailable.items():
        yield f"not run: {name}: {reason}"
    reasons: dict[str, list[str]] = {}
    for row in model.rows:
        for name, reason in row.failures.items():
            reasons.setdefault(f"{name}: {reason}", []).append(row.workload.name)
    for reason, names in reasons.items():
        yield f"failed on {', '.join(names)}: {reason}"


def _peer_lines(model: ModelResult) -> Iterator[str]:
    for name, label in model.peers.items():
        ratios = [ratio for row in model.rows if (ratio := _judged(row, name)) is not None]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            yield (
                f"{name}: {label}; vitrt is {min(ratios):.2f}x to {max(ratios):.2f}x as fast,"
                f" geometric mean {mean:.2f}x of {len(ratios)} workloads"
            )
        errors = [row.errors[name].worst for row in model.rows if name in row.errors]
        if errors:
            yield f"  error against float32 {min(errors):.2e} to {max(errors):.2e}"
        settings: dict[str, list[str]] = {}
        for row in model.rows:
            if name in row.settings:
                settings.setdefault(row.settings[name], []).append(row.workload.name)
        for setting, names in settings.items():
            yield f"  {setting}: {', '.join(names)}"


def _judged(row: Row, peer: str) -> float | None:
    """A peer's time over vitrt's: by the wall for one image, by the device for lists."""
    ratio = row.ratios.get(peer)
    return None if ratio is None else ratio.rate if ratio.wall is None else ratio.wall


def _row_line(row: Row, peers: list[str], ceiling: float, *, wall: bool) -> str:
    def milliseconds(name: str) -> float | None:
        timing: Timing | None = row.timings.get(name)
        return None if timing is None else timing.wall_ms if wall else timing.rate_ms

    ours = milliseconds("vitrt")
    line = f"{row.workload.name + (' wall' if wall else ''):<17}"
    for name in peers:
        ratio = row.ratios.get(name)
        times = None if ratio is None else ratio.wall if wall else ratio.rate
        line += f"{_missing(row, name):>10}" if times is None else f"{times:>9.2f}x"
    if ours is None:
        line += f"{_missing(row, 'vitrt'):>10}{'-':>9}{'-':>8}"
    else:
        tflops = row.tflops(ours)
        line += f"{ours:>10.4g}{tflops:>9.4g}{tflops / ceiling:>8.1%}"
    for name in peers:
        theirs = milliseconds(name)
        line += f"{'-' if theirs is None else format(theirs, '.4g'):>12}"
    if wall:
        return line
    error, ratio_to_reference = row.errors.get("vitrt"), row.error_ratio
    line += f"{'' if error is None else format(error.embeddings, '.2e'):>10}"
    line += f"{'' if ratio_to_reference is None else format(ratio_to_reference, '.3f'):>7}"
    if row.clocks is not None:
        line += f"{row.clocks.sm_mhz:>6.0f}{row.clocks.watts:>5.0f}"
    return line.rstrip() if row.agrees else line + "  DISAGREES"


def _missing(row: Row, name: str) -> str:
    return "failed" if name in row.failures else "-"


def _host_lines(model: ModelResult) -> Iterator[str]:
    for row in model.rows:
        timing = row.timings.get("vitrt")
        if row.plan_ms is not None and timing is not None and timing.host_ms is not None:
            yield (
                f"{row.workload.name}: host time a call {timing.host_ms:.3f} ms,"
                f" of it the cached plan {row.plan_ms:.4f} ms"
            )
        for name, peak in row.memory.items():
            yield f"{row.workload.name}: {name} peak beyond weights {peak / 2**20:.0f} MiB"
    stats = model.stats
    if stats.hits.total():
        yield (
            f"graphs: {stats.captures} recorded in {stats.graph_bytes / 2**20:.0f} MiB,"
            f" {stats.hits.total()} replays, {stats.padding_share:.1%} padding;"
            f" eager: {dict(stats.eager)}"
        )


def _extra_lines(model: ModelResult) -> Iterator[str]:
    for row in model.rows:
        title = f"{model.named.name} {row.workload.name}"
        if row.profile is not None:
            yield from _profile_lines(title, row.profile)
        if row.ablations:
            yield f"\n{title}: without / with"
            yield from map(_ablation_line, row.ablations)


def _ablation_line(row: Ablation) -> str:
    label = f"  {row.part} -> {row.without}"
    if row.ratio is None:
        return f"{label:<50} cannot run: {row.reason[:120]}"
    return f"{label:<50}{row.without_ms:>9.4g} / {row.with_ms:.4g} ms = {row.ratio:.2f}x"


def _profile_lines(title: str, profile: Profile) -> Iterator[str]:
    yield f"\n{title}: {profile.total_ms:.4g} ms a forward by kernel group"
    shares = [(name, profile.groups[name]) for name in GROUP_NAMES if profile.groups[name] > 0]
    yield "  " + "  ".join(f"{n} {ms:.3g} ({ms / profile.total_ms:.0%})" for n, ms in shares)
    for kernel in profile.kernels[:TOP_KERNELS]:
        yield f"  {kernel.ms:>8.3f} ms {kernel.calls:>5.0f}x {kernel.group:<16} {kernel.name[:90]}"
