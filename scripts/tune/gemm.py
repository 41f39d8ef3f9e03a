#!/usr/bin/env python3
"""Measures how each matrix product of both towers runs fastest on this GPU.

    python scripts/tune/gemm.py --out vitrt/kernels/gemm_tables/h200.json --time-limit 400

OUT is the table that vitrt/kernels/gemm.py chooses by. For each product and number of rows: cuBLAS
with what its epilogue can do, the bare product followed by our kernel, and quack's kernels with
everything in the epilogue, in CUDA graphs whose weights do not stay in the L2 cache. A product with
a residual is timed together with the norm that follows, so that adding the residual in that norm is
costed as it would run. All measurements go to RAW, which lies in the current folder unless named
(beside the tables it would be taken for one); a second run carries on from there, and
`--select-only` makes the table from them without a GPU. Products of OUT that RAW lacks stay.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from gemm_products import LAYERS, SPLIT_MAX_ROWS, SPLIT_TILES, TILES, Layer  # noqa: E402
from gemm_selection import summary, write_table  # noqa: E402
from graph_timing import graph_of  # noqa: E402
from torch import Tensor  # noqa: E402

from vitrt.bench.timing import mark, milliseconds  # noqa: E402
from vitrt.kernels import gemm_aten, gemm_quack  # noqa: E402
from vitrt.kernels.gemm import linear_ref  # noqa: E402
from vitrt.kernels.gemm_table import Choice, Kind, Product, Tile  # noqa: E402
from vitrt.kernels.norm import add_norm, norm  # noqa: E402

DTYPE = torch.bfloat16
CUDA = torch.device("cuda")


class Operands:
    """What a product reads; weights rotate over more than the L2 cache, as from layer to layer."""

    def __init__(self, product: Product, m: int, device: torch.device) -> None:
        kind, n, k = product.kind, product.n, product.k
        self.kind = kind
        copies = min(20, max(2, math.ceil(96e6 / (2 * n * k))))

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, device=device, dtype=DTYPE).mul_(scale)

        self.weights = [normal(n, k, scale=k**-0.5) for _ in range(copies)]
        self.inputs = [normal(m, k) for _ in range(2)]
        self.bias = normal(n)
        self.residual = normal(m, n).float() if kind == "residual" else None
        self.norm_weight, self.norm_bias = normal(n), normal(n)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        x = self.inputs[index % len(self.inputs)]
        return x, self.weights[index % len(self.weights)], self.bias, self.residual


def runner(choice: Choice, kind: Kind, device: torch.device) -> Callable[..., Tensor]:
    """(x, weight, bias, residual) -> result."""
    if choice.tile is not None:
        return gemm_quack.compiled(kind, choice.tile, DTYPE, device)
    function = (
        gemm_aten.addmm if choice.implementation == "addmm" else gemm_aten.product_then_kernel
    )

    def run(*operands: Any) -> Tensor:
        return function(kind, *operands)

    return run


def step_of(
    choice: Choice | None, layer: Layer, operands: Operands, device: torch.device
) -> Callable[[int], Any]:
    """One product and what follows it; without a choice only what follows.

    A tiny kernel follows where no norm does: quack's kernels would otherwise overlap one another.
    """
    kind = layer.product.kind
    run = runner(choice, kind, device) if choice is not None else None
    gap = torch.zeros(1, device=device)
    weight = operands.norm_weight
    bias = None if layer.family == "qwen2_5" else operands.norm_bias

    def fused(index: int) -> Any:
        x, w, b, residual = operands[index]
        if choice is not None and choice.implementation == "mm":
            delta = x @ w.t()
            return add_norm(delta, b, residual, weight, bias, 1e-6, sum_out=residual)
        total = residual if run is None else run(x, w, b, residual, residual)
        return norm(total, weight, bias, 1e-6)

    def separated(index: int) -> Any:
        result = run(*operands[index]) if run is not None else None
        gap.add_(1)
        return result

    return fused if kind == "residual" else separated


@lru_cache(maxsize=1)
def graph_pool() -> Any:
    """One memory pool for all graphs: only one runs at a time, and nobody reads what they leave."""
    return torch.cuda.graph_pool_handle()


class Timer:
    """Seconds of one step inside a CUDA graph of `calls` of them."""

    def __init__(self, step: Callable[[int], Any], calls: int) -> None:
        self.calls = calls
        self.graph = graph_of(step, calls, graph_pool())
        self.graph.replay()
        self.first = self.measure(1)

    def measure(self, replays: int) -> float:
        start = mark(CUDA)
        for _ in range(replays):
            self.graph.replay()
        return milliseconds([start, mark(CUDA)])[0] * 1e-3 / (replays * self.calls)

    def median(self) -> float:
        replays = min(10, max(1, round(4e-3 / (self.first * self.calls))))
        return sorted(self.measure(replays) for _ in range(5))[2]


def measure(layer: Layer, m: int, choices: list[Choice], device: torch.device) -> dict[str, float]:
    """Microseconds of every choice, less what follows the product; the far ones timed once."""
    operands = Operands(layer.product, m, device)
    calls = 20 if m <= 8192 else 4
    timers = {choice: Timer(step_of(choice, layer, operands, device), calls) for choice in choices}
    best = min(timer.first for timer in timers.values())
    base = Timer(step_of(None, layer, operands, device), calls).median()
    result = {}
    for choice, timer in timers.items():
        near = timer.first < 1.12 * best or choice.tile is None
        seconds = timer.median() if near else timer.first
        result[str(choice)] = round((seconds - base) * 1e6, 3)
    return result


def incorrect(layer: Layer, choices: list[Choice], device: torch.device) -> set[Choice]:
    """Those whose result is not float32's to within their roundings, at an odd number of rows."""
    kind = layer.product.kind
    operands = Operands(layer.product, 1237, device)[0]
    x, weight, bias, residual = (each if each is None else each.float() for each in operands)
    activation = None if kind in ("bias", "residual") else kind
    reference = linear_ref(x, weight, bias, activation=activation, residual=residual)
    wrong = set()
    for choice in choices:
        actual = runner(choice, kind, device)(*operands).float()
        error = ((actual - reference).norm() / reference.norm()).item()
        # One rounding is at most 2^-8; cuBLAS followed by a kernel rounds up to three times.
        if not error < (2.0**-8 + 2.0**-11 if choice.tile else 3 * 2.0**-8):
            print(f"{layer.name} {choice}: left out, relative error {error:.2e}", flush=True)
            wrong.add(choice)
    return wrong


def candidates(product: Product, m: int, tiles: dict[Kind, list[Tile]]) -> list[Choice]:
    kind = product.kind
    cublas = {"bias": ["addmm"], "gelu_tanh": ["addmm", "mm"]}.get(kind, ["mm"])
    choices = [Choice.parse(text) for text in cublas]
    if gemm_quack.supports(kind, product.n, product.k, DTYPE):
        fitting = (tile for tile in tiles[kind] if tile.split_k == 1 or m <= SPLIT_MAX_ROWS)
        choices += [Choice("quack", tile) for tile in fitting]
    return choices


def compile_tiles(kinds: set[Kind], device: torch.device) -> dict[Kind, list[Tile]]:
    """Compiles every tile of every kind in worker processes; what does not compile is left out."""
    from quack.cache import CompilePending, pool_scope

    wanted = [(kind, Tile.parse(tile)) for kind in kinds for tile in TILES]
    if "residual" in kinds:
        wanted += [("residual", Tile.parse(tile)) for tile in SPLIT_TILES]
    done: dict[Kind, list[Tile]] = {kind: [] for kind in kinds}
    started = time.monotonic()
    with pool_scope():
        while wanted:
            pending = []
            for kind, tile in wanted:
                try:
                    gemm_quack.compiled(kind, tile, DTYPE, device)
                    done[kind].append(tile)
                except CompilePending:
                    pending.append((kind, tile))
                except Exception as error:
                    print(f"{kind} {tile}: left out, {type(error).__name__}: {str(error)[:200]}")
            wanted = pending
            time.sleep(0.2 if wanted else 0)
    count = sum(map(len, done.values()))
    print(f"{count} kernels compiled in {time.monotonic() - started:.0f} s", flush=True)
    return done


def host_cost(layer: Layer, device: torch.device, tiles: dict[Kind, list[Tile]]) -> None:
    """Prints what a call costs the host: 100 launches into an empty queue."""
    operands = Operands(layer.product, 64, device)
    for choice in candidates(layer.product, 64, tiles)[:3]:
        run = runner(choice, layer.product.kind, device)
        for index in range(20):
            run(*operands[index])
        torch.cuda.synchronize()
        started = time.perf_counter()
        for index in range(100):
            run(*operands[index])
        microseconds = (time.perf_counter() - started) * 1e4
        torch.cuda.synchronize()
        print(f"host: {microseconds:.1f} us a call, {layer.name} by {choice}")


def tune(
    layers: list[Layer], raw: dict[str, Any], deadline: float, save: Callable[[], None]
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    reason = gemm_quack.unavailable(device)
    if reason:
        sys.exit(f"quack: {reason}")
    tiles = compile_tiles({layer.product.kind for layer in layers}, device)
    host_cost(layers[0], device, tiles)
    for layer in layers:
        measured = raw["products"].setdefault(layer.key, {})
        wrong = incorrect(layer, candidates(layer.product, 0, tiles), device)
        started = time.monotonic()
        for patches in layer.rows:
            m = patches // layer.merge
            if str(m) in measured:
                continue
            if time.monotonic() > deadline:
                print(f"time limit reached at {layer.family} {layer.name}, {m} rows")
                return
            choices = [c for c in candidates(layer.product, m, tiles) if c not in wrong]
            measured[str(m)] = measure(layer, m, choices, device)
            save()
            torch.cuda.empty_cache()
        print(f"{layer.family} {layer.name}: {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the table, JSON")
    parser.add_argument("--raw", type=Path, help="all measurements, JSON (default: ./OUT.raw.json)")
    parser.add_argument("--time-limit", type=float, default=400, help="seconds, compiling included")
    families = ",".join(dict.fromkeys(layer.family for layer in LAYERS))
    parser.add_argument("--only", default=families, help="families, separated by commas")
    parser.add_argument("--slack", type=float, default=0.015, help="loss that saves a kernel")
    parser.add_argument("--select-only", action="store_true", help="from RAW, no GPU")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.time_limit
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("QUACK_COMPILE_WORKERS", str(os.cpu_count()))

    raw_path = arguments.raw or Path(arguments.out.stem + ".raw.json")
    raw: dict[str, Any] = {"products": {}}
    if raw_path.exists():
        raw = json.loads(raw_path.read_text())
    if not arguments.select_only:
        raw = {
            "device": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "torch": torch.__version__,
            "quack-kernels": metadata.version("quack-kernels"),
            "products": raw["products"],
        }
        families = arguments.only.split(",")
        layers = [layer for layer in LAYERS if layer.family in families]

        def save() -> None:
            raw_path.write_text(json.dumps(raw, indent=1))

        with torch.inference_mode():
            tune(layers, raw, deadline, save)
    summary(write_table(arguments.out, raw, arguments.slack))


if __name__ == "__main__":
    main()
