"""Where in one image is what lies at a point of another? Dense features answer without training.

    python examples/dense_features.py Qwen/Qwen3-VL-2B-Instruct a.jpg b.jpg --at 0.4 0.7 -o map.png

The features are a grid over the image: one cell a merged token, or with `--layer` one a patch, as
that layer of the tower leaves it. The picture that comes out is the second image, dimmed where its
cells are unlike the cell of the first image at the given point.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch.nn.functional as F
from PIL import Image, ImageOps

from vitrt import VisionEncoder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint folder or a hub id")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--at", type=float, nargs=2, default=(0.5, 0.5), metavar=("X", "Y"))
    parser.add_argument(
        "--layer", type=int, help="hidden states after it: 0, 1, ... or -1, -2, ..."
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("similarity.png"))
    args = parser.parse_args(arguments)

    encoder = VisionEncoder.from_pretrained(args.model)
    images = [args.first, args.second]
    if args.layer is None:
        grids = [features.spatial() for features in encoder.encode(images)]
    else:  # no merger, and no layer past this one
        found = encoder.encode(images, layers=[args.layer], merged=False)
        grids = [features.hidden[0] for features in found]
    first, second = (grid[0].float() for grid in grids)  # [rows, columns, width] of frame 0
    row, column = (
        min(int(share * size), size - 1)
        for share, size in zip(reversed(args.at), first.shape[:2], strict=True)
    )
    similarity = F.cosine_similarity(first[row, column], second, dim=-1)  # [rows, columns]
    best = divmod(int(similarity.argmax()), similarity.shape[1])
    print(f"cell ({row}, {column}) of {first.shape[0]} x {first.shape[1]} in {args.first.name} is")
    print(f"most like ({best[0]}, {best[1]}) of {second.shape[0]} x {second.shape[1]} in", end=" ")
    print(f"{args.second.name}: {similarity.max():.3f}")

    span = similarity.max() - similarity.min()
    levels = ((similarity - similarity.min()) / span.clamp(min=1e-6) * 255).byte().cpu().numpy()
    with Image.open(args.second) as image:
        photo = ImageOps.exif_transpose(image).convert("RGB")
    mask = Image.fromarray(levels).resize(photo.size, Image.Resampling.BILINEAR)
    Image.composite(photo, Image.new("RGB", photo.size), mask).save(args.output)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
