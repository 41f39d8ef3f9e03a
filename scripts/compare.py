"""Compare features numerically: an output folder with another one, or with transformers itself.

    compare.py DIR DIR                        two folders of `vitrt encode`
    compare.py DIR --model MODEL --images IN  a folder with transformers in float32

Errors are relative L2, ||a - b|| / ||b||, for each image and tensor; the second is the reference.
Exit code 1 where an image is missing on a side, a shape differs, or an error is over the bound.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vitrt import FeatureStore
from vitrt.compare.errors import float32_reference, relative_error
from vitrt.compare.reference import build_tower, find_model

Tensors = dict[str, Tensor]  # "embeddings", "deepstack 0", ... of one image


class StoredFeatures(Mapping[str, Tensors]):
    """The features of an output folder."""

    def __init__(self, folder: Path) -> None:
        self.store = FeatureStore(folder)

    def __getitem__(self, image: str) -> Tensors:
        features = self.store[image]
        found = {"embeddings": features.embeddings}
        for level, tensor in enumerate(() if features.deepstack is None else features.deepstack):
            found[f"deepstack {level}"] = tensor
        return found

    def __iter__(self):
        return iter(self.store)

    def __len__(self) -> int:
        return len(self.store)


class TransformersFeatures(Mapping[str, Tensors]):
    """What transformers' own processor and tower make of the images, in float32."""

    def __init__(self, model: str, images: Path, names: list[str]) -> None:
        from transformers import AutoImageProcessor

        source = find_model(model)
        if source.checkpoint is None:
            raise ValueError(f"{model} holds no weights to compare with")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tower = build_tower(source, device=device, dtype=torch.float32)
        self.processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        self.images = images
        self.names = names
        self.device = device

    def __getitem__(self, image: str) -> Tensors:
        from PIL import Image, ImageOps

        with Image.open(self.images / image) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
        inputs = self.processor(images=[picture], return_tensors="pt")
        ((t, h, w),) = inputs["image_grid_thw"].tolist()
        with torch.inference_mode():
            pixels = inputs["pixel_values"].to(self.device)
            embeddings, levels = float32_reference(self.tower, pixels, ((t, h, w),))
        found = {"embeddings": embeddings.cpu()}
        return found | {f"deepstack {i}": level.cpu() for i, level in enumerate(levels)}

    def __iter__(self):
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def compare(
    features: Mapping[str, Tensors], reference: Mapping[str, Tensors], bound: float, verbose: bool
) -> bool:
    """Print the errors by tensor; whether all is there and within the bound."""
    missing = sorted(set(reference) - set(features))
    extra = sorted(set(features) - set(reference))
    for names, where in ((missing, "only in the reference"), (extra, "not in the reference")):
        if names:
            print(f"{len(names)} images {where}: {', '.join(names[:5])}")
    errors: dict[str, list[tuple[float, str]]] = {}
    for image in sorted(set(features) & set(reference)):
        ours, theirs = features[image], reference[image]
        for name in sorted(set(ours) | set(theirs)):
            both = name in ours and name in theirs
            error = relative_error(ours[name], theirs[name]) if both else float("inf")
            errors.setdefault(name, []).append((error, image))
            if verbose:
                print(f"{error:10.3e}  {name:12}  {image}")
    print(f"{'tensor':14}{'images':>8}{'median':>12}{'worst':>12}  worst image")
    for name, found in errors.items():
        found.sort()
        worst, image = found[-1]
        print(f"{name:14}{len(found):>8}{found[len(found) // 2][0]:>12.3e}{worst:>12.3e}  {image}")
    within = all(found[-1][0] <= bound for found in errors.values())
    print(f"{'within' if within else 'OVER'} the bound of {bound:g}")
    return within and bool(errors) and not missing and not extra


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("features", type=Path, help="an output folder of vitrt encode")
    parser.add_argument("reference", type=Path, nargs="?", help="another one")
    parser.add_argument("--model", help="compare with transformers on this checkpoint")
    parser.add_argument("--images", type=Path, help="the folder that was encoded")
    parser.add_argument("--bound", type=float, default=1e-5, help="default: %(default)g")
    parser.add_argument("--verbose", action="store_true", help="a line for each tensor")
    args = parser.parse_args(argv)
    if (args.reference is None) == (args.model is None) or (args.model and not args.images):
        parser.error("give another folder, or --model together with --images")
    try:
        features = StoredFeatures(args.features)
        if args.reference is not None:
            reference: Mapping[str, Tensors] = StoredFeatures(args.reference)
        else:
            reference = TransformersFeatures(args.model, args.images, list(features))
        return 0 if compare(features, reference, args.bound, args.verbose) else 1
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    raise SystemExit(main())
