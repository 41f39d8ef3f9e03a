#!/usr/bin/env python3
"""Every attention backend that can run here on full attention, and what "auto" makes of it.

    python scripts/bench/attention_backends.py --json attention.json

Backends take turns on the same inputs, replayed from CUDA graphs, so that a clock that drifts
drifts for all; figures are medians of the turns. "auto" gets the segments as the encoder would give
them to it, with a schedule where the backend it takes makes one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from vitrt.attention import AttentionChoice, get_backend, resolve_attention, usable
from vitrt.attention.base import AttentionBackend, SchedulingBackend
from vitrt.bench.timing import mark, milliseconds
from vitrt.kernels.flash_attention import flash_attention_ref
from vitrt.kernels.segments import Rotary, ScheduleTensors, Segments, tile_list

CUDA = torch.device("cuda")
HEADS = 16
SHAPES = {
    "1x1296": (1296,),
    "32x1296": (1296,) * 32,
    "1x3080": (3080,),
    "16x3080": (3080,) * 16,
    "1x16384": (16384,),
    "mixed16": tuple((2 * (8 + i)) * (2 * (20 - i)) for i in range(16)),
}
TURNS = 15
TURN_MS = 2.0  # a turn repeats its calls for about as long
BOUND = 4e-3  # relative L2 error of bf16 attention


@dataclass
class Turn:
    """One backend's calls as a graph, and the milliseconds it took each time."""

    replay: Callable[[], None]
    calls: int
    reads: tuple[object, ...]  # what the graph reads: it does not keep its memory
    times: list[float] = field(default_factory=list)

    def take(self) -> None:
        start = mark(CUDA)
        self.replay()
        self.times.append(milliseconds([start, mark(CUDA)])[0] / self.calls)

    @property
    def ms(self) -> float:
        return statistics.median(self.times)


def on_gpu(values: object) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.int32), device="cuda")


def segments_for(backend: AttentionBackend, lengths: Sequence[int], *, scheduled: bool) -> Segments:
    """Segments of these lengths as a plan packs them."""
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tiles = tile_list(bounds)
    segments = Segments(
        cu_seqlens=on_gpu(bounds),
        count=on_gpu([len(lengths)]),
        tiles=on_gpu(tiles),
        tile_count=on_gpu([len(tiles)]),
        lengths=tuple(lengths),
        max_seqlen=max(lengths),
    )
    if not scheduled or not isinstance(backend, SchedulingBackend):
        return segments
    schedule = backend.schedule(lengths, HEADS)
    if schedule is None:
        return segments
    on_device = ScheduleTensors(on_gpu(schedule.work), on_gpu(schedule.per_segment))
    return replace(segments, schedule=on_device)


def inputs(tokens: int, head_dim: int) -> list[Tensor]:
    """Several batches, so that none of them stays in a cache between calls."""
    count = max(2, min(6, (256 << 20) // (tokens * 3 * HEADS * head_dim * 2)))
    shape = (tokens, 3, HEADS, head_dim)
    return [torch.randn(shape, device="cuda").bfloat16() for _ in range(count)]


def prepare(backend: AttentionBackend, batches: Sequence[Tensor], segments: Segments) -> Turn:
    rotary = Rotary(*(torch.empty(0, device="cuda"),) * 3)  # q and k arrive rotated

    def once(batch: Tensor) -> None:
        backend(batch, segments, rotary)  # into memory of its own: torch's varlen would copy

    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for batch in batches:
            once(batch)
        start = mark(CUDA)
        once(batches[0])
        calls = max(1, min(40, round(TURN_MS / milliseconds([start, mark(CUDA)])[0])))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in range(calls):
                once(batches[call % len(batches)])
    torch.cuda.synchronize()
    return Turn(graph.replay, calls, (batches, segments, rotary))


def error(backend: AttentionBackend, batch: Tensor, segments: Segments) -> float:
    rotary = Rotary(*(torch.empty(0, device="cuda"),) * 3)
    expected = torch.empty(len(batch), batch[0, 0].numel(), device="cuda")
    flash_attention_ref(batch, segments, expected)
    out = torch.full_like(expected, torch.nan, dtype=batch.dtype)
    backend(batch, segments, rotary, out)
    return float((out.float() - expected).norm() / expected.norm())


def bench(head_dim: int, name: str, lengths: Sequence[int]) -> dict[str, Any]:
    where = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "head_dim": head_dim}
    names = [n for n, reason in usable(**where) if reason is None and n != "window"]
    choice: AttentionChoice = resolve_attention("auto", **where)
    auto = choice.for_batch(lengths, HEADS).choice.full
    backends = {n: get_backend(n, **where) for n in names} | {"auto": auto}
    batches = inputs(sum(lengths), head_dim)
    flops = 4 * HEADS * head_dim * sum(n * n for n in lengths)
    row: dict[str, Any] = {"head_dim": head_dim, "shape": name, "auto_takes": auto.name}
    turns: dict[str, Turn] = {}
    errors: dict[str, float] = {}
    for backend_name, backend in backends.items():
        segments = segments_for(backend, lengths, scheduled=backend_name == "auto")
        turns[backend_name] = prepare(backend, batches, segments)
        errors[backend_name] = error(backend, batches[0], segments)
        if backend_name == "auto":
            schedule = segments.schedule
            kept = sum(lengths) if schedule is None else int(schedule.per_segment.sum())
            row["tail_rows"] = sum(lengths) - kept
    for number in range(TURNS):
        order = list(turns.values())
        for turn in order if number % 2 else reversed(order):
            turn.take()
    row["milliseconds"] = {n: turn.ms for n, turn in turns.items()}
    row["tflops"] = {n: flops / turn.ms / 1e9 for n, turn in turns.items()}
    row["errors"] = errors
    best = min(turns[n].ms for n in names)
    row["auto_over_best"] = turns["auto"].ms / best
    if "triton" in turns and "sdpa" in turns:
        row["triton_over_varlen"] = turns["sdpa"].ms / turns["triton"].ms
    return row


def show(row: dict[str, Any]) -> None:
    figures = "  ".join(f"{n} {value:5.0f}" for n, value in row["tflops"].items())
    wrong = [n for n, value in row["errors"].items() if not value < BOUND]
    tail = f", {row['tail_rows']} rows in the tail" if row["tail_rows"] else ""
    print(
        f"{row['head_dim']:3} {row['shape']:8} {figures}   auto takes {row['auto_takes']}{tail}: "
        f"{row['auto_over_best']:.3f} of the best's time; triton over torch's varlen "
        f"{row.get('triton_over_varlen', float('nan')):.2f}x"
        + (f"  WRONG: {', '.join(wrong)}" if wrong else ""),
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dims", type=int, nargs="*", default=[72, 80])
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("attention is timed on a CUDA device, and there is none")
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}; TFLOP/s, {HEADS} heads, bf16")
    rows = []
    for head_dim in args.head_dims:
        for shape in args.shapes:
            rows.append(bench(head_dim, shape, SHAPES[shape]))
            show(rows[-1])
            torch.cuda.empty_cache()
    if args.json is not None:
        found = {"device": device, "torch": torch.__version__, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if any(not e < BOUND for row in rows for e in row["errors"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
