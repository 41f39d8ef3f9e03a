"""What a step takes inside a CUDA graph of many, for the programs beside this."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def graph_of(step: Callable[[int], object], calls: int, pool: Any = None) -> torch.cuda.CUDAGraph:
    """step(0), step(1), ... as one graph; two of them run before, which compiles what they need."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(0)
        step(1)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        for index in range(calls):
            step(index)
    return graph


def microseconds(step: Callable[[int], object], calls: int = 20) -> float:
    """The median time of `step(index)` inside a graph of many; without a GPU that of one."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        step(0)
        return 1e6 * (time.perf_counter() - began)
    graph = graph_of(step, calls)
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls * 1e3)
    return statistics.median(times[1:])
