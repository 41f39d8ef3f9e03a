"""Time every memory-bound kernel, and attention, as a share of the copy bandwidth of the same run.

    python scripts/bench/kernel_rates.py              the kernels as they ship
    python scripts/bench/kernel_rates.py --tune       every tiling worth trying, at two sizes
    python scripts/bench/kernel_rates.py --cpu        a dry run through Triton's interpreter

Medians over rotating inputs, checked against the reference (relative L2) with NaN in the output
beforehand. Up to 4096 patches the calls are replayed from a CUDA graph, which hides the launches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from vitrt.bench.timing import rates
from vitrt.kernels import (
    activation,
    flash_attention,
    norm,
    patchify,
    pos_embed,
    rope,
    window_attention,
)
from vitrt.kernels.segments import Rotary, Segments, tile_list

SIZES = (256, 1296, 3080, 41472, 49280)
TUNED_SIZES = (1296, 41472)
CUDA = torch.device("cuda")
GRAPH_TOKENS = 4096  # up to here a launch takes longer than the kernel
CALLS_PER_GRAPH = 20
ROTATE_BYTES = 192 << 20  # several times a second-level cache
EPS = 1e-6


@dataclass
class Work:
    """A kernel's inputs at one size."""

    run: Callable[..., Any]  # takes the tiling's keyword arguments
    expected: Callable[[], Tensor]  # from the same inputs, before `run` has seen them
    result: Callable[[], Tensor]  # what `run` wrote
    traffic: int  # bytes that must be read or written once


@dataclass
class Kernel:
    name: str
    make: Callable[[int, torch.device, torch.dtype], Work]
    tilings: tuple[dict[str, Any], ...] = ()


def grid(**choices: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    return tuple(
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    )


def poisoned(like: Tensor) -> Tensor:
    return torch.full_like(like, torch.nan)


def size_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def rotary_of(tokens: int, head_dim: int, device: torch.device) -> Rotary:
    inverse = 10000.0 ** -(torch.arange(head_dim // 4, device=device) / (head_dim / 4))
    angles = torch.arange(128, device=device)[:, None] * inverse
    positions = torch.randint(0, 128, (tokens, 2), dtype=torch.int32, device=device)
    return Rotary(positions, angles.cos(), angles.sin())


def rope_work(head_dim: int) -> Callable[[int, torch.device, torch.dtype], Work]:
    def make(tokens: int, device: torch.device, dtype: torch.dtype) -> Work:
        qkv = torch.randn(tokens, 3, 16, head_dim, device=device).to(dtype)
        rotary = rotary_of(tokens, head_dim, device)

        def expected() -> Tensor:
            turned = qkv.clone()
            rope.rope_ref(turned, rotary)
            return turned

        def run(**tiling: Any) -> None:
            rope._rope_triton(qkv, rotary, **tiling)

        return Work(run, expected, lambda: qkv, 2 * size_of(qkv[:, :2]))

    return make


def norm_work(
    width: int, centre: bool, add: bool, share: int = 1
) -> Callable[[int, torch.device, torch.dtype], Work]:
    """`share` patches make one row (4 in a merger)."""

    def make(tokens: int, device: torch.device, dtype: torch.dtype) -> Work:
        tokens = max(tokens // share, 1)
        # Hidden states are float32 beside products in 16 bits; without an add, x is one of them.
        x, residual = (torch.randn(tokens, width, device=device) for _ in range(2))
        x = x.to(dtype) if add else x
        weight, bias, delta_bias = (torch.randn(width, device=device).to(dtype) for _ in range(3))
        out, total = poisoned(x.to(dtype)), poisoned(residual)
        fused = {"residual": residual, "delta_bias": delta_bias, "total": total} if add else {}

        def expected() -> Tensor:
            value = norm.add_ref(x, delta_bias, residual) if add else x
            return norm.norm_ref(value, weight, bias if centre else None, EPS)

        def run(**tiling: Any) -> None:
            norm._norm_triton(x, weight, bias if centre else None, EPS, out=out, **fused, **tiling)

        moved = size_of(x, out, residual, total) if add else size_of(x, out)
        return Work(run, expected, lambda: out, moved)

    return make


def swiglu_work(width: int) -> Callable[[int, torch.device, torch.dtype], Work]:
    def make(tokens: int, device: torch.device, dtype: torch.dtype) -> Work:
        x = torch.randn(tokens, 2 * width, device=device).to(dtype)
        out = poisoned(x[:, :width].contiguous())

        def run(**tiling: Any) -> None:
            activation._swiglu_triton(x, None, out, **tiling)

        return Work(run, lambda: activation.swiglu_ref(x), lambda: out, size_of(x, out))

    return make


def gelu_work(
    width: int, kind: activation.GeluKind, share: int = 1
) -> Callable[[int, torch.device, torch.dtype], Work]:
    def make(tokens: int, device: torch.device, dtype: torch.dtype) -> Work:
        x = torch.randn(max(tokens // share, 1), width, device=device).to(dtype)
        bias, out = torch.randn(width, device=device).to(dtype), poisoned(x)

        def run(**tiling: Any) -> None:
            activation._bias_act_triton(x, bias, kind, out, **tiling)

        expected = lambda: activation.bias_act_ref(x, bias, kind)  # noqa: E731
        return Work(run, expected, lambda: out, size_of(x, out))

    return make


def patchify_work(patch: int) -> Callable[[int, torch.device, torch.dtype], Work]:
    def make(tokens: int, device: torch.device, dtype: torch.dtype) -> Work:
        columns = 36
        rows = -(-tokens // columns)
        row_bytes = columns * patch * 3
        pixels = torch.randint(
            0, 256, (rows * patch * row_bytes,), dtype=torch.uint8, device=device
        )
        index = torch.arange(tokens, device=device)
        start = index // columns * patch * row_bytes + index % columns * patch * 3
        row = torch.full_like(index, row_bytes)
        sources = torch.stack([start, row, torch.zeros_like(index)], 1).int()
        table = torch.randn(3, 256, device=device)
        out = torch.full((tokens, 6 * patch * patch), torch.nan, device=device, dtype=dtype)

        def run(**tiling: Any) -> None:
            patchify._patchify_triton(pixels, sources, table, patch, 2, out, **tiling)

        def expected() -> Tensor:
            return patchify.patchify_ref(pixels, sources, table, patch, 2, poisoned(out))

        return Work(run, expected, lambda: out, size_of(pixels, out))

    return make


def position_work(width: int) -> Callable[[int, torch.device, torch.dtype], Work]:
    def make(tokens: int, device: torch.device, dtype: torch.dtype) -> Work:
        x = torch.randn(tokens, width, device=device).to(dtype)
        table = torch.randn(2304, width, device=device).to(dtype)
        first = torch.arange(tokens, device=device) % 2255
        taps = torch.stack([first, first + 1, first + 48, first + 49], 1).int()
        weights = torch.rand(tokens, 4, device=device)

        def expected() -> Tensor:
            value = x.clone()
            pos_embed.add_position_embedding_ref(value, table, taps, weights)
            return value

        def run(**tiling: Any) -> None:
            pos_embed._position_triton(x, table, taps, weights, **tiling)

        return Work(run, expected, lambda: x, 2 * size_of(x))

    return make


def segments_of(tokens: int, length: int, device: torch.device) -> Segments:
    lengths = (length,) * (tokens // length) + ((tokens % length,) if tokens % length else ())
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    tiles = torch.from_numpy(tile_list(ends.numpy())).to(device) if length > 128 else None
    return Segments(
        cu_seqlens=ends.to(device),
        count=torch.tensor([len(lengths)], dtype=torch.int32, device=device),
        tiles=tiles,
        tile_count=None
        if tiles is None
        else torch.tensor([len(tiles)], dtype=torch.int32, device=device),
        lengths=lengths,
        max_seqlen=min(length, tokens),
    )


def attention_work(head_dim: int, length: int) -> Callable[[int, torch.device, torch.dtype], Work]:
    """Windows (length 64, RoPE inside) or full attention in segments of `length`."""

    def make(tokens: int, device: torch.device, dtype: torch.dtype) -> Work:
        qkv = torch.randn(tokens, 3, 16, head_dim, device=device).to(dtype)
        out = torch.full((tokens, 16 * head_dim), torch.nan, device=device, dtype=dtype)
        rotary, segments = rotary_of(tokens, head_dim, device), segments_of(tokens, length, device)

        def run(**tiling: Any) -> None:
            if length == 64:
                window_attention._window_triton(qkv, segments, rotary, out, **tiling)
            else:
                flash_attention._flash_triton(qkv, segments, out, **tiling)

        def expected() -> Tensor:
            if length == 64:
                return window_attention.window_attention_ref(qkv, segments, rotary, poisoned(out))
            return flash_attention.flash_attention_ref(qkv, segments, poisoned(out))

        return Work(run, expected, lambda: out, size_of(qkv, out))

    return make


def kernels() -> Iterator[Kernel]:
    heads = (*grid(block_h=(32, 16), spread=(2, 4)), {"block_h": 8, "spread": 2})
    rows = grid(warps=(1, 2, 4))
    wide_rows = grid(warps=(4, 8, 16))
    blocks = tuple(
        {"block": block, "warps": warps}
        for block, warps in ((512, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8))
    )
    patches = grid(rows=(1, 2), warps=(2, 4, 8))
    for head_dim in (72, 80, 64):
        yield Kernel(f"rope q k, 16 x {head_dim}", rope_work(head_dim), heads)
    yield Kernel("rms_norm 1280", norm_work(1280, False, False), rows)
    yield Kernel("layer_norm 1152", norm_work(1152, True, False), rows)
    yield Kernel("add_rms_norm 1280", norm_work(1280, False, True), rows)
    yield Kernel("add_layer_norm 1152", norm_work(1152, True, True), rows)
    yield Kernel("layer_norm 4608, T/4", norm_work(4608, True, False, share=4), wide_rows)
    yield Kernel("swiglu 3456", swiglu_work(3456), blocks)
    yield Kernel("bias gelu_tanh 4304", gelu_work(4304, "gelu_tanh"), blocks)
    yield Kernel("bias gelu 4608, T/4", gelu_work(4608, "gelu", share=4), blocks)
    for patch in (14, 16):
        yield Kernel(f"patchify {patch}", patchify_work(patch), patches)
    yield Kernel("position embedding 1152", position_work(1152), grid(warps=(1, 2, 4)))
    windows = tuple({"tiling": tiling} for tiling in window_attention.VARIANTS)
    yield Kernel("window attention 16 x 80", attention_work(80, 64), windows)
    flash = tuple({"tiling": tiling} for tiling in flash_attention.VARIANTS)
    for head_dim in (72, 80):
        name = f"flash attention 16 x {head_dim}, 1296"
        yield Kernel(name, attention_work(head_dim, 1296), flash)


def median_ms(call: Callable[[], Any], repeats: int, device: torch.device = CUDA) -> float:
    """Of `repeats` calls, queued without a pause."""
    return statistics.median(rates(lambda _: call(), [torch.empty(0)], device, repeats))


def copy_bandwidth() -> float:
    """Bytes read and written by a device copy of 1 GiB, a second."""
    source = torch.randint(0, 256, (1 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), 20) * 1e3


def time_works(works: list[Work], tiling: dict[str, Any], tokens: int) -> float:
    """Microseconds a call."""
    device = works[0].result().device
    if device.type == "cpu":
        return median_ms(lambda: works[0].run(**tiling), 1, device) * 1e3
    rotation = itertools.cycle(works)
    for _ in range(3):
        next(rotation).run(**tiling)
    torch.cuda.synchronize()
    if tokens > GRAPH_TOKENS:
        return median_ms(lambda: next(rotation).run(**tiling), 30) * 1e3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_PER_GRAPH):
            next(rotation).run(**tiling)
    graph.replay()
    return median_ms(graph.replay, 20) * 1e3 / CALLS_PER_GRAPH


def relative_error(actual: Tensor, expected: Tensor) -> float:
    expected = expected.float()
    return float((actual.float() - expected).norm() / expected.norm())


def bench(
    kernel: Kernel, tokens: int, tilings: tuple[dict[str, Any], ...], device: torch.device
) -> Iterator[dict[str, Any]]:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for tiling in tilings:
        first = kernel.make(tokens, device, dtype)
        row = {
            "kernel": kernel.name,
            "tokens": tokens,
            "tiling": {name: str(value) for name, value in tiling.items()},
        }
        try:
            expected = first.expected()
            first.run(**tiling)
            row["error"] = relative_error(first.result(), expected)
            del expected
            sets = 1 if device.type == "cpu" else min(8, 1 + ROTATE_BYTES // first.traffic)
            works = [first, *(kernel.make(tokens, device, dtype) for _ in range(sets - 1))]
            row["microseconds"] = time_works(works, tiling, tokens)
            row["bandwidth"] = first.traffic / row["microseconds"] * 1e6
        except Exception as error:  # one tiling that cannot run must not end the table
            row["failure"] = f"{type(error).__name__}: {error}".splitlines()[0]
        yield row


def show(row: dict[str, Any], ceiling: float | None) -> None:
    tiling = " ".join(f"{name}={value}" for name, value in row["tiling"].items())
    name = f"{row['kernel']:28s} {row['tokens']:6d}"
    if "failure" in row:
        print(f"{name}  {row['failure'][:90]}  {tiling}", flush=True)
        return
    share = "" if ceiling is None else f"{row['bandwidth'] / ceiling:6.1%} "
    wrong = "" if row["error"] < 5e-3 else "  WRONG"
    print(
        f"{name} {row['microseconds']:9.2f} us {row['bandwidth'] / 1e9:7.0f} GB/s {share}"
        f" error {row['error']:.1e}{wrong}  {tiling}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="dry run without attention: 70 patches")
    parser.add_argument("--tune", action="store_true", help="try the grid of tilings")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--sizes", type=int, nargs="*", help="patches")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    device = torch.device("cpu" if options.cpu else "cuda")
    sizes = options.sizes or ((70,) if options.cpu else TUNED_SIZES if options.tune else SIZES)
    ceiling = None if options.cpu else copy_bandwidth()
    if ceiling is not None:
        print(f"{torch.cuda.get_device_name()}: copy {ceiling / 1e9:.0f} GB/s, read and written")
    rows = []
    for kernel in kernels():
        if options.only not in kernel.name or (options.cpu and "attention" in kernel.name):
            continue
        tilings = kernel.tilings if options.tune else ({},)
        for tokens in sizes:
            for row in bench(kernel, tokens, tilings, device):
                show(row, ceiling)
                rows.append(row)
    if options.json:
        options.json.write_text(json.dumps({"copy_bandwidth": ceiling, "rows": rows}, indent=1))
    return int(any(not row.get("error", 1.0) < 5e-3 for row in rows))


if __name__ == "__main__":
    with torch.inference_mode():
        raise SystemExit(main())
