#!/usr/bin/env python3
"""What few rows run fastest by: attention with RoPE inside, and the residual's products in shares.

    python scripts/tune/few_rows.py --table vitrt/kernels/gemm_tables/h200.json [--json FILE]

First attention of small images and short lists: what "auto" takes for larger batches and our flash
kernel, each with its RoPE, and every tiling of short_attention.py. Where one wins decides the rules
in attention/auto.py. Then every product that adds to a residual, by cuBLAS and the norm behind it
and in shares of K that this norm adds up: what gains 3% goes into TABLE, what no longer does goes.
Kernels are compiled by as many processes as there are processors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from gemm_products import LAYERS  # noqa: E402
from gemm_selection import write_products  # noqa: E402
from graph_timing import microseconds  # noqa: E402
from torch import Tensor  # noqa: E402

from vitrt.attention import AttentionBackend, get_backend, resolve_attention  # noqa: E402
from vitrt.kernels.dispatch import ceil_div  # noqa: E402
from vitrt.kernels.gemm_table import SplitTile  # noqa: E402
from vitrt.kernels.norm import add_norm  # noqa: E402
from vitrt.kernels.persistent import processors  # noqa: E402
from vitrt.kernels.rope import rope_  # noqa: E402
from vitrt.kernels.segments import Rotary, Segments, tile_list  # noqa: E402
from vitrt.kernels.short_attention import VARIANTS, ShortTiling, _short_triton  # noqa: E402
from vitrt.kernels.split_product import split_product  # noqa: E402

DTYPE = torch.bfloat16
GAIN = 0.97  # of cuBLAS's time: what a kernel more is worth
ROWS = (64, 128, 192, 256, 320, 384, 512)
LISTS = ([16], [64], [100], [196], [256], [324], [400], [576], [768], [64] * 4, [196] * 2,
         [196] * 4, [256] * 8)  # fmt: skip
SHAPES = {"qwen3-vl-8b": (16, 72), "qwen2.5-vl-7b": (16, 80)}  # heads, head size
_TILES = (  # M, N, the weight on the left, warps; for up to so many rows
    (64, ((64, 32, False, 4), (64, 64, False, 4), (64, 64, True, 4), (64, 128, True, 8))),
    (512, ((64, 64, False, 4), (64, 128, False, 4), (128, 64, False, 8), (128, 64, True, 4))),
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Microseconds of a residual's product and the norm behind it."""

    mm_us: float
    tile: SplitTile
    split_us: float


# Attention


def packed_segments(lengths: list[int], device: torch.device) -> Segments:
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tiles = torch.as_tensor(tile_list(bounds), device=device)
    return Segments(
        torch.as_tensor(bounds, device=device),
        torch.tensor([len(lengths)], dtype=torch.int32, device=device),
        tiles,
        torch.tensor([len(tiles)], dtype=torch.int32, device=device),
        tuple(lengths),
        max(lengths),
    )


class Attention:
    """Attention of one list of segments, by a backend or by the kernel that is tried."""

    def __init__(self, heads: int, head_dim: int, lengths: list[int]) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        tokens = sum(lengths)
        self.segments = packed_segments(lengths, device)
        angles = torch.rand(64, head_dim // 4, device=device)
        positions = torch.randint(0, 64, (tokens, 2), dtype=torch.int32, device=device)
        self.rotary = Rotary(positions, angles.cos(), angles.sin())
        self.qkvs = torch.randn(8, tokens, 3, heads, head_dim, device=device).to(DTYPE)
        self.out = torch.empty(tokens, heads * head_dim, dtype=DTYPE, device=device)

    def by(self, backend: AttentionBackend, index: int) -> None:
        qkv = self.qkvs[index % 8]
        rope_(qkv, self.rotary)
        backend(qkv, self.segments, self.rotary, self.out)

    def short(self, tiling: ShortTiling, index: int) -> None:
        _short_triton(self.qkvs[index % 8], self.segments, self.rotary, self.out, tiling)


def time_attention(model: str, device: torch.device) -> list[dict[str, Any]]:
    heads, head_dim = SHAPES[model]
    auto = resolve_attention("auto", device=device, dtype=DTYPE, head_dim=head_dim)
    flash = get_backend("triton", device=device, dtype=DTYPE, head_dim=head_dim)
    names = "".join(f"{f'{v.block_m}x{v.block_n}w{v.warps}':>9}" for v in VARIANTS)
    print(f"\n{model:26}{'today':>8}{'flash':>8}{names}  us")
    rows = []
    for lengths in LISTS:
        case = Attention(heads, head_dim, lengths)
        # As for a batch too large for either of our kernels.
        today = auto.for_batch([max(lengths)] * 4096, heads).choice.full
        backends = {"today": today, "flash": flash}
        found = {way: microseconds(partial(case.by, each)) for way, each in backends.items()}
        for tiling in VARIANTS:
            with suppress(Exception):  # a tiling that does not fit this GPU
                found[str(tiling)] = microseconds(partial(case.short, tiling))
        text = "".join(f"{found.get(str(v), float('nan')):9.1f}" for v in VARIANTS)
        name = f"{len(lengths)} x {lengths[0]}"
        print(f"  {name:24}{found['today']:8.1f}{found['flash']:8.1f}{text}", flush=True)
        rows.append({"model": model, "lengths": lengths, "today": today.name, "us": found})
    return rows


# Products


def candidates(m: int, n: int, processors: int) -> list[SplitTile]:
    """Shapes worth a try: shares of K that give every processor a program or two."""
    tiles = next((tried for rows, tried in _TILES if m <= rows), _TILES[-1][1])
    found = []
    for m_tile, n_tile, transposed, warps in tiles:
        programs = ceil_div(n, n_tile) * ceil_div(m, m_tile)
        shares = [s for s in (1, 2, 3, 4, 6, 8) if 0.7 <= programs * s / processors <= 2.3]
        for share in shares or [1]:
            found += [
                SplitTile(m_tile, n_tile, k_tile, transposed, share, warps, stages)
                for k_tile, stages in ((64, 4), (128, 3))
            ]
    return found


def residual_products() -> list[tuple[int, int]]:
    """(N, K) of every product that adds to a residual, the benchmark's towers first."""
    pairs = [(e.product.n, e.product.k) for e in LAYERS if e.product.kind == "residual"]
    return list(dict.fromkeys(pairs))


class Operands:
    """What a product reads, in weights that do not stay in the L2 cache, and the norm's."""

    def __init__(self, n: int, k: int, m: int, device: torch.device) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(DTYPE)

        self.weights = [normal(n, k) * k**-0.5 for _ in range(max(2, int(96e6 / (2 * n * k))))]
        self.x, self.residual = normal(m, k), normal(m, n).float()
        self.bias, self.weight, self.shift = normal(n), normal(n), normal(n)
        self.out = normal(m, n)

    def norm(self, delta: Tensor) -> None:
        into = self.residual
        add_norm(
            delta, self.bias, into, self.weight, self.shift, 1e-6, sum_out=into, out=self.out
        )  # fmt: skip

    def cublas(self, index: int) -> None:
        self.norm(self.x @ self.weights[index % len(self.weights)].t())

    def split(self, tile: SplitTile, index: int) -> None:
        self.norm(split_product(self.x, self.weights[index % len(self.weights)], tile))

    def is_right(self, tile: SplitTile) -> bool:
        expected = self.x.float() @ self.weights[0].float().t()
        off = split_product(self.x, self.weights[0], tile).sum(dim=0) - expected
        return bool(off.norm() < 1e-3 * expected.norm())


def time_products(device: torch.device, deadline: float) -> dict[tuple[int, int, int], Found]:
    print(f"\n{'residual':18}{'rows':>6}{'cuBLAS':>9}{'shares':>9}  best, us with the norm behind")
    found = {}
    for n, k in residual_products():
        for m in ROWS:
            if time.monotonic() > deadline:
                print("time limit reached")
                return found
            operands = Operands(n, k, m, device)
            times = {}
            for tile in candidates(m, n, processors(device)):
                with suppress(Exception):  # a shape that does not fit this GPU
                    if operands.is_right(tile):
                        times[tile] = microseconds(partial(operands.split, tile))
            if not times:
                continue
            best = min(times, key=times.__getitem__)
            row = Found(microseconds(operands.cublas), best, times[best])
            found[n, k, m] = row
            print(f"{f'{n}x{k}':18}{m:6}{row.mm_us:9.1f}{row.split_us:9.1f}  {best}", flush=True)
    return found


def write_shares(path: Path, found: dict[tuple[int, int, int], Found]) -> None:
    """Into the table at `path`, where shares gain over what the row names without them.

    Shares that it has and that no longer gain go; rows that were not measured stay as they are.
    """
    table = json.loads(path.read_text())
    for entry in table["products"]:
        if entry["kind"] != "residual" or "operands" in entry:
            continue
        rows = {row["m"]: row for row in entry["rows"]}
        for m in {m for _, _, m in found}:
            row = found.get((entry["n"], entry["k"], m))
            if row is None:
                continue
            old = rows.get(m, {"m": m, "use": "mm"})
            best = min(row.mm_us, old.get("quack_us", row.mm_us))
            if row.split_us <= GAIN * best:
                rows[m] = old | {"use": f"split {row.tile}"}
            elif old["use"].startswith("split"):
                rows[m] = old | {"use": "mm"}
        entry["rows"] = [rows[m] for m in sorted(rows)]
    facts = {key: value for key, value in table.items() if key != "products"}
    write_products(path, facts, table["products"])


def compile_part(part: int, parts: int, device: torch.device) -> None:
    """Launch every `parts`-th kernel once: Triton keeps what it compiles on disk."""
    jobs: list[Callable[[], object]] = []
    for n, k in residual_products():
        weight, bias = (torch.zeros(*s, dtype=DTYPE, device=device) for s in ((n, k), (n,)))
        for tile in dict.fromkeys(t for m in ROWS for t in candidates(m, n, processors(device))):
            jobs.append(partial(split_product, weight.new_zeros(64, k), weight, tile))
        for count in (1, 2, 3, 4, 6, 8):
            shares, residual = (torch.zeros(*s, n, device=device) for s in ((count, 64), (64,)))
            jobs.append(partial(add_norm, shares, bias, residual, bias, bias, 1e-6))
    for job in jobs[part::parts]:
        with suppress(Exception):
            job()
    torch.cuda.synchronize()


def compile_all() -> None:
    started, parts = time.monotonic(), os.cpu_count() or 1
    command = [sys.executable, __file__, "--part"]
    running = [subprocess.Popen([*command, f"{part}/{parts}"]) for part in range(parts)]
    failed = sum(each.wait() != 0 for each in running)
    print(f"compiled in {time.monotonic() - started:.0f} s; {failed} of {parts} parts failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--table", type=Path, help="where shares that gain are written")
    parser.add_argument("--time-limit", type=float, default=150, help="seconds")
    parser.add_argument("--json", type=Path, help="every figure")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.time_limit
    device = torch.device("cuda", torch.cuda.current_device())
    with torch.inference_mode():
        if arguments.part is not None:
            compile_part(*map(int, arguments.part.split("/")), device)
            return
        compile_all()
        attention = [row for model in SHAPES for row in time_attention(model, device)]
        products = time_products(device, deadline)
    if arguments.table is not None:
        write_shares(arguments.table, products)
    if arguments.json is not None:
        rows = [
            {"n": n, "k": k, "m": m, **asdict(row), "tile": str(row.tile)}
            for (n, k, m), row in products.items()
        ]
        report = {"device": torch.cuda.get_device_name(), "attention": attention, "products": rows}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
