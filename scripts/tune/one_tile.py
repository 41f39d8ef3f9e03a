#!/usr/bin/env python3
"""Measures which one tile of quack suits a product at every number of rows, for batch invariance.

    python scripts/tune/one_tile.py --table vitrt/kernels/gemm_tables/h200.json

For each product of the blocks: every tile, and what cuBLAS does, from one image to a long list. The
tile that costs least in the mean over the fastest of each goes into TABLE; other entries stay.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from gemm import candidates, compile_tiles, incorrect, measure  # noqa: E402
from gemm_products import LAYERS, Layer  # noqa: E402
from gemm_selection import _product, write_products  # noqa: E402

from vitrt.kernels.gemm_table import Tile  # noqa: E402

ROWS = (1296, 3080, 12672, 41472)
FAMILIES = "qwen3,qwen2_5"


def block_layers(families: list[str]) -> list[Layer]:
    """Products with a row a patch, the patch embedding's apart, of the towers in full size."""
    return [
        layer
        for layer in LAYERS
        if layer.family in families
        and layer.merge == 1
        and layer.name != "patch embed"
        and "small" not in layer.name
    ]


def costs(times: list[dict[str, float]]) -> dict[str, float]:
    """Mean time of each choice over the fastest of each number of rows; those timed at all."""
    common = set.intersection(*(set(row) for row in times))
    return {
        choice: statistics.mean(row[choice] / min(row.values()) for row in times)
        for choice in common
    }


def cheapest_tile(times: list[dict[str, float]]) -> tuple[Tile, float]:
    """The tile of those that sum in one piece, and what it costs in the mean, from 1."""
    tiles = {
        Tile.parse(choice.split()[1]): cost
        for choice, cost in costs(times).items()
        if choice.startswith("quack")
    }
    whole = {tile: cost for tile, cost in tiles.items() if tile.split_k == 1}
    best = min(whole, key=lambda tile: (whole[tile], tile))
    return best, whole[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--table", type=Path, required=True, help="the card's table, JSON")
    parser.add_argument("--only", default=FAMILIES, help="families, separated by commas")
    parser.add_argument("--json", type=Path, help="all measurements")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("QUACK_COMPILE_WORKERS", str(os.cpu_count()))
    table = json.loads(arguments.table.read_text())
    if table["device"] != torch.cuda.get_device_name():
        sys.exit(f"{arguments.table} is of {table['device']}, not {torch.cuda.get_device_name()}")
    layers = block_layers(arguments.only.split(","))
    device = torch.device("cuda", torch.cuda.current_device())
    measured: dict[str, dict[str, dict[str, float]]] = {}
    with torch.inference_mode():
        tiles = compile_tiles({layer.product.kind for layer in layers}, device)
        for layer in layers:
            started = time.monotonic()
            choices = candidates(layer.product, max(ROWS), tiles)
            wrong = incorrect(layer, choices, device)
            right = [choice for choice in choices if choice not in wrong]
            times = {m: measure(layer, m, right, device) for m in ROWS}
            measured[layer.key] = {str(m): row for m, row in times.items()}
            tile, cost = cheapest_tile(list(times.values()))
            each = [row[f"quack {tile}"] / min(row.values()) - 1 for row in times.values()]
            text = " ".join(f"{m}: {share:+.0%}" for m, share in zip(ROWS, each, strict=True))
            print(f"{layer.family} {layer.name}: {tile}, {cost - 1:+.1%} in the mean ({text}); "
                  f"{time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
            for entry in table["products"]:
                if _product(entry) == (*layer.product[:3], None):
                    entry["one_tile"] = str(tile)
            torch.cuda.empty_cache()
    facts = {key: value for key, value in table.items() if key != "products"}
    write_products(arguments.table, facts, table["products"])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
