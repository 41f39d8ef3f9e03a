"""What fa4_tiles.py does in children: it compiles variants, or checks and times them.

    python scripts/tune/fa4_runs.py compile 72:192x112r,... FOLDER PROCESSORS
    python scripts/tune/fa4_runs.py measure 72:192x112r,... FOLDER CHECKED SECONDS

Each says what it does in lines of JSON. Legend: T tokens, H heads, Dh head size, S segments.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fa4_variants import Variant

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

HEADS = 16
SHAPES = ([1296], [1296] * 32, [3080] * 16, [16384], [32768])
CHECK = [1296, 200, 65, 1, 3080, 112, 113, 0, 0]


def tflops(lengths: list[int], head_dim: int, us: float) -> float:
    return 4 * sum(n * n for n in lengths) * HEADS * head_dim / us / 1e6


def named(lengths: list[int]) -> str:
    return f"{len(lengths)}x{lengths[0]}"


def call_kernel(variant: Variant, qkv: Any, bounds: Any, longest: int, out: Any) -> None:
    from flash_attn.cute import interface

    q, k, v = qkv.unbind(1)
    interface._flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        out=out,
        tile_mn=(variant.rows, variant.keys),
        mma_pv_is_rs=variant.p_in_registers,
        intra_wg_overlap=variant.overlap,
    )


def compile_here(folder: Path, names: list[str], processors: int) -> None:
    """Objects of "72:192x112r", ... into `folder`; one line of JSON for each to stdout."""
    os.environ["CUTE_DSL_KEEP"] = "cubin"
    os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] = "0"
    dumps = Path(tempfile.mkdtemp())
    os.environ["CUTE_DSL_DUMP_DIR"] = str(dumps)
    import torch

    from vitrt.kernels.ahead import CHIPS, compiling_for

    with compiling_for(CHIPS["sm_90a"]):
        from fa4_parts import compiling
        from flash_attn.cute import interface

        kept = interface._flash_attn_fwd.compile_cache
        for name in names:
            began = time.monotonic()
            head_dim, _, text = name.partition(":")
            result: dict[str, Any] = {"name": name}
            try:
                variant = Variant.parse(text)
                qkv, out = (
                    torch.empty(*shape, HEADS, int(head_dim), dtype=torch.bfloat16, device="cuda")
                    for shape in ((2592, 3), (2592,))
                )
                bounds = torch.empty(3, dtype=torch.int32, device="cuda")
                result["shared"] = variant.shared_memory(int(head_dim))
                if result["shared"] > 226 * 1024:
                    raise ValueError(f"{result['shared']} bytes of shared memory")
                with compiling(variant, int(head_dim), processors):
                    call_kernel(variant, qkv, bounds, 1296, out)
                (kernel,) = kept.cache.values()
                kernel.export_to_c(
                    object_file_path=str(object_of(folder, name)), function_name="func"
                )
                result |= usage_of(dumps)
            except Exception as error:  # of any kind: the variant is left out, by its name
                result["error"] = f"{type(error).__name__}: {error}"[:300]
            kept.clear()
            for each in dumps.iterdir():
                each.unlink()
            print(json.dumps(result | {"seconds": time.monotonic() - began}), flush=True)
    dumps.rmdir()


def object_of(folder: Path, name: str) -> Path:
    return folder / (re.sub(r"[:/+]", "_", name) + ".o")


def usage_of(dumps: Path) -> dict[str, int]:
    """Bytes that a thread spills and how often it waits for products (more than a dozen: for each
    of them), where Triton's cuobjdump is at hand; nothing where it is not.
    """
    from triton import knobs

    with suppress(Exception):
        (cubin,) = dumps.glob("*.cubin")
        tool = str(knobs.nvidia.cuobjdump.path)
        said = subprocess.run(
            [tool, "--dump-resource-usage", "-sass", str(cubin)], capture_output=True, text=True
        ).stdout
        waits = said.count("WARPGROUP.DEPBAR")
        if found := re.search(r"STACK:(\d+)", said):
            return {"spilled": int(found[1]), "waits": waits}
    return {}


class Only:
    """In place of the package's cache: whatever it asks for is this kernel."""

    def __init__(self, kernel: Callable[..., None]) -> None:
        self.kernel = kernel

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: object) -> Callable[..., None]:
        return self.kernel


def loaded(folder: Path, name: str) -> Callable[[Any, Any, int, Any], None]:
    """attend(qkv [T, 3, H, Dh], bounds [S + 1], longest, out [T, H, Dh]) of a variant."""
    from flash_attn.cute import interface

    module = interface.cute.runtime.load_module(str(object_of(folder, name)), enable_tvm_ffi=True)
    only, variant = Only(module.func), Variant.parse(name.partition(":")[2])

    def attend(qkv: Any, bounds: Any, longest: int, out: Any) -> None:
        interface._flash_attn_fwd.compile_cache = only
        call_kernel(variant, qkv, bounds, longest, out)

    return attend


def bounds_of(lengths: list[int], device: str) -> Any:
    import numpy as np
    import torch

    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return torch.as_tensor(ends, device=device)


def hard_case(head_dim: int, device: str) -> tuple[Any, Any]:
    """qkv of the segments in CHECK and its attention in float32 [T, H, Dh].

    Scores of the first segment spread over tens; those of the fifth grow towards the first keys,
    which the kernel reads last.
    """
    import torch

    torch.manual_seed(head_dim)
    qkv = torch.randn(sum(CHECK), 3, HEADS, head_dim, device=device)
    qkv[: CHECK[0], 0] *= 8
    first = sum(CHECK[:4])
    qkv[first : first + CHECK[4], 1] *= torch.linspace(12, 0.1, CHECK[4], device=device)[
        :, None, None
    ]
    qkv = qkv.bfloat16()
    parts = []
    for part in qkv.float().split(CHECK):
        q, k, v = part.permute(1, 2, 0, 3)
        parts.append(((q @ k.mT * head_dim**-0.5).softmax(-1) @ v).transpose(0, 1))
    return qkv, torch.cat(parts)


def say(**result: object) -> None:
    print(json.dumps(result), flush=True)


def measure(folder: Path, names: list[str], checked: set[str], limit: float) -> None:
    """Check what is not checked, then time every shape; says what it does before it does it."""
    import torch

    deadline = time.monotonic() + limit
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernels = {}
    for name in names:
        say(begin=name)
        kernels[name] = loaded(folder, name)
    for head_dim in sorted({int(name.partition(":")[0]) for name in names}):
        mine = [name for name in names if name.startswith(f"{head_dim}:")]
        qkv, expected = hard_case(head_dim, device)
        bounds = bounds_of(CHECK, device)
        for name in [name for name in mine if name not in checked]:
            say(begin=name)
            out = torch.full_like(expected, float("nan"), dtype=torch.bfloat16)
            kernels[name](qkv, bounds, max(CHECK), out)
            error = out.float() - expected
            say(
                checked=name,
                largest=float(error.abs().max()),
                relative=float(error.norm() / expected.norm()),
            )
    for head_dim in sorted({int(name.partition(":")[0]) for name in names}):
        mine = [name for name in names if name.startswith(f"{head_dim}:")]
        for lengths in SHAPES:
            if time.monotonic() > deadline:
                say(say=f"no time for {head_dim}:{named(lengths)}")
                continue
            time_shape(head_dim, lengths, {name: kernels[name] for name in mine}, deadline)


def time_shape(head_dim: int, lengths: list[int], kernels: dict[str, Any], deadline: float) -> None:
    """Median microseconds of every kernel, and of a product of 8192^3, in turns."""
    import torch
    from graph_timing import graph_of

    tokens = sum(lengths)
    shape = (tokens, 3, HEADS, head_dim)
    copies = max(2, min(8, round(100e6 / (tokens * 3 * HEADS * head_dim * 2))))
    qkvs = [torch.randn(*shape, device="cuda").bfloat16() for _ in range(copies)]
    out = torch.empty(tokens, HEADS, head_dim, dtype=torch.bfloat16, device="cuda")
    bounds = bounds_of(lengths, "cuda")
    calls = max(1, min(20, round(2000 / (tflops(lengths, head_dim, 1.0) / 450))))
    graphs: dict[str, Any] = {}
    for name, attend in kernels.items():
        say(begin=name)
        graphs[name] = graph_of(
            lambda i, attend=attend: attend(qkvs[i % copies], bounds, max(lengths), out), calls
        )
    square = torch.randn(8192, 8192, device="cuda").bfloat16()
    result = torch.empty_like(square)
    graphs["product"] = graph_of(lambda i: torch.mm(square, square, out=result), 1)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(8):
        for name, graph in graphs.items():
            say(begin=name)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / (calls if name != "product" else 1))
        if time.monotonic() > deadline:
            break
    medians = {name: statistics.median(each[1:] or each) for name, each in times.items()}
    say(timed=f"{head_dim}:{named(lengths)}", us=medians)


if __name__ == "__main__":
    what, names, folder, first, *rest = sys.argv[1:]
    if what == "compile":
        compile_here(Path(folder), names.split(","), int(first))
    else:
        measure(Path(folder), names.split(","), set(first.split(",")), float(rest[0]))
