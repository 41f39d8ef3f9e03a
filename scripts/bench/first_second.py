#!/usr/bin/env python3
"""How long a new process takes to its first image, with kernels compiled ahead and without.

    python scripts/bench/first_second.py [--model qwen3-vl-8b] [--keep FOLDER] [--json FILE]

In folders for kernels that are new and empty: `vitrt compile`, as a Dockerfile would run it, then
processes that load the tower and encode one image. Each says how long its parts took; what lies
above importing torch and reading the weights is what vitrt costs. Every kernel that such a process
compiled after all is counted and named, and so are large packages that it imported. `--cold` begins
with a process that finds nothing; with `--keep` a second run finds the checkpoint and the kernels
of the first; `--profile` ends with a process whose costliest functions it names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

BINARIES = (".o", ".so", ".cubin")
LARGE = ("cutlass", "quack", "flash_attn.cute", "tvm_ffi", "triton", "transformers", "sympy",
         "torch._dynamo", "torch._inductor", "scipy", "pandas")  # fmt: skip

# The weights are read by a process of their own, into the same memory that loading fills.
READ = """
import json, sys, time
started = time.perf_counter()
import torch
imported = time.perf_counter()
from safetensors import safe_open
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.empty(1, device=device)
began = time.perf_counter()
with safe_open(sys.argv[1] + "/model.safetensors", framework="pt") as file:
    tensors = [file.get_tensor(name).to(device) for name in file.keys()]
if device == "cuda":
    torch.cuda.synchronize()
ended = time.perf_counter()
print(json.dumps({"import torch": imported - started, "context": began - imported,
                  "read": ended - began}))
"""
ENCODE = """
import json, sys, time
started = time.perf_counter()
import torch
imported = time.perf_counter()
from vitrt import VisionEncoder
import numpy
image = numpy.random.default_rng(0).integers(0, 256, (560, 560, 3), dtype=numpy.uint8)
encoder = VisionEncoder.from_pretrained(sys.argv[1])
loaded = time.perf_counter()
encoder.encode([image])[0].embeddings.cpu()
first = time.perf_counter()
encoder.encode([image])[0].embeddings.cpu()
second = time.perf_counter()
print(json.dumps({"import torch": imported - started, "load": loaded - imported,
                  "first image": first - loaded, "second image": second - first}))
print(json.dumps([name for name in sys.argv[2:] if name in sys.modules]))
"""


def child(program: str, folder: Path, environment: dict[str, str]) -> list[Any]:
    """What it printed, each line as JSON; what it logged goes on."""
    command = [sys.executable, "-c", program, str(folder), *LARGE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"a process ended with {done.returncode}:\n{done.stderr[-3000:]}")
    for line in done.stderr.splitlines()[-10:]:
        print(f"    {line}")
    return [json.loads(line) for line in done.stdout.splitlines() if line[:1] in "{["]


def profile(folder: Path, environment: dict[str, str]) -> None:
    program = f"import cProfile; cProfile.run({ENCODE!r}, sort='cumulative')"
    command = [sys.executable, "-c", f"import sys\nimport torch\n{program}", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    print("\n".join(line[:150] for line in done.stdout.splitlines()[:80]))


def binaries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in BINARIES}


def write_checkpoint(model: str, tiny: bool, folder: Path) -> None:
    import torch

    from vitrt.compare.reference import build_tower, find_model, save_checkpoint

    named = find_model(model, tiny=tiny)
    dtype = torch.float32 if tiny else torch.bfloat16
    save_checkpoint(build_tower(named, device=torch.device("cpu"), dtype=dtype), named, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="qwen3-vl-8b", help="a released size; random weights")
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="first one that compiles everything")
    parser.add_argument("--tiny", action="store_true", help="a small tower, on a CPU: a rehearsal")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="of the checkpoint and kernels")
    parser.add_argument("--profile", action="store_true", help="name the costliest functions")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if arguments.keep is None else arguments.keep
        model = folder / "model"
        if not (model / "model.safetensors").exists():
            write_checkpoint(arguments.model, arguments.tiny, model)

        def run(name: str, caches: Path, compiled: bool) -> None:
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                "XDG_CACHE_HOME": str(caches),
                "TRITON_CACHE_DIR": str(caches / "triton"),
            }
            caches.mkdir(exist_ok=True)
            if compiled and not (caches / "compiled").exists():
                command = [sys.executable, "-m", "vitrt", "compile", str(model / "config.json")]
                started = time.perf_counter()
                # As a Dockerfile runs it, which sees no GPU.
                blind = {**environment, "CUDA_VISIBLE_DEVICES": ""}
                subprocess.run([*command, "--arch", arguments.arch], env=blind, check=True)
                print(f"vitrt compile: {time.perf_counter() - started:.1f} s, "
                      f"{len(binaries(caches))} binaries", flush=True)  # fmt: skip
                (caches / "compiled").touch()
            for index in range(arguments.processes if name != "cold" else 1):
                before = binaries(caches)
                base = child(READ, model, environment)[0]
                parts, imported = child(ENCODE, model, environment)
                new = sorted(binaries(caches) - before)
                above = parts["load"] + parts["first image"] - base["context"] - base["read"]
                text = ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items())
                print(f"{name} {index}: {above:.2f} s above torch and weights ({text}; context "
                      f"{base['context']:.2f}, weights {base['read']:.2f}); compiled {len(new)}; "
                      f"imported {', '.join(imported) or 'nothing large'}", flush=True)  # fmt: skip
                for binary in new[:20] if name != "cold" else ():
                    print(f"    {binary}")
                rows.append({"process": f"{name} {index}", "above_s": above, "compiled": new,
                             "parts_s": parts, "base_s": base, "imported": imported})  # fmt: skip
            if arguments.profile and name != "cold":
                profile(model, environment)

        if arguments.cold:
            run("cold", folder / "cold", False)
        run("compiled ahead", folder / "ahead", not arguments.tiny)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"model": arguments.model, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
