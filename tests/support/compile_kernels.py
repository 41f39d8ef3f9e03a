"""A program: compile the Triton kernels for GPU architectures, and print what each takes.

`python -m tests.support.compile_kernels main sm_80 sm_86` prints JSON: architecture -> case ->
[[kernel, warps, bytes of shared memory, registers and bytes of stack of a thread], ...]. A process
of its own, since in the tests' Triton interprets.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

import torch

from vitrt.kernels import (
    activation,
    flash_attention,
    gemm_triton,
    norm,
    patchify,
    pos_embed,
    rope,
    short_attention,
    split_product,
    tail_attention,
    to_e4m3,
    window_attention,
)
from vitrt.kernels.ahead import CHIPS, Binary, compiling_for
from vitrt.kernels.gemm_table import KINDS, Kind, SplitTile
from vitrt.kernels.segments import TILE_ROWS, Rotary, Segments

BF16, FLOAT, INT = torch.bfloat16, torch.float32, torch.int32
T, HEADS = 256, 16


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def segments(longest: int, tiles: bool) -> Segments:
    count = empty(1, dtype=INT)
    work = empty(2, 3, dtype=INT) if tiles else None
    return Segments(
        empty(3, dtype=INT), count, work, count if tiles else None, (longest,) * 2, longest
    )


def packed(head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    return empty(T, 3, HEADS, head_dim), empty(T, HEADS * head_dim)


def rotary(padded: bool) -> Rotary:
    table = empty(64, 20, dtype=FLOAT)
    return Rotary(empty(T, 2, dtype=INT), table, table, empty(1, dtype=INT) if padded else None)


def full(head_dim: int) -> None:
    qkv, out = packed(head_dim)
    flash_attention.flash_attention(qkv, segments(T, True), out)


def short(head_dim: int, longest: int) -> None:
    qkv, out = packed(head_dim)
    flash_attention.flash_attention(qkv, segments(longest, False), out)


def small_image(head_dim: int) -> None:
    qkv, out = packed(head_dim)
    short_attention.short_attention(qkv, segments(T, True), rotary(False), out)


def shares(n: int, k: int, tile: str) -> None:
    """A product of few rows, and the norm that adds it up."""
    found = split_product.split_product(empty(T, k), empty(n, k), SplitTile.parse(tile))
    norm.add_norm(found, empty(n), empty(T, n, dtype=FLOAT), empty(n), empty(n), 1e-6)


def windows(head_dim: int) -> None:
    qkv, out = packed(head_dim)
    window_attention.window_attention(qkv, segments(64, False), rotary(False), out)


def last_rows(head_dim: int) -> None:
    qkv, out = packed(head_dim)
    rows = tail_attention.TailRows(empty(2, 3, dtype=INT), empty(1, dtype=INT))
    tail_attention.tail_attention(qkv, rows, out)


def turn(head_dim: int) -> None:
    qkv, _ = packed(head_dim)
    rope.rope_(qkv, rotary(False))
    rope.rope_(qkv, rotary(True))


def norms(width: int, centred: bool) -> None:
    """Alone on hidden states of float32, and after the residual add."""
    x, hidden, weight = empty(T, width), empty(T, width, dtype=FLOAT), empty(width)
    if centred:
        norm.norm(hidden, weight, weight, 1e-6)
        norm.add_norm(x, weight, hidden, weight, weight, 1e-6)
    else:
        norm.norm(hidden, weight, None, 1e-6)
        norm.add_norm(x, weight, hidden, weight, None, 1e-6)


def position(width: int) -> None:
    taps = empty(T, 4, dtype=INT)
    pos_embed.add_position_embedding_(
        empty(T, width), empty(2304, width), taps, empty(T, 4, dtype=FLOAT)
    )


def activations(width: int) -> None:
    x, bias = empty(T, width), empty(width)
    activation.swiglu(x, bias)
    activation.bias_act(x, bias, "gelu")
    activation.bias_act(x, bias, "gelu_tanh")


def patches(patch: int) -> None:
    pixels = empty(9999, dtype=torch.uint8)
    table = empty(2, 3, 256, dtype=FLOAT)
    patchify.patchify(pixels, empty(T, 3, dtype=INT), table, patch, 2, BF16)


def cast(width: int) -> None:
    if torch.cuda.get_device_capability() >= (8, 9):  # what has e4m3 products
        to_e4m3.to_e4m3(empty(T, width), 1.0)


def products(kind: Kind) -> None:
    residual = empty(T, 1152, dtype=FLOAT) if kind == "residual" else None
    gemm_triton.product(kind, empty(T, 4304), empty(1152, 4304), empty(1152), residual)


Case = tuple[Callable[..., None], tuple[int | bool | str, ...]]
MAIN: tuple[Case, ...] = (
    (full, (72,)),
    (full, (80,)),
    (windows, (80,)),
    (small_image, (72,)),
    (shares, (1152, 4304, "64x64x128t/8w4s3")),
    (last_rows, (72,)),
    (turn, (72,)),
    (norms, (1152, True)),
    (norms, (1280, False)),
    (position, (1152,)),
    (activations, (4304,)),
    (patches, (16,)),
    (cast, (1152,)),
    (products, ("residual",)),
)
REST: tuple[Case, ...] = (
    (full, (64,)),
    (full, (128,)),
    *((short, case) for case in ((72, 16), (80, 64), (128, TILE_ROWS))),
    *((windows, (size,)) for size in (72, 128)),
    *((small_image, (size,)) for size in (64, 80, 128)),
    (shares, (1280, 1280, "64x32x64/3w4s4")),
    *((last_rows, (size,)) for size in (80, 128)),
    *((turn, (size,)) for size in (64, 80)),
    *((norms, (width, True)) for width in (768, 4608)),
    (norms, (5120, False)),
    (position, (768,)),
    (activations, (6848,)),
    (patches, (14,)),
    *((products, (kind,)) for kind in KINDS if kind != "residual"),
)


def usage(binary: Binary) -> tuple[int, int]:
    """(registers a thread, bytes of stack a thread, which is what it spills) of a kernel."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


Report = dict[str, list[tuple[str, int, int, int, int]]]


def compile_for(arch: str, cases: tuple[Case, ...]) -> Report:
    report: Report = {}
    with compiling_for(CHIPS[arch]) as loaded:
        for function, arguments in cases:
            first = len(loaded)
            function(*arguments)
            report[f"{function.__name__}{arguments}"] = [
                (binary.name, binary.warps, binary.shared_memory, *usage(binary))
                for binary in loaded[first:]
            ]
    return report


def main(which: str, *archs: str) -> None:
    cases = {"main": MAIN, "rest": REST}[which]
    print(json.dumps({arch: compile_for(arch, cases) for arch in archs}))


if __name__ == "__main__":
    main(*sys.argv[1:])
