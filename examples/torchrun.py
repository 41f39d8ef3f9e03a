"""Encode with several GPUs from Python: a share of the images for every group of ranks.

    torchrun --nproc-per-node 4 examples/torchrun.py Qwen/Qwen3-VL-8B-Instruct photos/ \\
        --output features/ --tp 2

For a folder on disk, `torchrun ... -m vitrt encode` does this and resumes too; this is for programs
of one's own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import save_file

from vitrt import ParallelContext, VisionEncoder

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint folder or a hub id")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tp", type=int, default=1, help="ranks that share one tower")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(arguments)

    parallel = ParallelContext.from_env(tp=args.tp, device=args.device)
    encoder = VisionEncoder.from_pretrained(args.model, device=args.device, parallel=parallel)
    paths = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    # All ranks of a group must encode the same images; they all get the same features.
    share = paths[parallel.dp_rank :: parallel.dp_size]
    pooled = {
        path.relative_to(args.folder).as_posix(): features.pooled().cpu()
        for path, features in zip(share, encoder.stream(share), strict=True)
    }
    if parallel.tp_rank == 0:
        args.output.mkdir(parents=True, exist_ok=True)
        target = args.output / f"pooled-{parallel.dp_rank:05}.safetensors"
        save_file(pooled, target)
        print(f"{target}: images: {len(pooled)}", flush=True)
    del encoder
    parallel.close()


if __name__ == "__main__":
    main()
