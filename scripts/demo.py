"""The demo's photographs and a look at their features.

Usage: demo.py photos DIR | demo.py report DIR
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from vitrt import FeatureStore

# Photographs that ship inside scikit-image itself; it fetches its others when they are asked for.
PHOTOS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)


def photos(folder: Path) -> None:
    """Copy the photographs into `folder`."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("scikit-image is not installed: pip install 'vitrt[demo]'")
    source = Path(spec.origin).parent / "data"
    missing = [name for name in PHOTOS if not (source / name).is_file()]
    if missing:
        raise SystemExit(f"this scikit-image has no {', '.join(missing)} in {source}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in PHOTOS:
        shutil.copyfile(source / name, folder / name)


def report(folder: Path) -> None:
    """Print what `folder` holds, image by image, and which two images are most alike."""
    store = FeatureStore(folder)
    pooled = {}
    for name, features in store.items():
        t, h, w = features.grid_thw
        line = f"{name:24} grid {t} x {h:3} x {w:3}  embeddings {tuple(features.embeddings.shape)}"
        if features.deepstack is not None:
            line += f", deepstack {tuple(features.deepstack.shape)}"
        print(line)
        pooled[name] = features.pooled()
    names = list(pooled)
    vectors = torch.nn.functional.normalize(torch.stack(list(pooled.values())), dim=-1)
    alike = (vectors @ vectors.T).fill_diagonal_(-1)
    best = int(alike.argmax())
    first, second = names[best // len(names)], names[best % len(names)]
    print(f"most alike: {first} and {second} (cosine {float(alike.max()):.3f})")
    print("The weights are random: features that mean something take a real checkpoint.")


def main() -> None:
    commands = {"photos": photos, "report": report}
    if len(sys.argv) != 3 or sys.argv[1] not in commands:
        raise SystemExit(__doc__)
    commands[sys.argv[1]](Path(sys.argv[2]))


if __name__ == "__main__":
    main()
