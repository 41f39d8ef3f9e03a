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
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fa4_runs import SHAPES, named, tflops
from fa4_variants import variants_of

_SILENT = 25.0  # seconds without a word from a child that runs kernels: it hangs


def compile_all(folder: Path, names: list[str], processors: int) -> dict[str, dict[str, Any]]:
    """What became of each; those that lie in `folder` from an earlier run are taken as they are."""
    notes = folder / "compiled.json"
    kept = json.loads(notes.read_text()) if notes.exists() else {}
    results = {name: kept[name] for name in names if name in kept}
    names = [name for name in names if name not in results]
    workers = min(os.cpu_count() or 1, len(names))
    children = [
        child("compile", names[i::workers], folder, str(processors)) for i in range(workers)
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


def child(what: str, names: list[str], folder: Path, *more: str) -> subprocess.Popen[str]:
    runs = str(Path(__file__).with_name("fa4_runs.py"))
    return subprocess.Popen(
        [sys.executable, "-u", runs, what, ",".join(names), str(folder), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


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
        checked = ",".join(found["checked"])
        process = child("measure", names, folder, checked, str(until - time.monotonic()))
        current = None
        for line in lines_of(process, _SILENT):
            current = line.get("begin", current)
            if "checked" in line:
                found["checked"][line["checked"]] = line
            if "timed" in line:
                found["timed"][line["timed"]] = line["us"]
                rounded = {name: round(us, 1) for name, us in line["us"].items()}
                print(f"microseconds of {line['timed']}: {rounded}", flush=True)
            if str(line.get("say", "")).startswith("no time"):
                print(line["say"], flush=True)
        complaint = process.stderr.read() if process.stderr else ""
        process.wait()
        if process.returncode == 0:
            break
        reason = "hangs" if process.returncode < 0 else " ".join(complaint.split())[-300:]
        print(f"{current or 'loading'}: {reason}", flush=True)
        found["failed"][current or "loading"] = reason
        if current is None:
            break
        names = [name for name in names if name != current]
    return found


def table(
    compiled: dict[str, dict[str, Any]], found: dict[str, Any], head_dim: int, names: list[str]
) -> str:
    """TFLOP/s by variant and shape, with each variant's error and its compiler's figures."""
    shapes = [each for each in SHAPES if f"{head_dim}:{named(each)}" in found["timed"]]
    rows = [
        f"head size {head_dim}, TFLOP/s at that size".ljust(40)
        + "".join(f"{named(each):>10}" for each in shapes)
        + "   error  largest  spilled    waits"
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
        row += f"{check['relative']:8.4f}{check['largest']:9.4f}" if check else f"{'':17}"
        problem = compiled.get(name, {}).get("error") or found["failed"].get(name)
        for figure in ("spilled", "waits"):
            row += f"{compiled.get(name, {}).get(figure, '-'):>9}"
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
    args = parser.parse_args()
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
