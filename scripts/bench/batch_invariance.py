#!/usr/bin/env python3
"""batch_invariant=True at full size: that it holds, and what it costs.

    python scripts/bench/batch_invariance.py [--models qwen3-vl-8b,qwen2.5-vl-7b] [--json FILE]

Random images alone, in random batches, with graphs and without: the same bits. Then the benchmark's
workloads with it and without it in turns on one card. Exit code 1 where a bit differs.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from vitrt import VisionEncoder
from vitrt.bench.timing import Samples
from vitrt.bench.workloads import build_workloads
from vitrt.checkpoint.opened import Checkpoint, open_checkpoint
from vitrt.compare.reference import build_tower, find_model, save_checkpoint
from vitrt.config import Grid, RuntimeConfig

WORKLOADS = "1x560,1x1120x700,32x560,16x1120x700,1x4k,mixed16"
TURNS = 6


def load(checkpoint: Checkpoint, device: torch.device, **options: Any) -> VisionEncoder:
    """On a CPU, where there is no batch invariance, a rehearsal without it."""
    if device.type == "cpu":
        options = {}
    return VisionEncoder.from_checkpoint(checkpoint, RuntimeConfig(device=device.type, **options))


def features(encoder: VisionEncoder, pixels: list[Tensor], grids: list[Grid]) -> list[Tensor]:
    """[tokens, O * (1 + levels)] of every image, from one batch."""
    out = encoder(torch.cat(pixels), torch.tensor(grids))
    levels = () if out.deepstack is None else out.deepstack.unbind(0)
    joined = torch.cat([out.embeddings, *levels], dim=1)
    unit = encoder.config.merge_unit
    return [each.clone() for each in joined.split([t * h * w // unit for t, h, w in grids])]


def differing(
    checkpoint: Checkpoint, device: torch.device, images: int, largest: int
) -> tuple[int, int]:
    """(images whose bits ever differed, batches that were run)."""
    draw = random.Random(0)
    grids = [(1, 2 * draw.randint(2, largest), 2 * draw.randint(2, largest)) for _ in range(images)]
    expected: list[Tensor] | None = None
    wrong: set[int] = set()
    batches = 0
    for graphs in (False, True) if device.type == "cuda" else (False,):
        encoder = load(checkpoint, device, batch_invariant=True, cuda_graphs=graphs)
        generator = torch.Generator(device).manual_seed(0)
        pixels = [
            torch.randn(h * w, encoder.config.patch_dim, generator=generator, device=device).to(
                encoder.dtype
            )
            for _, h, w in grids
        ]
        alone = [features(encoder, [x], [grid])[0] for x, grid in zip(pixels, grids, strict=True)]
        expected = expected or alone
        wrong |= {i for i in range(images) if not torch.equal(alone[i], expected[i])}
        for _ in range(3):
            left = draw.sample(range(images), images)
            while left:
                taken = [left.pop() for _ in range(min(draw.randint(1, 24), len(left)))]
                found = features(encoder, [pixels[i] for i in taken], [grids[i] for i in taken])
                batches += 1
                wrong |= {
                    i
                    for i, each in zip(taken, found, strict=True)
                    if not torch.equal(each, expected[i])
                }
        del encoder
    return len(wrong), batches


def call(encoder: VisionEncoder, grids: Tensor, pixels: Tensor) -> object:
    return encoder(pixels, grids)


def costs(
    checkpoint: Checkpoint, device: torch.device, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Per workload: milliseconds with and without it, and their ratio turn by turn."""
    encoders = [load(checkpoint, device, batch_invariant=on) for on in (False, True)]
    rows = []
    names = tuple(arguments.workloads.split(","))
    for workload in build_workloads(encoders[0].config.patch_size, names, tiny=arguments.tiny):
        grids = torch.tensor(workload.grids)
        shape = workload.patches, encoders[0].config.patch_dim
        pixels = [torch.randn(shape, device=device).to(encoders[0].dtype) for _ in range(2)]
        both = [Samples(partial(call, each, grids), pixels, device) for each in encoders]
        for _ in range(TURNS):
            for sample in both:
                sample.take_turn(arguments.seconds / TURNS, single=workload.single)
        without, fixed = (sample.timing() for sample in both)
        found = both[1].ratio_to(both[0])
        ratio = found.rate if found.wall is None else found.wall
        rows.append(
            {
                "workload": workload.name,
                "ms": without.wall_ms or without.rate_ms,
                "invariant_ms": fixed.wall_ms or fixed.rate_ms,
                "cost": ratio - 1,
            }
        )
        print(
            f"  {workload.name:12} {rows[-1]['ms']:8.2f} ms, batch-invariant "
            f"{rows[-1]['invariant_ms']:8.2f}, {ratio - 1:+.1%}",
            flush=True,
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="qwen3-vl-8b,qwen2.5-vl-7b")
    parser.add_argument("--workloads", default=WORKLOADS)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each way on a workload")
    parser.add_argument("--tiny", action="store_true", help="small towers, on a CPU: a rehearsal")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.tiny else "cuda")
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    found = []
    with torch.inference_mode():
        for model in arguments.models.split(","):
            named = find_model(model, tiny=arguments.tiny)
            with tempfile.TemporaryDirectory() as folder:
                tower = build_tower(named, device=device, dtype=dtype)
                checkpoint = open_checkpoint(save_checkpoint(tower, named, Path(folder)))
                del tower
                largest = 4 if arguments.tiny else 25
                wrong, batches = differing(checkpoint, device, arguments.images, largest)
                print(
                    f"{model}: {wrong} of {arguments.images} images ever differed, alone and in "
                    f"{batches} batches",
                    flush=True,
                )
                rows = costs(checkpoint, device, arguments)
            mean = statistics.geometric_mean(1 + row["cost"] for row in rows) - 1
            print(f"  in the mean {mean:+.1%}", flush=True)
            found.append(
                {
                    "model": model,
                    "images": arguments.images,
                    "batches": batches,
                    "differing": wrong,
                    "mean_cost": mean,
                    "rows": rows,
                }
            )
    if arguments.json is not None:
        where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        arguments.json.write_text(json.dumps({"device": where, "models": found}, indent=1) + "\n")
    on_gpu = device.type == "cuda"  # a CPU chooses kernels by the rows, and promises nothing
    return int(on_gpu and any(each["differing"] for each in found))


if __name__ == "__main__":
    sys.exit(main())
