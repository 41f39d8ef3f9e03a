"""A program: launch Triton kernels for an A10 that is not there, and print their names as JSON.

`ahead` launches on tensors without memory, as `vitrt compile` does; `real` on tensors in this
machine's memory, whose addresses Triton looks at as it does on a GPU.
"""

from __future__ import annotations

import json
import sys
from unittest import mock

import torch

from vitrt.kernels import flash_attention, norm, rope, window_attention
from vitrt.kernels.ahead import CHIPS, Binary, _Driver, compiling_for
from vitrt.kernels.segments import Rotary, Segments

HEADS, HEAD_DIM, WIDTH, T = 16, 80, 1280, 256


def launch(device: str) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    counts = empty(4, dtype=torch.int32)  # views into it are not aligned, as in a packed plan
    tiles, bounds = empty(2, 3, dtype=torch.int32), empty(3, dtype=torch.int32)
    count, valid = counts.narrow(0, 1, 1), counts.narrow(0, 0, 1)
    full = Segments(bounds, count, tiles, counts.narrow(0, 2, 1), (128, 128), 128)
    window = Segments(bounds, counts.narrow(0, 3, 1), None, None, (64, 64), 64)
    table = empty(64, 20, dtype=torch.float32)
    rotary = Rotary(empty(T, 2, dtype=torch.int32), table, table, valid)
    qkv, out = empty(T, 3, HEADS, HEAD_DIM), empty(T, WIDTH)
    flash_attention._flash_triton(qkv, full, out)
    window_attention._window_triton(qkv, window, rotary, out)
    rope._rope_triton(qkv, rotary)
    hidden, weight = empty(T, WIDTH, dtype=torch.float32), empty(WIDTH)
    norm._norm_triton(out, weight, None, 1e-6, residual=hidden, delta_bias=weight, total=hidden)


def main(how: str) -> None:
    chip, loaded = CHIPS["sm_86"], list[Binary]()
    if how == "ahead":
        with compiling_for(chip) as loaded:
            launch("cuda")
    else:
        from triton.runtime.driver import driver

        with mock.patch.object(driver, "_active", _Driver(chip, loaded)):
            launch("cpu")
    print(json.dumps([binary.name for binary in loaded]))


if __name__ == "__main__":
    main(sys.argv[1])
