#!/usr/bin/env python3
"""Times the residual's products in three ways, and with them whole towers, in turns on one GPU.

    python scripts/tune/folded_norm.py [--models qwen3-vl-8b,qwen2.5-vl-7b] [--json FILE]
    python scripts/tune/folded_norm.py --compile-only     # its kernels for Hopper, without a GPU
    python scripts/tune/folded_norm.py --tiny             # on a CPU: shows that it computes a norm

    today   as the package does it: the residual added in a product's epilogue or in the norm
    add     the product adds to the residual where it lies (one reducing store, nothing read), then
            the norm; changes no bit of what quack's residual epilogue gives
    fold    no norm is run: the product that makes the residual leaves, in the same epilogue, a
            bfloat16 copy of it times the next norm's weight w, and of each row and tile the sums of
            its values and of their squares. A small kernel makes 1 / std of them. The product that
            reads the norm takes the copy, and since it is linear
                LayerNorm(x) W^T + b = inverse (x w) W^T - inverse mean (W w) + (W norm_bias + b)
            its epilogue has a vector over the rows (RMSNorm) or two, and one over the columns.

The block's two residual products (`proj`, `down`) are changed apart and together; what is fastest
differs with the rows. Every change is measured with the tiles that were fastest alone. The last
block's norm belongs to the merger, which reads it as it is. norm_folding_error.py says what folding
costs in accuracy; errors here are against vitrt's own tower in float32.

Shapes: T rows, K input and N output features, D width of the residual.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import product as pairs_of
from pathlib import Path
from typing import Any, Literal
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from tower_turns import (  # noqa: E402
    Batch,
    config_named,
    microseconds,
    random_tower,
    take_turns,
    workloads_of,
)

from vitrt.kernels.ahead import CHIPS, compiling_for  # noqa: E402
from vitrt.kernels.disk_cache import keep_kernels  # noqa: E402
from vitrt.kernels.dispatch import ceil_div, jit, pow2_ceil, tl  # noqa: E402
from vitrt.kernels.gemm_table import Tile  # noqa: E402
from vitrt.kernels.rope import rope_  # noqa: E402
from vitrt.layers.linear import Linear, RowParallelLinear  # noqa: E402
from vitrt.layers.norm import EPS, Norm  # noqa: E402
from vitrt.models.block import VisionBlock  # noqa: E402
from vitrt.models.tower import VisionTower  # noqa: E402

Way = Literal["today", "add", "fold"]
WAYS: tuple[Way, ...] = ("today", "add", "fold")
WORKLOADS = "1x560,1x1120x700,32x560,16x1120x700,1x4k,mixed16"

# A pingpong tile of 128 x 192 has 192 accumulators a thread: with two sums and the copy it spills.
LEAVE = ("128x128p1x1", "128x128p2x1", "128x128p1x2", "128x160p1x1", "256x128c2x1", "128x192c1x1")
ADD = ("128x128p1x1", "128x128p2x1", "128x160p1x1", "128x192p1x1", "128x192p1x2", "192x128p1x2")
TAKE = ("128x128p2x1", "128x160p1x1", "128x192p1x1", "128x192p1x2", "192x128p1x1", "192x128p1x2")


# The small kernel between the two products


@jit(do_not_specialize=["rows"])
def _row_scale_kernel(
    sums, squares, inverse, mean, rows, eps, D: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, CENTRE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sums of BLOCK rows over their TILES tiles -> 1 / std, and the mean times that."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.arange(0, WIDE)[None, :]
    live = (row < rows)[:, None] & (tile < TILES)
    at = row.to(tl.int64)[:, None] * TILES + tile
    variance = tl.sum(tl.load(squares + at, mask=live, other=0.0), 1) / D
    if CENTRE:
        centre = tl.sum(tl.load(sums + at, mask=live, other=0.0), 1) / D
        variance = tl.maximum(variance - centre * centre, 0.0)
    scale = tl.rsqrt(variance + eps)
    tl.store(inverse + row, scale, mask=row < rows)
    if CENTRE:
        tl.store(mean + row, centre * scale, mask=row < rows)


def row_scale(
    sums: Tensor | None, squares: Tensor, width: int, *, pdl: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(1 / std, mean / std), float32 [T], of sums [T, tiles]; without `sums` of RMS norms."""
    rows, tiles = squares.shape
    inverse = squares.new_empty(rows)
    mean = None if sums is None else torch.empty_like(inverse)
    if not (squares.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return row_scale_ref(sums, squares, width)
    block = 64
    options = {"launch_pdl": True} if pdl else {}
    _row_scale_kernel[(ceil_div(rows, block),)](
        sums, squares, inverse, mean, rows, EPS, width, tiles, block, pow2_ceil(tiles),
        sums is not None, pdl, num_warps=2, **options,
    )  # fmt: skip
    return inverse, mean


def row_scale_ref(sums: Tensor | None, squares: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    variance = squares.sum(dim=1) / width
    if sums is None:
        return torch.rsqrt(variance + EPS), None
    mean = sums.sum(dim=1) / width
    inverse = torch.rsqrt((variance - mean * mean).clamp_min(0) + EPS)
    return inverse, mean * inverse


# The products


@dataclass(frozen=True)
class FoldedNorm:
    """A norm that was not run."""

    norm: Norm
    copy: Tensor  # bfloat16 [T, D], the residual times the norm's weight
    inverse: Tensor  # float32 [T], 1 / std
    mean: Tensor | None  # float32 [T], mean / std; None of RMSNorm


@dataclass(frozen=True)
class Vectors:
    """Of a product that reads a folded norm; float32 [N]."""

    bias: Tensor  # with what the norm's bias becomes
    columns: Tensor | None  # the weight times the norm's

    @classmethod
    def of(cls, linear: Linear, norm: Norm) -> Vectors:
        assert linear.bias is not None
        weight, bias = linear.weight.float(), linear.bias.float()
        if norm.bias is None:
            return cls(bias, None)
        return cls(bias + weight @ norm.bias.float(), weight @ norm.weight.float())


class Kernels:
    """quack's products with the epilogues of folded_epilogues.py; references on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.plans: dict[tuple[str, Tile], Any] = {}

    def leave(
        self, x: Tensor, linear: Linear, residual: Tensor, norm: Norm, tile: Tile
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """residual += x W^T + b in place; the copy [T, D], and sums and squares [T, tiles]."""
        assert linear.bias is not None
        n = linear.weight.shape[0]
        copy = torch.empty(residual.shape, dtype=x.dtype, device=x.device)
        squares = torch.empty(len(x), ceil_div(n, tile.n), device=x.device)
        sums = None if norm.bias is None else torch.empty_like(squares)
        arguments = {"bias": linear.bias, "weight": norm.weight, "copy": copy, "squares": squares}
        if sums is not None:
            arguments["sums"] = sums
        if self.device.type == "cpu":
            residual += F.linear(x.float(), linear.weight.float(), linear.bias.float())
            copy.copy_(residual * norm.weight.float())
            for at, part in enumerate(residual.split(tile.n, dim=1)):
                squares[:, at] = (part * part).sum(dim=1)
                if sums is not None:
                    sums[:, at] = part.sum(dim=1)
        else:
            name = "leave_rms" if sums is None else "leave_layer"
            self.launch(name, tile, x, linear.weight, residual, residual, arguments)
        return copy, sums, squares

    def take(self, folded: FoldedNorm, linear: Linear, vectors: Vectors, tile: Tile) -> Tensor:
        """act(norm W^T + b) [T, N], or [T, N / 2] for swiglu."""
        x, kind = folded.copy, linear.activation
        n = linear.weight.shape[0]
        gated = kind == "swiglu"
        out = torch.empty(len(x), n // 2 if gated else n, dtype=x.dtype, device=x.device)
        arguments = {"inverse": folded.inverse, "bias": vectors.bias}
        if folded.mean is not None:
            assert vectors.columns is not None
            arguments |= {"mean": folded.mean, "columns": vectors.columns}
        if self.device.type == "cpu":
            return out.copy_(_take_ref(folded, linear, vectors))
        name = "take_layer" if folded.mean is not None else "take_rms"
        name += {None: "", "gelu_tanh": "_gelu", "swiglu": "_swiglu"}[kind]
        if gated:
            arguments["out"] = out
        self.launch(name, tile, x, linear.weight, None if gated else out, None, arguments)
        return out

    def add(self, x: Tensor, linear: Linear, residual: Tensor, tile: Tile) -> None:
        """residual += x W^T + b in place."""
        assert linear.bias is not None
        if self.device.type == "cpu":
            residual += F.linear(x.float(), linear.weight.float(), linear.bias.float())
        else:
            arguments = {"bias": linear.bias}
            self.launch("add", tile, x, linear.weight, residual, None, arguments)

    def launch(self, name: str, tile: Tile, *operands: Any) -> None:
        from quack.gemm_runtime.host import run_gemm_epi_plan

        run_gemm_epi_plan(self.plan(name, tile), *operands)

    def plan(self, name: str, tile: Tile) -> Any:
        """quack's launch plan, which holds for every shape; compiled by one small product."""
        if (name, tile) not in self.plans:
            self.plans[name, tile] = self._compile(name, tile)
        return self.plans[name, tile]

    def _compile(self, name: str, tile: Tile) -> Any:
        import folded_epilogues

        from vitrt.kernels import gemm_epilogues

        m, n, k = 256, 512, 128
        half = partial(torch.zeros, dtype=torch.bfloat16, device=self.device)
        full = partial(torch.zeros, dtype=torch.float32, device=self.device)
        leaves, gated = name.startswith("leave"), name.endswith("swiglu")
        vector = full if name.startswith("take") else half
        arguments: dict[str, Tensor] = {"bias": vector(n)}
        if leaves:
            tiles = ceil_div(n, tile.n)
            arguments |= {"weight": half(n), "copy": half(m, n), "squares": full(m, tiles)}
            if name == "leave_layer":
                arguments["sums"] = full(m, tiles)
        elif name != "add":
            arguments["inverse"] = full(m)
            if "layer" in name:
                arguments |= {"mean": full(m), "columns": full(n)}
            if gated:
                arguments["out"] = half(m, n // 2)
        epilogue = gemm_epilogues.add_bias if name == "add" else getattr(folded_epilogues, name)
        product = full(m, n) if leaves or name == "add" else half(m, n)
        return epilogue.gemm(
            half(m, k),
            half(n, k),
            None if gated else product,
            full(m, n) if leaves else None,
            epi_args=arguments,
            tile_M=tile.m,
            tile_N=tile.n,
            pingpong=tile.pingpong,
            cluster_M=tile.cluster_m,
            cluster_N=tile.cluster_n,
            add_to_output=name == "add",
        )


def _take_ref(folded: FoldedNorm, linear: Linear, vectors: Vectors) -> Tensor:
    acc = F.linear(folded.copy.float(), linear.weight.float()) * folded.inverse[:, None]
    if folded.mean is not None:
        assert vectors.columns is not None
        acc -= folded.mean[:, None] * vectors.columns
    acc += vectors.bias
    if linear.activation == "swiglu":
        gate, up = acc.unflatten(-1, (-1, 2)).unbind(-1)
        return F.silu(gate) * up
    return acc if linear.activation is None else F.gelu(acc, approximate="tanh")


def compile_all(kernels: Kernels, *, workers: bool) -> None:
    """Every tile of every epilogue; what does not compile is left out."""
    from quack.cache import CompilePending, pool_scope

    names = {
        "leave_rms": LEAVE,
        "leave_layer": LEAVE,
        "add": ADD,
        **dict.fromkeys(("take_rms", "take_rms_swiglu", "take_layer", "take_layer_gelu"), TAKE),
    }
    wanted = [(name, Tile.parse(tile)) for name, tiles in names.items() for tile in tiles]
    started = time.monotonic()
    with pool_scope() if workers else nullcontext():
        while wanted:
            pending = []
            for name, tile in wanted:
                try:
                    kernels.plan(name, tile)
                except CompilePending:
                    pending.append((name, tile))
                except Exception as error:
                    print(f"{name} {tile}: left out, {type(error).__name__}: {str(error)[:200]}")
                    kernels.plans[name, tile] = None
            wanted = pending
            time.sleep(0.2 if wanted else 0)
    count = sum(plan is not None for plan in kernels.plans.values())
    print(f"{count} kernels ready after {time.monotonic() - started:.0f} s", flush=True)


# The forward


@dataclass
class Folding:
    """How the blocks of one tower run while a change lasts."""

    tower: VisionTower
    kernels: Kernels
    pdl: bool = False
    tiles: dict[str, Tile] = field(default_factory=dict)  # by "leave proj", "take up", ...
    vectors: dict[tuple[int, int], Vectors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        depth = self.tower.config.depth
        for index in range(depth):
            block = self.tower.block(index)
            self._prepare(block.attn.qkv, block.norm1)
            self._prepare(block.mlp.up, block.norm2)

    def _prepare(self, linear: Linear, norm: Norm) -> None:
        self.vectors[id(linear), id(norm)] = Vectors.of(linear, norm)

    def tile(self, use: str) -> Tile:
        defaults = {"leave": LEAVE, "add": ADD, "take": TAKE}
        return self.tiles.get(use) or Tile.parse(defaults[use.split()[0]][0])

    def residual(
        self,
        use: str,
        way: Way,
        linear: RowParallelLinear,
        x: Tensor,
        residual: Tensor,
        norm: Norm,
        spare: Tensor | None,
    ) -> Tensor | FoldedNorm:
        """residual += linear(x) in place; its norm, run or not."""
        if way == "fold" and norm is self.tower.merger_norm:
            way = "add"  # the merger views four rows as one
        if way == "today":
            return linear.add_norm_(residual, x, norm, spare)
        if way == "add":
            self.kernels.add(x, linear, residual, self.tile(f"add {use}"))
            return norm(residual, spare)
        copy, sums, squares = self.kernels.leave(
            x, linear, residual, norm, self.tile(f"leave {use}")
        )
        return FoldedNorm(norm, copy, *row_scale(sums, squares, residual.shape[1], pdl=self.pdl))

    def linear(self, use: str, linear: Linear, normed: Tensor | FoldedNorm) -> Tensor:
        if isinstance(normed, Tensor):
            return linear(normed)
        vectors = self.vectors[id(linear), id(normed.norm)]
        return self.kernels.take(normed, linear, vectors, self.tile(f"take {use}"))

    @contextmanager
    def changed(self, proj: Way, down: Way, tower: VisionTower) -> Iterator[None]:
        """While it lasts, every block of the tower runs its residual products so."""
        assert tower is self.tower

        def forward(
            block: VisionBlock,
            residual: Tensor,
            normed: Any,
            rotary: Any,
            segments: Any,
            backend: Any,
            next_norm: Norm,
        ) -> Any:
            attn, mlp = block.attn, block.mlp
            qkv = self.linear("qkv", attn.qkv, normed).view(len(residual), *attn.qkv.output_shape)
            if not backend.applies_rotary:
                rope_(qkv, rotary)
            spare = normed if isinstance(normed, Tensor) and normed.is_cuda else None
            attended = backend(qkv, segments, rotary, spare)
            inner = self.residual("proj", proj, attn.proj, attended, residual, block.norm2, spare)
            up = self.linear("up", mlp.up, inner)
            return self.residual("down", down, mlp.down, up, residual, next_norm, spare)

        with mock.patch.object(VisionBlock, "forward", forward):
            yield

    def choose_tiles(self, rows: int) -> dict[str, float]:
        """The fastest tile of every product at so many rows; microseconds of each."""
        block = self.tower.block(0)
        depth = self.tower.config.depth
        width, dtype = self.tower.config.hidden_size, block.norm1.weight.dtype
        device = self.kernels.device
        inputs = {
            name: torch.randn(rows, linear.weight.shape[1], device=device).to(dtype)
            for name, linear in (("proj", block.attn.proj), ("down", block.mlp.down))
        }
        hidden = torch.randn(rows, width, device=device)
        copy = torch.randn(rows, width, device=device).to(dtype)
        inverse = torch.rand(rows, device=device)
        mean = None if block.norm1.bias is None else torch.rand(rows, device=device)

        def step(use: str, tile: Tile, index: int) -> None:
            block = self.tower.block(index % depth)
            action, name = use.split()
            linear = {
                "proj": block.attn.proj,
                "down": block.mlp.down,
                "qkv": block.attn.qkv,
                "up": block.mlp.up,
            }[name]
            norm = block.norm1 if name == "qkv" else block.norm2
            if action == "leave":
                self.kernels.leave(inputs[name], linear, hidden, norm, tile)
            elif action == "add":
                self.kernels.add(inputs[name], linear, hidden, tile)
            else:
                vectors = self.vectors[id(linear), id(norm)]
                self.kernels.take(FoldedNorm(norm, copy, inverse, mean), linear, vectors, tile)

        found: dict[str, float] = {}
        for action, tiles, names in (
            ("leave", LEAVE, ("proj", "down")),
            ("add", ADD, ("proj", "down")),
            ("take", TAKE, ("qkv", "up")),
        ):
            for name in names:
                use = f"{action} {name}"
                for text in tiles:
                    tile = Tile.parse(text)
                    if self._left_out(use, tile):
                        continue
                    hidden.normal_()
                    calls = depth if rows <= 8192 else 6
                    spent = microseconds(partial(step, use, tile), calls=calls)
                    if use not in found or spent < found[use]:
                        found[use], self.tiles[use] = spent, tile
        return found

    def _left_out(self, use: str, tile: Tile) -> bool:
        action = use.split()[0]
        return any(
            plan is None and key[0].startswith(action) and key[1] == tile
            for key, plan in self.kernels.plans.items()
        )


def run(model: str, arguments: argparse.Namespace, kernels: Kernels) -> list[dict[str, Any]]:
    device = kernels.device
    config = config_named(model, tiny=arguments.tiny, depth=arguments.depth)
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    folding = Folding(random_tower(config, device, dtype), kernels, arguments.pdl)
    combinations = list(pairs_of(WAYS, WAYS))
    header = "".join(f"{f'{proj}/{down}':>15}" for proj, down in combinations)
    print(
        f"\n{model}: rate over today's, with how proj/down are run (error over today's; where that "
        "is not known, what differs from today's)"
    )
    print(f"{'workload':14}{'ms':>8}{'error':>10}{header}", flush=True)
    rows = []
    for workload in workloads_of(config, arguments.workloads, tiny=arguments.tiny):
        spent = folding.choose_tiles(workload.patches)
        changes: dict[str, Callable[[VisionTower], Any]] = {
            f"{proj}/{down}": partial(folding.changed, proj, down) for proj, down in combinations
        }
        results = take_turns(
            Batch(folding.tower, workload, arguments.attention),
            {"as released": lambda tower: nullcontext(), **changes},
            seconds=arguments.seconds,
        )
        today = results.pop("as released")
        text = f"{workload.name:14}{today.timing.rate_ms:8.2f}"
        text += f"{today.error:10.2e}" if today.error is not None else f"{'-':>10}"
        for result in results.values():
            error = f"{result.off:.0e}"
            if result.error is not None and today.error and dtype != torch.float32:
                error = f"{result.error / today.error:.2f}"
            text += f"{f'{result.ratio:.3f} ({error})':>15}"
        print(text, flush=True)
        tiles = "  ".join(f"{use} {folding.tiles[use]} {spent[use]:.0f}us" for use in spent)
        print(f"{'':4}{tiles}", flush=True)
        rows.append(
            {
                "model": model,
                "workload": workload.name,
                "today_ms": today.timing.rate_ms,
                "today_error": today.error,
                "tiles": {use: str(folding.tiles[use]) for use in spent},
                "tile_us": spent,
                "ways": {
                    name: {"ratio": each.ratio, "error": each.error, "off": each.off}
                    for name, each in results.items()
                },
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="qwen3-vl-8b,qwen2.5-vl-7b")
    parser.add_argument("--workloads", default=WORKLOADS)
    parser.add_argument("--seconds", type=float, default=0.6, help="of every way on a workload")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--depth", type=int, help="layers; default: the model's")
    parser.add_argument("--pdl", action="store_true", help="the small kernel starts early")
    parser.add_argument("--tiny", action="store_true", help="small towers in float32, on a CPU")
    parser.add_argument("--compile-only", action="store_true", help="for sm_90a, without a GPU")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    os.environ.setdefault("QUACK_COMPILE_WORKERS", str(os.cpu_count()))
    keep_kernels()
    if arguments.compile_only:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # whatever GPUs there are stay out of it
        with compiling_for(CHIPS["sm_90a"]):
            compile_all(Kernels(torch.device("cuda", 0)), workers=False)
        return
    on_gpu = torch.cuda.is_available() and not arguments.tiny
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    kernels = Kernels(device)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        if on_gpu:
            compile_all(kernels, workers=True)
        for model in arguments.models.split(","):
            rows += run(model, arguments, kernels)
            if arguments.json is not None:
                where = torch.cuda.get_device_name() if on_gpu else "cpu"
                text = json.dumps({"device": where, "rows": rows}, indent=1)
                arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
