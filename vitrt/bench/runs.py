"""One benchmark run: ceilings first and last, the models between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from vitrt.bench.clocks import ClockSampler, reader_for
from vitrt.bench.model_bench import ModelBench, Setting, release
from vitrt.bench.options import PEER_NAMES, BenchConfig
from vitrt.bench.results import BenchResult
from vitrt.bench.timing import Clock, measure_ceilings
from vitrt.bench.workloads import build_workloads
from vitrt.compare.reference import find_model
from vitrt.engine.device import resolve_device, resolve_dtype


def run_bench(config: BenchConfig, progress: Callable[[str], None]) -> BenchResult:
    """The whole benchmark; `progress` is told one line about each measurement.

    KeyboardInterrupt ends it early; the result then holds what was measured.
    """
    clock, device = Clock(config.time_limit), resolve_device(config.runtime.device)
    result = BenchResult(config, device, resolve_dtype(config.runtime.dtype, device))
    config = _settled(config, device)
    found = [find_model(model, tiny=config.scale == "tiny") for model in config.models]
    for model in found:
        build_workloads(model.config.patch_size, config.workloads)  # a wrong name ends it here
    result.ceilings.append(measure_ceilings(device, result.dtype))
    try:
        with ClockSampler(reader_for(device)) as clocks:
            for index, model in enumerate(found):
                # Each model may spend its share of what is left.
                share = clock.spent + clock.left / (len(found) - index)
                setting = Setting(config, device, result.dtype, clock, share, clocks, progress)
                ModelBench(setting, model).run(result.models)
                release(device)
        result.ceilings.append(measure_ceilings(device, result.dtype))
    except KeyboardInterrupt:
        result.interrupted = True
    result.seconds = clock.spent
    return result


def _settled(config: BenchConfig, device: torch.device) -> BenchConfig:
    """The choices that were left open, made for the device."""
    cuda = device.type == "cuda"
    peers = PEER_NAMES if cuda else ("sdpa",)
    return replace(
        config,
        peers=peers if config.peers is None else config.peers,
        scale=("full" if cuda else "tiny") if config.scale == "auto" else config.scale,
    )
