"""Encode a folder of images with Ray Data, by as many actors as there are GPUs.

    python examples/ray_folder.py Qwen/Qwen3-VL-2B-Instruct photos/ features

Needs `pip install 'vitrt[ray]'`. Run on a Ray cluster, every node must find the model and the
output folder. The same command carries on where it was interrupted; `vitrt check features` and
`FeatureStore("features")` read what comes out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ray
import ray.data

from vitrt.integrations.ray import encode_dataset


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint folder or a hub id")
    parser.add_argument("images", type=Path, help="a folder that every node finds")
    parser.add_argument("output", type=Path)
    parser.add_argument("--suffix", default=".jpg")
    parser.add_argument("--batch-size", type=int, default=1024)
    args = parser.parse_args(arguments)

    if not ray.is_initialized():
        ray.init()
    # Paths are enough: the actors read the files. A Parquet file or WebDataset is read by Ray.
    paths = sorted(args.images.resolve().rglob(f"*{args.suffix}"))
    rows = [
        {"id": path.relative_to(args.images.resolve()).as_posix(), "image": str(path)}
        for path in paths
    ]
    summary = encode_dataset(
        ray.data.from_items(rows),
        args.model,
        args.output,
        actors=max(int(ray.cluster_resources().get("GPU", 0)), 1),
        batch_size=args.batch_size,
    )
    print(f"{summary.images} encoded, {summary.resumed} there before, {summary.skipped} skipped")


if __name__ == "__main__":
    main()
