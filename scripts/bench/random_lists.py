#!/usr/bin/env python3
"""The rate of lists of images that no table was measured on, beside the benchmark's own lists.

    python scripts/bench/random_lists.py [--models qwen3-vl-8b,qwen2.5-vl-7b] [--json FILE]

Every list has images of random sizes, and as many of them as fill a random number of patches. A
share is of the product ceiling of the same run. The benchmark's lists are timed again after every
ten random ones, so that a card that grows hot slows both.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from vitrt import VisionEncoder
from vitrt.bench.timing import measure, measure_ceilings
from vitrt.bench.workloads import Workload, build_workloads
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.compare.reference import build_tower, find_model, save_checkpoint
from vitrt.config import Grid, RuntimeConfig
from vitrt.models.work import count_flops

OWN = ("32x560", "16x1120x700", "mixed16")
EVERY = 10  # random lists between two turns of the benchmark's


def random_list(draw: random.Random, index: int, *, tiny: bool) -> Workload:
    """Images of 4 to 64 tokens a side, 2^12 to 2^15.6 patches in all."""
    patches = round(2 ** draw.uniform(12.0, 15.6)) if not tiny else 256
    longest = 64 if not tiny else 4
    grids: list[Grid] = []
    while not grids or sum(h * w for _, h, w in grids) < patches:
        size = 2 ** draw.uniform(2.0, 6.0 if not tiny else 2.0)
        shape = 2 ** draw.uniform(-0.5, 0.5)  # height over width, its root
        sides = (min(max(round(size * each), 2), longest) for each in (shape, 1 / shape))
        h, w = sides
        grids.append((1, 2 * h, 2 * w))
    return Workload(f"random {index}", tuple(grids))


def share(
    encoder: VisionEncoder, workload: Workload, tflops: float, seconds: float
) -> dict[str, Any]:
    shape = workload.patches, encoder.config.patch_dim
    pixels = torch.randn(shape, device=encoder.device).to(encoder.dtype)
    grids = torch.tensor(workload.grids)
    timing = measure(lambda x: encoder(x, grids), [pixels], encoder.device, seconds=seconds)
    rate = count_flops(encoder.config, workload.grids).total / timing.rate_ms / 1e9
    return {
        "name": workload.name,
        "images": len(workload.grids),
        "patches": workload.patches,
        "largest": max(h * w for _, h, w in workload.grids),
        "ms": timing.rate_ms,
        "tflops": rate,
        "share": rate / tflops,
    }


def run(model: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    named = find_model(model, tiny=arguments.tiny)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tflops = measure_ceilings(device, dtype).tflops
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        tower = build_tower(named, device=device, dtype=dtype)
        checkpoint = open_checkpoint(save_checkpoint(tower, named, Path(folder)))
        del tower
        encoder = VisionEncoder.from_checkpoint(checkpoint, RuntimeConfig(device=device.type))
    own = build_workloads(named.config.patch_size, OWN, tiny=arguments.tiny)
    rows, ours = [], []
    for index in range(arguments.lists):
        if index % EVERY == 0:
            ours += [share(encoder, each, tflops, arguments.seconds) for each in own]
        workload = random_list(draw, index, tiny=arguments.tiny)
        rows.append(share(encoder, workload, tflops, arguments.seconds))
    means = [statistics.mean(row["share"] for row in found) for found in (rows, ours)]
    worst = min(rows, key=lambda row: row["share"])
    print(
        f"{model}: {len(rows)} random lists at {means[0]:.1%} of {tflops:.0f} TFLOP/s, the "
        f"benchmark's at {means[1]:.1%}: {means[0] / means[1]:.3f}; worst {worst['share']:.1%} "
        f"({worst['images']} images, {worst['patches']} patches)",
        flush=True,
    )
    return {
        "model": model,
        "ceiling_tflops": tflops,
        "random_over_own": means[0] / means[1],
        "random": rows,
        "own": ours,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="qwen3-vl-8b,qwen2.5-vl-7b")
    parser.add_argument("--lists", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing each list")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="small towers, on a CPU: a rehearsal")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.tiny else "cuda")
    with torch.inference_mode():
        found = []
        for model in arguments.models.split(","):
            found.append(run(model, arguments, device))
            if arguments.json is not None:  # after each: a run may end before the last one does
                where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
                content = {"device": where, "models": found}
                arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
