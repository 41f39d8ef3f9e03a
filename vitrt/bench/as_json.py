"""Everything that a benchmark run measured, in plain types."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import torch

from vitrt.bench.results import BenchResult, ModelResult, Row
from vitrt.engine.device import dtype_name
from vitrt.engine.eager_runner import RunnerStats
from vitrt.models.config_file import write_vision_config


def machine(device: torch.device) -> dict[str, str]:
    """What the figures were taken on."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
    else:
        found["device"] = platform.processor() or platform.machine()
    for name in ("transformers", "triton"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            found[name] = "not installed"
    return found


def to_json(result: BenchResult) -> dict[str, Any]:
    """Everything that was measured, in plain types."""
    config = result.config
    options = {
        "attention": config.runtime.attention,
        "cuda_graphs": config.runtime.cuda_graphs,
        "precision": config.runtime.precision,
        "tiny": config.scale == "tiny",
        "seconds": config.seconds,
        "time_limit": config.time_limit,
    }
    return {
        "format": "vitrt.bench.v2",
        "machine": machine(result.device),
        "dtype": dtype_name(result.dtype),
        "options": options,
        "ceilings": [asdict(ceiling) for ceiling in result.ceilings],
        "ceiling_tflops": result.tflops,
        "seconds": result.seconds,
        "interrupted": result.interrupted,
        "models": [_model_json(model, result.tflops) for model in result.models],
    }


def _model_json(model: ModelResult, ceiling: float) -> dict[str, Any]:
    return {
        "model": model.named.name,
        "model_type": model.named.config.model_type,
        "vision_config": write_vision_config(model.named.config),
        "random_weights": model.named.checkpoint is None,
        "attention": model.attention,
        "peers": model.peers,
        "unavailable": model.unavailable,
        "runner": _stats_json(model.stats),
        "workloads": [_row_json(row, ceiling) for row in model.rows],
    }


def _row_json(row: Row, ceiling: float) -> dict[str, Any]:
    timings = {}
    for name, timing in row.timings.items():
        timings[name] = asdict(timing) | {
            "tflops": row.tflops(timing.rate_ms),
            "share": row.tflops(timing.rate_ms) / ceiling,
        }
        if timing.wall_ms is not None:
            timings[name]["wall_share"] = row.tflops(timing.wall_ms) / ceiling
    for name, ratio in row.ratios.items():
        timings[name]["over_vitrt"] = asdict(ratio)
    return {
        "workload": row.workload.name,
        "grids": row.workload.grids,
        "patches": row.workload.patches,
        "flops": row.flops,
        "timings": timings,
        "errors": {name: asdict(errors) for name, errors in row.errors.items()},
        "reference_errors": None if row.reference_errors is None else asdict(row.reference_errors),
        "error_ratio": row.error_ratio,
        "agrees": row.agrees,
        "failures": row.failures,
        "settings": row.settings,
        "clocks": None if row.clocks is None else asdict(row.clocks),
        "compile_seconds": row.compile_seconds,
        "plan_ms": row.plan_ms,
        "profile": None if row.profile is None else asdict(row.profile),
        "ablations": [asdict(a) | {"ratio": a.ratio} for a in row.ablations],
        "peak_bytes": row.memory,
    }


def _stats_json(stats: RunnerStats) -> dict[str, Any]:
    return {
        "replays": dict(stats.hits),
        "eager": dict(stats.eager),
        "captures": stats.captures,
        "evictions": stats.evictions,
        "padding_share": stats.padding_share,
        "graph_bytes": stats.graph_bytes,
    }
