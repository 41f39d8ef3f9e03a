#!/usr/bin/env python3
"""Other tiles and parts for FlashAttention-4's Hopper kernel, beside its own, on this GPU.

    python scripts/tune/fa4_tiles.py [--json FILE] [--heads 72,80] [--variants A,B] [--time-limit S]
    python scripts/tune/fa4_tiles.py --compile-only      what ptxas says of each; needs no GPU

Every variant (fa4_parts.py) is compiled by as many processes as there are processors, compared with
attention in float32 on segments whose largest scores come late, and timed in CUDA graphs in turns
with the others. The processes that run kernels are children: one that hangs or faults costs its
variant alone. The first column is the package's own choice.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fa4_variants import Variant, variants_of

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

HEADS = 16
SHAPES = ([1296], [1296] * 32, [3080] * 16, [16384], [32768])
CHECK = [1296, 200, 65, 1, 3080, 112, 113]
_SILENT = 25.0  # seconds without a word from a child that runs kernels: it hangs


def tflops(lengths: list[int], head_dim: int, us: float) -> float:
    return 4 * sum(n * n for n in lengths) * HEADS * head_dim / us / 1e6


def named(lengths: list[int]) -> str:
    return f"{len(lengths)}x{lengths[0]}"


# Compiling


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
    """Bytes that a thread spills, where Triton's cuobjdump is at hand; nothing where it is not."""
    from triton import knobs

    for cubin in dumps.glob("*.cubin"):
        with suppress(Exception):
            tool = str(knobs.nvidia.cuobjdump.path)
            said = subprocess.run(
                [tool, "--dump-resource-usage", str(cubin)], capture_output=True, text=True
            )
            if found := re.search(r"REG:(\d+) STACK:(\d+)", said.stdout):
                return {"registers": int(found[1]), "spilled": int(found[2])}
    return {}


def compile_all(folder: Path, names: list[str], processors: int) -> dict[str, dict[str, Any]]:
    """What became of each; those that lie in `folder` from an earlier run are taken as they are."""
    notes = folder / "compiled.json"
    kept = json.loads(notes.read_text()) if notes.exists() else {}
    results = {name: kept[name] for name in names if name in kept}
    names = [name for name in names if name not in results]
    workers = min(os.cpu_count() or 1, len(names))
    children = [
        child("--compile", ",".join(names[i::workers]), folder, processors=processors)
        for i in range(workers)
    ]
    for each in children:
        said, complaint = each.communicate()
        for line in said.splitlines():
            with suppress(json.JSONDecodeError):
                result = json.loads(line)
                results[result["name"]] = result
        if each.returncode:
            print(f"a compiling process ended: {complaint[-1500:]}", flush=True)
    if names:
        with suppress(OSError):  # a folder that was brought along may be read-only
            notes.write_text(json.dumps(kept | results))
    return results


def child(option: str, value: str, folder: Path, **more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", __file__, option, value, "--folder", str(folder)]
    for name, each in more.items():
        command += [f"--{name}", str(each)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


# Running: in a child


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


# Telling


def lines_of(process: subprocess.Popen[str], silent: float) -> Iterator[dict[str, Any]]:
    """What a child says; it is ended when it says nothing for `silent` seconds."""
    lines: queue.Queue[str] = queue.Queue()
    assert process.stdout is not None
    output = process.stdout

    def read() -> None:
        for line in output:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=silent)
        except queue.Empty:
            process.kill()
            return
        if not line:
            return
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


def run_all(folder: Path, names: list[str], until: float) -> dict[str, Any]:
    """Errors and times of the variants; those that hang or fault are left out, one a try."""
    found: dict[str, Any] = {"checked": {}, "timed": {}, "failed": {}}
    while names and time.monotonic() < until:
        process = child(
            "--measure",
            ",".join(names),
            folder,
            checked=",".join(found["checked"]),
            limit=until - time.monotonic(),
        )
        current = None
        for line in lines_of(process, _SILENT):
            current = line.get("begin", current)
            if "checked" in line:
                found["checked"][line["checked"]] = line
            if "timed" in line:
                found["timed"][line["timed"]] = line["us"]
            if str(line.get("say", "")).startswith("no time"):
                print(line["say"], flush=True)
        complaint = process.stderr.read() if process.stderr else ""
        process.wait()
        if process.returncode == 0:
            break
        reason = "hangs" if process.returncode < 0 else complaint.strip()[-300:]
        print(f"{current or 'loading'}: {reason}", flush=True)
        found["failed"][current or "loading"] = reason
        if current is None:
            break
        names = [name for name in names if name != current]
    return found


def table(
    compiled: dict[str, dict[str, Any]], found: dict[str, Any], head_dim: int, names: list[str]
) -> str:
    """TFLOP/s by variant and shape, with each variant's error and what it spills."""
    shapes = [each for each in SHAPES if f"{head_dim}:{named(each)}" in found["timed"]]
    rows = [
        f"head size {head_dim}, TFLOP/s at that size".ljust(40)
        + "".join(f"{named(each):>10}" for each in shapes)
        + "   error  largest  spilled"
    ]
    for text in [*names, "product"]:
        name = text if text == "product" else f"{head_dim}:{text}"
        row = f"{text:<40}"
        for lengths in shapes:
            us = found["timed"][f"{head_dim}:{named(lengths)}"].get(name)
            rate = us and (2 * 8192**3 / us / 1e6 if text == "product" else None)
            rate = rate or (us and tflops(lengths, head_dim, us))
            row += f"{rate:10.1f}" if rate else f"{'-':>10}"
        check = found["checked"].get(name)
        if check:
            row += f"{check['relative']:8.4f}{check['largest']:9.4f}"
        problem = compiled.get(name, {}).get("error") or found["failed"].get(name)
        spilled = compiled.get(name, {}).get("spilled")
        row += f"{spilled:9}" if spilled is not None else ""
        rows.append(f"{row}  {problem}" if problem else row)
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", default="80,72", help="head sizes")
    parser.add_argument("--variants", help="instead of all, separated by commas")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--time-limit", type=float, default=145.0, help="seconds for all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="objects stay there, and are taken from there")
    parser.add_argument("--processors", type=int, default=132, help="of the GPU")
    for hidden in ("--compile", "--measure", "--checked"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        compile_here(args.folder, args.compile.split(","), args.processors)
        return
    if args.measure:
        checked = set(args.checked.split(","))
        measure(args.folder, args.measure.split(","), checked, args.limit)
        return
    until = time.monotonic() + args.time_limit
    wanted = {
        int(head): args.variants.split(",") if args.variants else variants_of(int(head))
        for head in args.heads.split(",")
    }
    names = [f"{head}:{each}" for head, all_of in wanted.items() for each in all_of]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        compiled = compile_all(folder, names, args.processors)
        left = until - time.monotonic()
        print(f"{len(compiled)} of {len(names)} compiled, {left:.0f} s left", flush=True)
        found: dict[str, Any] = {"checked": {}, "timed": {}, "failed": {}}
        if not args.compile_only:
            fit = [name for name in names if "error" not in compiled.get(name, {"error": ""})]
            found = run_all(folder, fit, until)
    for head, all_of in wanted.items():
        print(table(compiled, found, head, all_of), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"compiled": compiled, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
