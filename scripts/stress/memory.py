"""Peak memory of `vitrt encode` over 2,000 and over 200,000 tiny images: it must be the same.

    python scripts/stress/memory.py

Exit code 1 if the larger folder takes over 10% more.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

from tests.support.checkpoints import tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 1.10
# The process says its peak itself: what the system counts for a child begins with its parent's.
RUN = """
import sys
from vitrt.cli import main
code = main(sys.argv[1:])
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
sys.exit(code)
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs=2, default=(2_000, 200_000))
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's")
    parser.add_argument("--pool", choices=("none", "mean"), default="none")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        checkpoint = tiny_checkpoint(
            "qwen3_vl",
            folder / "checkpoint",
            min_pixels=32 * 32,
            depth=2,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            out_hidden_size=16,
            deepstack_visual_indexes=[0],
        )
        peaks = []
        for count in args.images:
            photos = _photos(folder / f"in-{count}", count)
            started = time.perf_counter()
            peaks.append(_peak(checkpoint, photos, folder / f"out-{count}", args.pool))
            seconds = time.perf_counter() - started
            print(f"{count:>8} images: {peaks[-1]:7.1f} MiB at most, {seconds:.0f} s", flush=True)
    ratio = peaks[1] / peaks[0]
    print(f"ratio {ratio:.3f}, to be at most {LIMIT}")
    return 0 if ratio <= LIMIT else 1


def _peak(checkpoint: Path, photos: Path, output: Path, pool: str) -> float:
    """The largest resident set of a run, in MiB."""
    command = [sys.executable, "-c", RUN, "encode", str(checkpoint), str(photos)]
    command += ["--output", str(output), "--device", "cpu", "--pool", pool]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit("vitrt encode failed")
    return int(done.stdout.split()[-1]) / 1024


def _photos(folder: Path, count: int) -> Path:
    """Small images under `count` names: links to a hundred files."""
    sources = []
    pixels = np.random.default_rng(0)
    for index in range(100):
        source = folder / f"0/{index}.png"
        source.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(source)
        sources.append(source)
    for index in range(100, count):
        part = folder / str(index // 5000)
        part.mkdir(exist_ok=True)
        os.link(sources[index % 100], part / f"{index}.png")
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
