"""Image embeddings by sentence-transformers, the visual tower of its model run by vitrt.

    python examples/sentence_transformers_images.py Qwen/Qwen3-VL-Embedding-2B cat.jpg dog.jpg

`accelerate` finds the tower deep inside; what the model gives stays the same. transformers loads
the processor of such a model only where torchvision is installed.
"""

from __future__ import annotations

import argparse

import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from vitrt.integrations.transformers import accelerate


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder or a hub id that SentenceTransformer loads")
    parser.add_argument("images", nargs="+")
    args = parser.parse_args(arguments)

    model = SentenceTransformer(args.model)
    accelerate(model)
    images = [Image.open(path).convert("RGB") for path in args.images]
    embeddings = model.encode(images, convert_to_tensor=True, normalize_embeddings=True)
    likeness = embeddings @ embeddings.T
    likeness.fill_diagonal_(-torch.inf)
    for path, row in zip(args.images, likeness, strict=True):
        nearest = int(row.argmax())
        print(f"{path}: nearest is {args.images[nearest]}, {float(row[nearest]):.3f}")


if __name__ == "__main__":
    main()
