#!/usr/bin/env python3
"""CUDA graphs at work: what recording costs, where replays win, and 500 random images.

    python scripts/bench/cuda_graphs.py qwen3-vl-8b --json graphs.json

Three tables: recording every bucket (seconds, memory); milliseconds of an eager forward and of a
replay by number of patches, which is where `AUTO_MAX_PATCHES` of vitrt/engine/buckets.py comes
from; and a soak: random images of 50 to 4000 pixels a side in random batches, static buffers full
of NaN before every call, each output compared with an eager forward's.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from vitrt import VisionEncoder  # noqa: E402
from vitrt.bench.timing import Samples  # noqa: E402
from vitrt.compare.reference import build_tower, find_model, save_checkpoint  # noqa: E402
from vitrt.engine.graph_runner import GraphRunner  # noqa: E402
from vitrt.images.resize import smart_resize  # noqa: E402

Grid = tuple[int, int, int]
SIZES = (64, 256, 576, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 11264, 14336)


def wall_ms(encoder: VisionEncoder, grids: list[Grid], values: torch.Tensor) -> float:
    """Median of one call at a time, by the clock on the wall."""
    samples = Samples(lambda pixels: encoder(pixels, grids), [values], encoder.device)
    samples.single_calls(20)
    return statistics.median(samples.walls)


def pixels(encoder: VisionEncoder, grids: list[Grid]) -> torch.Tensor:
    patches = sum(t * h * w for t, h, w in grids)
    shape = (patches, encoder.config.patch_dim)
    return torch.randn(shape, device=encoder.device, dtype=encoder.dtype)


def record_all(encoder: VisionEncoder) -> dict[str, float]:
    before = torch.cuda.mem_get_info()[0]
    started = time.perf_counter()
    encoder.warmup()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    mib = (before - torch.cuda.mem_get_info()[0]) / 2**20
    result = {"graphs": encoder.stats().captures, "seconds": seconds, "mib": mib}
    print(f"recorded {result['graphs']} graphs in {seconds:.1f} s, {mib:.0f} MiB", flush=True)
    return result


def crossover(graphs: VisionEncoder, eager: VisionEncoder) -> list[dict[str, float]]:
    print("patches   eager ms   graph ms   eager / graph")
    rows = []
    for patches in SIZES:
        rows_of_patches = 32 if patches % 64 == 0 and patches >= 1024 else 8
        grids = [(1, rows_of_patches, patches // rows_of_patches)]
        values = pixels(graphs, grids)
        slow = wall_ms(eager, grids, values)
        fast = wall_ms(graphs, grids, values)
        rows.append({"patches": patches, "eager_ms": slow, "graph_ms": fast})
        print(f"{patches:7} {slow:10.3f} {fast:10.3f} {slow / fast:10.2f}", flush=True)
    return rows


def random_grid(encoder: VisionEncoder, rng: random.Random) -> Grid:
    while True:
        height, width = (round(50 * 80 ** rng.random()) for _ in range(2))
        if max(height, width) < 200 * min(height, width):
            break
    processor = encoder.processor
    size = smart_resize(
        height,
        width,
        factor=processor.factor,
        min_pixels=processor.min_pixels,
        max_pixels=processor.max_pixels,
    )
    patch = encoder.config.patch_size
    return (rng.choice((1, 1, 1, 1, 1, 1, 1, 3)), size[0] // patch, size[1] // patch)


def soak(graphs: VisionEncoder, eager: VisionEncoder, images: int) -> dict[str, Any]:
    """Every output of random batches against eager's."""
    rng = random.Random(0)
    runner = graphs.engine.runner
    assert isinstance(runner, GraphRunner)
    captures = runner.stats.captures
    worst, equal, batches, left = 0.0, 0, 0, images
    while left:
        count = min(left, rng.choice((1, 1, 2, 3, 5, 8)))
        grids = [random_grid(graphs, rng) for _ in range(count)]
        left -= count
        values = pixels(graphs, grids)
        runner._inputs.of(runner.buckets.largest)[0].fill_(torch.nan)
        got, want = graphs(values, grids), eager(values, grids)
        pairs = [(got.embeddings, want.embeddings)]
        if want.deepstack is not None and got.deepstack is not None:
            pairs.append((got.deepstack, want.deepstack))
        for actual, expected in pairs:
            error = float((actual.float() - expected.float()).norm() / expected.float().norm())
            worst = error if not error <= worst else worst  # NaN sticks
            equal += torch.equal(actual, expected)
        batches += len(pairs)
    stats = runner.stats
    result = {
        "images": images,
        "worst_relative_l2": worst,
        "bit_equal": f"{equal} of {batches}",
        "hit_rate": stats.hit_rate,
        "padding_share": stats.padding_share,
        "captured_meanwhile": stats.captures - captures,
        "evictions": stats.evictions,
        "graph_mib": stats.graph_bytes / 2**20,
        "eager": dict(stats.eager),
    }
    print(json.dumps(result, indent=1), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", default="qwen3-vl-8b", help="a size or a checkpoint")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = find_model(arguments.model)
        path = source.name
        if source.checkpoint is None:
            tower = build_tower(source, device=torch.device("cuda"), dtype=torch.bfloat16)
            path = str(save_checkpoint(tower, source, Path(folder)))
            del tower
        # Graphs at any size for the crossover; `auto` for what a user gets.
        everywhere = VisionEncoder.from_pretrained(path, cuda_graphs=True, graph_memory_mib=1 << 15)
        eager = VisionEncoder.from_pretrained(path, cuda_graphs=False)
        rows = crossover(everywhere, eager)
        del everywhere
        torch.cuda.empty_cache()
        graphs = VisionEncoder.from_pretrained(path)
        recorded = record_all(graphs)
        result = {
            "model": source.name,
            "device": torch.cuda.get_device_name(),
            "recorded": recorded,
            "crossover": rows,
            "soak": soak(graphs, eager, arguments.images),
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
