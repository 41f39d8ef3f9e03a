"""One benchmark run: ceilings first and last, the models between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from vitrt.bench.contest import ModelBench, release
from vitrt.bench.options import PEER_NAMES, BenchConfig
from vitrt.bench.results import BenchResult
from vitrt.bench.timing import Clock, measure_ceilings
from vitrt.bench.workloads import build_workloads
from vitrt.compare.reference import resolve
from vitrt.engine.device import resolve_device, resolve_dtype


def run_bench(config: BenchConfig, progress: Callable[[str], None]) -> BenchResult:
    """The whole benchmark; `progress` is told one line about each measurement.

    KeyboardInterrupt ends it early; the result then holds what was measured.
    """
    clock, device = Clock(config.time_limit), resolve_device(config.device)
    result = BenchResult(config, device, resolve_dtype(config.dtype, device))
    config = _settled(config, device)
    sources = [resolve(model, tiny=bool(config.tiny)) for model in config.models]
    for source in sources:
        build_workloads(source.config.patch_size, config.workloads)  # a wrong name ends it here
    result.ceilings.append(measure_ceilings(device, result.dtype))
    try:
        for index, source in enumerate(sources):
            # Each model may spend its share of what is left.
            share = clock.spent + clock.left / (len(sources) - index)
            bench = ModelBench(config, source, device, result.dtype, clock, share, progress)
            bench.run(result.models)
            del bench
            release(device)
        result.ceilings.append(measure_ceilings(device, result.dtype))
    except KeyboardInterrupt:
        result.interrupted = True
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
