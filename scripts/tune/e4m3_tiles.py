#!/usr/bin/env python3
"""Measures quack's tiles for products of e4m3 operands on this GPU.

    python scripts/tune/e4m3_tiles.py --table vitrt/kernels/gemm_tables/h200.json

For each product of both towers' blocks and number of rows: every tile in CUDA graphs whose weights
do not stay in the L2 cache, its error against the float32 reference, and beside it what `linear`
takes in bfloat16. The fastest tiles go into the table's entries of that kind, which vitrt/kernels/
gemm_fp8.py chooses by; other entries stay as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from gemm_selection import write_products  # noqa: E402
from graph_timing import microseconds  # noqa: E402
from torch import Tensor  # noqa: E402

from vitrt.kernels import gemm_quack  # noqa: E402
from vitrt.kernels.gemm import linear  # noqa: E402
from vitrt.kernels.gemm_fp8 import E4M3, linear_fp8_ref, quantise_weight  # noqa: E402
from vitrt.kernels.gemm_table import Kind, Tile  # noqa: E402
from vitrt.kernels.to_e4m3 import LARGEST  # noqa: E402

TILES = [
    Tile.parse(text)
    for text in (
        *("128x192p1x1", "128x192p1x2", "128x192p2x1", "192x128p1x2", "128x160p1x1"),
        *("128x128p1x1", "128x256c2x1", "256x128c1x1", "64x256c1x1"),
    )
]
PRODUCTS: list[tuple[Kind, int, int]] = [
    ("bias", 3456, 1152),
    ("residual", 1152, 1152),
    ("gelu_tanh", 4304, 1152),
    ("residual", 1152, 4304),
    ("bias", 3840, 1280),
    ("residual", 1280, 1280),
    ("swiglu", 6912, 1280),
    ("residual", 1280, 3456),
    ("quick_gelu", 5120, 1280),
    ("residual", 1280, 5120),
]
ROWS = (1296, 3080, 12672, 41472)
CALLS = 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Operands:
    """One product in both precisions; weights rotate over more than the L2 cache."""

    def __init__(self, kind: Kind, m: int, n: int, k: int) -> None:
        self.kind = kind
        x, weight = (torch.randn(rows, k, device=DEVICE) for rows in (m, n))
        weight *= k**-0.5
        x_scale = LARGEST / float(x.abs().max())
        self.x8, self.x = (x * x_scale).to(E4M3), x.bfloat16()
        weight8, row_scale = quantise_weight(weight)
        copies = min(20, max(2, math.ceil(96e6 / (n * k))))
        self.weights8 = [weight8.clone() for _ in range(copies)]
        self.weights = [weight.bfloat16() for _ in range(copies)]
        self.scale, self.bias = row_scale / x_scale, torch.randn(n, device=DEVICE)
        self.residual = torch.randn(m, n, device=DEVICE) if kind == "residual" else None
        scaled = kind in gemm_quack.TO_E4M3
        self.out_scale = torch.full((n,), 10.0, device=DEVICE) if scaled else None

    def run(self, tile: Tile, index: int = 0) -> Tensor:
        if self.x8.device.type == "cpu":
            return self.reference()
        product = gemm_quack.compiled(self.kind, tile, E4M3, self.x8.device)
        weight = self.weights8[index % len(self.weights8)]
        vectors = {"scale": self.scale}
        if self.out_scale is not None:
            vectors["out_scale"] = self.out_scale
        return product(self.x8, weight, self.bias, self.residual, **vectors)

    def reference(self) -> Tensor:
        activation = None if self.kind in ("bias", "residual") else self.kind
        return linear_fp8_ref(
            self.x8,
            self.weights8[0],
            self.scale,
            self.bias,
            activation=activation,  # type: ignore[arg-type]
            residual=self.residual,
            out_scale=self.out_scale,
        )

    def in_bfloat16(self, index: int) -> Tensor:
        activation: Any = None if self.kind in ("bias", "residual") else self.kind
        weight = self.weights[index % len(self.weights)]
        bias = self.bias.bfloat16()
        return linear(self.x, weight, bias, activation=activation, residual=self.residual)


def measure(kind: Kind, n: int, k: int, tried: Sequence[int]) -> dict[str, Any]:
    """The table's entry of one product."""
    rows = []
    for m in tried:
        operands = Operands(kind, m, n, k)
        reference = operands.reference().double()
        figures: dict[Tile, float] = {}
        for tile in TILES:
            error = (operands.run(tile).double() - reference).norm() / reference.norm()
            if error < 0.04:  # e4m3 results round by 2^-4 of themselves at most
                figures[tile] = microseconds(partial(operands.run, tile), CALLS)
        best = min(figures, key=lambda tile: figures[tile])
        half = microseconds(operands.in_bfloat16, CALLS)
        print(
            f"{kind:9} {n}x{k} m={m}: {best} {figures[best]:.1f} us, bfloat16 {half:.1f} us, "
            f"{half / figures[best]:.2f}x",
            flush=True,
        )
        rows.append({"m": m, "use": f"quack {best}", "quack_us": round(figures[best], 1)})
    return {"kind": kind, "n": n, "k": k, "operands": "e4m3", "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=Path, required=True, help="the JSON file to fill in")
    parser.add_argument("--rehearse", action="store_true", help="64 rows, by the references")
    args = parser.parse_args()
    if not (args.rehearse or torch.cuda.is_available()):
        parser.error("needs a GPU; --rehearse runs the references")
    table = json.loads(args.table.read_text())
    kept = [entry for entry in table.pop("products") if entry.get("operands") != "e4m3"]
    rows = (64,) if args.rehearse else ROWS
    products = kept + [measure(*product, rows) for product in PRODUCTS]
    if args.rehearse:
        return
    write_products(args.table, table, products)


if __name__ == "__main__":
    main()
