#!/usr/bin/env python3
"""What a small image waits for, and what it would gain: a tower in a graph, switch by switch.

    python scripts/tune/small_image.py [--models qwen3-vl-8b,qwen2.5-vl-7b] [--json FILE]
    python scripts/tune/small_image.py --compile-only     # its kernels for Hopper, without a GPU
    TRITON_INTERPRET=1 python scripts/tune/small_image.py --tiny     # shows that they are right

Every forward is padded to the bucket that the package records it at (64 rows for a 64 x 64 image,
256 for 224 x 224). First the products at exactly these rows: cuBLAS, with --quack its best tile,
and the kernel of few_rows.py in its best shape; then towers, of which each line adds one switch:

    attention   RoPE and attention in one kernel
    residual    proj and down leave shares of K, which the norm adds up
    products    qkv and up by the same kernel
    mergers     the mergers' two products by it
    pdl         its kernels start while the one before still runs
    prefetch    and ask for their weights meanwhile

Last, the kernels of today's graph and of the last line's, by the profiler, and what each part of a
block must move at least.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import few_rows  # noqa: E402
import torch  # noqa: E402
from gemm_products import SPLIT_TILES, TILES  # noqa: E402
from torch import Tensor  # noqa: E402
from tower_turns import (  # noqa: E402
    Batch,
    config_named,
    microseconds,
    random_tower,
    recorded,
    take_turns,
    workloads_of,
)

from vitrt.bench.profiling import profile_call  # noqa: E402
from vitrt.bench.workloads import Workload  # noqa: E402
from vitrt.compare.errors import relative_error  # noqa: E402
from vitrt.kernels import gemm_aten, gemm_quack  # noqa: E402
from vitrt.kernels.ahead import CHIPS, compiling_for  # noqa: E402
from vitrt.kernels.gemm import linear_ref  # noqa: E402
from vitrt.kernels.gemm_table import Tile  # noqa: E402
from vitrt.kernels.norm import add_norm  # noqa: E402
from vitrt.kernels.persistent import processors  # noqa: E402
from vitrt.kernels.rope import rope_  # noqa: E402
from vitrt.layers.linear import Linear  # noqa: E402
from vitrt.layers.merger import PatchMerger  # noqa: E402
from vitrt.layers.norm import EPS, Norm  # noqa: E402
from vitrt.models.block import VisionBlock  # noqa: E402
from vitrt.models.families import build_tower  # noqa: E402
from vitrt.models.tower import VisionTower  # noqa: E402

SWITCHES = ("attention", "residual", "products", "mergers", "pdl", "prefetch")
BUCKET = 64
PLAIN = few_rows.Shape(64, 64, 64)


@dataclass
class Small:
    """How the blocks of a tower run while a change lasts."""

    tower: VisionTower
    tiny: bool
    shapes: dict[tuple[str, int, int, int], few_rows.Shape] = field(default_factory=dict)
    attention: dict[str, int] = field(default_factory=dict)  # rows, keys, warps

    def shape(self, kind: str, rows: int, linear: Linear) -> few_rows.Shape:
        return self.shapes.get((kind, rows, *linear.weight.shape), PLAIN)

    def product(
        self,
        kind: str,
        x: Tensor,
        linear: Linear,
        on: frozenset[str],
        out: Tensor | None = None,
    ) -> Tensor:
        shape = self.shape(kind, len(x), linear)
        return few_rows.product(
            kind,
            x,
            linear.weight,
            linear.bias,
            shape,
            pdl="pdl" in on,
            prefetch="prefetch" in on,
            out=out,
        )

    def add_norm(
        self, x: Tensor, linear: Any, residual: Tensor, norm: Norm, on: frozenset[str]
    ) -> Tensor:
        """residual += linear(x) in place; its norm."""
        if "residual" not in on:
            normed: Tensor = linear.add_norm_(residual, x, norm)
            return normed
        shares = self.product("shares", x, linear, on)
        return few_rows.sum_norm(
            shares, linear.bias, residual, norm.weight, norm.bias, EPS, pdl="pdl" in on
        )

    @contextmanager
    def changed(self, on: frozenset[str], tower: VisionTower) -> Iterator[None]:
        """While it lasts, the tower runs with these switches on."""
        assert tower is self.tower

        def block_forward(
            block: VisionBlock,
            residual: Tensor,
            normed: Tensor,
            rotary: Any,
            segments: Any,
            backend: Any,
            next_norm: Norm,
        ) -> Tensor:
            attn, mlp = block.attn, block.mlp
            if "products" in on:
                qkv = self.product("bias", normed, attn.qkv, on)
                qkv = qkv.view(len(normed), *attn.qkv.output_shape)
            else:
                qkv = attn.qkv(normed)
            if "attention" in on:
                own = {} if segments.tiles is None else self.attention
                attended = few_rows.attention(qkv, segments, rotary, pdl="pdl" in on, **own)
            else:
                if not backend.applies_rotary:
                    rope_(qkv, rotary)
                attended = backend(qkv, segments, rotary)
            normed = self.add_norm(attended, attn.proj, residual, block.norm2, on)
            if "products" in on:
                up = self.product(mlp.activation or "bias", normed, mlp.up, on)
            else:
                up = mlp.up(normed)
            return self.add_norm(up, mlp.down, residual, next_norm, on)

        def merger_forward(
            merger: PatchMerger, normed: Tensor, out: Tensor | None = None
        ) -> Tensor:
            x = self.product("gelu", normed.view(-1, merger.joined), merger.fc1, on)
            return self.product("bias", x, merger.fc2, on, out)

        with mock.patch.object(VisionBlock, "forward", block_forward):
            if "mergers" in on:
                with mock.patch.object(PatchMerger, "forward", merger_forward):
                    yield
            else:
                yield

    def products(self) -> list[tuple[str, str, Callable[[int], Linear], int]]:
        """(name, kind, the layer of a block, patches to a row) of every product."""
        block, merger = self.tower.block, self.tower.merger
        activation = block(0).mlp.activation or "bias"
        return [
            ("qkv", "bias", lambda index: block(index).attn.qkv, 1),
            ("proj", "shares", lambda index: block(index).attn.proj, 1),
            ("up", activation, lambda index: block(index).mlp.up, 1),
            ("down", "shares", lambda index: block(index).mlp.down, 1),
            ("merger fc1", "gelu", lambda index: merger.fc1, merger.joined),
            ("merger fc2", "bias", lambda index: merger.fc2, merger.joined),
        ]


# Products alone


class Operands:
    """What one product reads, in every layer, and the norm behind a residual."""

    def __init__(self, small: Small, kind: str, layer: Callable[[int], Linear], rows: int) -> None:
        depth = small.tower.config.depth
        self.kind, self.layers = kind, [layer(index) for index in range(depth)]
        weight = self.layers[0].weight
        self.norm = small.tower.block(0).norm1
        self.x = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
        self.residual = torch.randn(rows, weight.shape[0], device=weight.device)

    def few(self, shape: few_rows.Shape, options: dict[str, bool], index: int) -> Tensor:
        layer = self.layers[index % len(self.layers)]
        out = few_rows.product(self.kind, self.x, layer.weight, layer.bias, shape, **options)
        if self.kind != "shares":
            return out
        assert layer.bias is not None
        norm = self.norm
        return few_rows.sum_norm(
            out, layer.bias, self.residual, norm.weight, norm.bias, EPS, pdl=options["pdl"]
        )

    def cublas(self, index: int) -> Tensor:
        layer = self.layers[index % len(self.layers)]
        kind: Any = self.kind
        assert layer.bias is not None
        if kind in ("bias", "gelu_tanh"):
            return gemm_aten.addmm(kind, self.x, layer.weight, layer.bias)
        if kind != "shares":
            return gemm_aten.product_then_kernel(kind, self.x, layer.weight, layer.bias)
        delta, norm = self.x @ layer.weight.t(), self.norm
        into = self.residual
        return add_norm(delta, layer.bias, into, norm.weight, norm.bias, EPS, sum_out=into)[1]

    def quack(self, tile: Tile, index: int) -> Tensor:
        layer = self.layers[index % len(self.layers)]
        kind: Any = "residual" if self.kind == "shares" else self.kind
        assert layer.bias is not None
        run = gemm_quack.compiled(kind, tile, self.x.dtype, self.x.device)
        if self.kind != "shares":
            return run(self.x, layer.weight, layer.bias)
        run(self.x, layer.weight, layer.bias, self.residual, self.residual)
        return self.norm(self.residual)

    def wrong(self, shape: few_rows.Shape) -> bool:
        """Whether a shape's result is not float32's to within its roundings."""
        layer = self.layers[0]
        activation: Any = None if self.kind in ("bias", "shares") else self.kind
        bias = None if self.kind == "shares" else layer.bias
        expected = linear_ref(
            self.x.float(),
            layer.weight.float(),
            None if bias is None else bias.float(),
            activation=activation,
        )
        out = few_rows.product(self.kind, self.x, layer.weight, bias, shape)
        out = out.sum(dim=0) if self.kind == "shares" else out
        return not relative_error(out, expected) < 2.0**-8


def measure_products(small: Small, rows: int, quack: bool) -> list[dict[str, Any]]:
    """Every product alone, and the shapes that `small` takes from now on."""
    header = f"product at {rows} rows, us"
    print(f"  {header:28}{'cuBLAS':>9}{'quack':>9}{'few':>9}{'+pdl':>9}")
    found = []
    for name, kind, layer, joined in small.products():
        weight = layer(0).weight
        here = rows if joined == 1 else max(rows // small.tower.config.merge_unit, 1)
        operands = Operands(small, kind, layer, here)
        shapes = few_rows.candidates(kind, here, weight.shape[0], processors(weight.device))
        shapes = shapes[-1:] if small.tiny else shapes  # few programs: they are interpreted
        off = {"pdl": False, "prefetch": False}
        times = {
            shape: microseconds(partial(operands.few, shape, off))
            for shape in shapes
            if not operands.wrong(shape)
        }
        if not times:
            raise SystemExit(f"{name}: no shape gave the right result")
        best = min(times, key=lambda shape: times[shape])
        small.shapes[kind, here, weight.shape[0], weight.shape[1]] = best
        row = {
            "product": f"{name} {weight.shape[0]}x{weight.shape[1]}",
            "rows": here,
            "cublas_us": microseconds(operands.cublas),
            "quack_us": _quack(operands, kind) if quack else None,
            "few_us": times[best],
            "shape": str(best),
        }
        if weight.is_cuda:
            on = {"pdl": True, "prefetch": True}
            row["pdl_us"] = microseconds(partial(operands.few, best, on))
        figures = (row["cublas_us"], row["quack_us"], row["few_us"], row.get("pdl_us"))
        text = "".join("        -" if each is None else f"{each:9.1f}" for each in figures)
        print(f"  {row['product']:28}{text}  {best}", flush=True)
        found.append(row)
    return found


def _quack(operands: Operands, kind: str) -> float | None:
    times = []
    weight = operands.layers[0].weight
    own: Any = "residual" if kind == "shares" else kind
    n, k = weight.shape
    if not gemm_quack.supports(own, n, k, weight.dtype):
        return None
    for text in (*TILES[:4], *(SPLIT_TILES if own == "residual" else ())):
        try:
            times.append(microseconds(partial(operands.quack, Tile.parse(text))))
        except Exception as error:
            print(f"  {own} {text}: left out, {type(error).__name__}: {str(error)[:100]}")
    return min(times, default=None)


def choose_attention(small: Small, batch: Batch) -> None:
    """The fastest blocks of the attention kernel, by one block's attention alone."""
    attn = small.tower.block(0).attn
    shape = (len(batch.patches), *attn.qkv.output_shape)
    qkv = torch.randn(shape, device=batch.device).to(batch.dtype)
    rotary = small.tower.rotary(batch.plan.positions, batch.plan.valid, batch.plan.largest_position)
    times = {}
    tried = ((64, 64, 4), (64, 64, 8), (64, 32, 4), (128, 64, 8))
    for rows, keys, warps in tried[:1] if small.tiny else tried:
        own = {"rows": rows, "keys": keys, "warps": warps}

        def step(index: int, own: dict[str, int] = own) -> Tensor:
            return few_rows.attention(qkv, batch.plan.full, rotary, **own)

        times[rows, keys, warps] = microseconds(step)
    best = min(times, key=lambda key: times[key])
    small.attention = dict(zip(("rows", "keys", "warps"), best, strict=True))

    def today(index: int) -> Tensor:
        turned = qkv.clone()
        if not batch.choice.full.applies_rotary:
            rope_(turned, rotary)
        return batch.choice.full(turned, batch.plan.full, rotary)

    print(
        f"  attention with RoPE: {times[best]:.1f} us by {small.attention}; today "
        f"{microseconds(today):.1f} us, a copy of qkv included",
        flush=True,
    )


# Towers


def bucket_of(workload: Workload) -> int:
    return -(-workload.patches // BUCKET) * BUCKET


def lines() -> dict[str, frozenset[str]]:
    """Each line's switches: those of the line above, and one more."""
    return {f"+ {switch}": frozenset(SWITCHES[: i + 1]) for i, switch in enumerate(SWITCHES)}


def run(model: str, arguments: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    config = config_named(model, tiny=arguments.tiny, depth=arguments.depth)
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    tower = random_tower(config, device, dtype)
    quack = arguments.quack and gemm_quack.unavailable(device) is None
    found = []
    for workload in workloads_of(config, arguments.workloads, tiny=arguments.tiny):
        bucket = bucket_of(workload)
        print(f"\n{model} {workload.name}: {workload.patches} patches in {bucket} rows")
        batch = Batch(tower, workload, arguments.attention, bucket)
        small = Small(tower, arguments.tiny)
        products = measure_products(small, bucket, quack)
        choose_attention(small, batch)
        changes: dict[str, Callable[[VisionTower], AbstractContextManager[Any]]] = {
            "as released": lambda tower: nullcontext()
        }
        for name, on in lines().items():
            if device.type == "cuda" or not {"pdl", "prefetch"} & on:
                changes[name] = partial(small.changed, on)
        results = take_turns(batch, changes, seconds=arguments.seconds, single=True)
        print(f"  {'forward':16}{'device ms':>10}{'wall ms':>9}{'gain':>7}{'error':>10}{'off':>10}")
        for name, each in results.items():
            wall = each.timing.wall_ms or float("nan")
            error = float("nan") if each.error is None else each.error
            print(
                f"  {name:16}{each.timing.rate_ms:10.3f}{wall:9.3f}{each.ratio:7.2f}"
                f"{error:10.2e}{each.off:10.2e}",
                flush=True,
            )
        found.append(
            {
                "model": model,
                "workload": workload.name,
                "rows": bucket,
                "products": products,
                "forwards": {
                    name: {
                        "rate_ms": each.timing.rate_ms,
                        "wall_ms": each.timing.wall_ms,
                        "gain": each.ratio,
                        "error": each.error,
                        "off": each.off,
                    }
                    for name, each in results.items()
                },
            }
        )
        moved(config, bucket)
        if device.type == "cuda":
            for name in ("as released", list(changes)[-1]):
                found[-1][f"kernels, {name}"] = list_kernels(batch, name, changes[name])
    return found


def moved(config: Any, rows: int) -> None:
    """Bytes that the parts of one block must move at least, bfloat16 with a float32 residual."""
    width, inner = config.hidden_size, config.intermediate_size
    gated = 2 if config.window_size is not None else 1
    parts = {
        "qkv": 2 * (3 * width * width + rows * 4 * width),
        "RoPE": 2 * (rows * 4 * width),
        "attention": 2 * (rows * 4 * width),
        "proj": 2 * (width * width + rows * 2 * width),
        "add and norm, twice": 2 * rows * width * (2 + 4 + 4 + 2),
        "up": 2 * (gated * width * inner + rows * (width + inner)),
        "down": 2 * (width * inner + rows * (width + inner)),
    }
    text = ", ".join(f"{name} {nbytes / 1e6:.2f}" for name, nbytes in parts.items())
    print(f"  a block moves at least, MB: {text}; {config.depth} blocks "
          f"{config.depth * sum(parts.values()) / 1e6:.0f}")  # fmt: skip


def list_kernels(
    batch: Batch, name: str, change: Callable[[VisionTower], AbstractContextManager[Any]]
) -> list[dict[str, Any]]:
    call, _graph = recorded(batch, change(batch.tower))
    profile = profile_call(lambda _: call(), [batch.patches], batch.device)
    count = sum(kernel.calls for kernel in profile.kernels)
    print(f"  {name}: {count:.0f} kernels, {profile.total_ms:.3f} ms, idle "
          f"{profile.groups['idle']:.3f} ms")  # fmt: skip
    for kernel in profile.kernels[:14]:
        each = 1e3 * kernel.ms / kernel.calls
        print(f"    {kernel.calls:5.0f} x {each:6.2f} us  {kernel.name[:70]}", flush=True)
    return [
        {"name": kernel.name[:100], "calls": kernel.calls, "ms": kernel.ms}
        for kernel in profile.kernels
    ]


def compile_part(arguments: argparse.Namespace, part: int, parts: int) -> None:
    """Every `parts`-th kernel that will be tried, for sm_90a."""
    count = 0
    with compiling_for(CHIPS["sm_90a"]) as loaded:
        half = partial(torch.empty, dtype=torch.bfloat16, device="cuda")
        full = partial(torch.empty, dtype=torch.float32, device="cuda")
        for model in arguments.models.split(","):
            config = config_named(model, tiny=False)
            tower = build_tower(config)
            tower.allocate(lambda meta: half(meta.shape))
            centred = tower.block(0).norm1.bias is not None
            batches = workloads_of(config, arguments.workloads, tiny=False)
            for rows in {bucket_of(workload) for workload in batches}:
                for _, kind, layer, joined in Small(tower, False).products():
                    weight = layer(0).weight
                    n, k = weight.shape
                    here = rows if joined == 1 else rows // config.merge_unit
                    for shape in few_rows.candidates(kind, here, n, 132):
                        for on in (False, True):
                            count += 1
                            if count % parts == part:
                                few_rows.product(
                                    kind, half(here, k), weight, half(n), shape,
                                    pdl=on, prefetch=on,
                                )  # fmt: skip
                                if kind == "shares":
                                    vector = half(n)
                                    few_rows.sum_norm(
                                        full(shape.shares, here, n), vector, full(here, n),
                                        vector, vector if centred else None, EPS, pdl=on,
                                    )  # fmt: skip
        print(f"part {part} of {parts}: {len(loaded)} kernels", flush=True)


def compile_all(arguments: argparse.Namespace) -> None:
    """Into Triton's folder, by as many processes as there are processors."""
    started, parts = time.monotonic(), os.cpu_count() or 1
    command = [sys.executable, __file__, "--models", arguments.models]
    command += ["--workloads", arguments.workloads]
    # Whatever GPUs there are stay out of it.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [*command, "--part", f"{part}/{parts}"], env=environment, stdout=subprocess.DEVNULL
        )
        for part in range(parts)
    ]
    failed = sum(each.wait() != 0 for each in running)
    print(f"compiled in {time.monotonic() - started:.0f} s; {failed} of {parts} parts failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="qwen3-vl-8b,qwen2.5-vl-7b")
    parser.add_argument("--workloads", default="1x64,1x224")
    parser.add_argument("--seconds", type=float, default=1.0, help="of every line")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--depth", type=int, help="layers; default: the model's")
    parser.add_argument("--tiny", action="store_true", help="small towers in float32, on a CPU")
    parser.add_argument("--compile-only", action="store_true", help="for sm_90a, without a GPU")
    parser.add_argument("--quack", action="store_true", help="time its products, too")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.part is not None:
        compile_part(arguments, *map(int, arguments.part.split("/")))
        return
    if not arguments.tiny:
        compile_all(arguments)
    if arguments.compile_only:
        return
    device = torch.device("cpu" if arguments.tiny else "cuda")
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for model in arguments.models.split(","):
            rows += run(model, arguments, device)
            if arguments.json is not None:
                where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
                text = json.dumps({"device": where, "rows": rows}, indent=1)
                arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
