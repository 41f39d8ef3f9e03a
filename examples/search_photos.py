"""Embed a folder of photos and find those most like one of them.

    python examples/search_photos.py Qwen/Qwen3-VL-2B-Instruct photos/ photos/cat.jpg

The mean of an image's features is a rough but useful description of it. What all images have in
common says nothing about any of them, so the mean over the folder is taken away first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from vitrt import VisionEncoder

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint folder or a hub id")
    parser.add_argument("folder", type=Path)
    parser.add_argument("query", type=Path)
    parser.add_argument("--top", type=int, default=5)
    args = parser.parse_args(arguments)

    encoder = VisionEncoder.from_pretrained(args.model)
    paths = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    # stream() decodes ahead of the device and holds a few images at a time, however many there are.
    rows = torch.stack([features.pooled().cpu() for features in encoder.stream(paths)])
    query = encoder.encode([args.query])[0].pooled().cpu()

    center = rows.mean(dim=0)
    similarity = F.cosine_similarity(rows - center, query - center)
    for index in similarity.argsort(descending=True)[: args.top].tolist():
        print(f"{similarity[index]:6.3f}  {paths[index]}")


if __name__ == "__main__":
    main()
