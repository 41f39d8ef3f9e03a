"""Encode a folder of damaged images: each must be encoded or named, none may crash or hang.

    python scripts/stress/damaged_images.py --images 2000

The images are JPEG, PNG, WebP, GIF, TIFF and BMP files with flipped bytes, cut short, spliced into
one another, or with their fields overwritten. Exit code 1 for a crash, an image that is neither in
the features nor in the errors, or one that takes more than ten seconds.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

from tests.support.checkpoints import tiny_checkpoint
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.config import RuntimeConfig
from vitrt.images.prepared import PreparedImage
from vitrt.images.processor import ImageProcessor
from vitrt.job.encode import EncodeOptions, encode_folder
from vitrt.job.progress import Progress
from vitrt.job.stop import Stop
from vitrt.sources.inputs import Inputs
from vitrt.store.check import check_folder
from vitrt.store.feature_store import FeatureStore

SECONDS = 10.0  # that one image may take


def main() -> int:
    args = _arguments()
    faulthandler.enable()
    faulthandler.dump_traceback_later(SECONDS * 60, exit=True)  # nothing may hang for ever either
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        write_mutants(folder / "in", args.images, args.seed)
        checkpoint = args.checkpoint or tiny_checkpoint("qwen3_vl", folder / "checkpoint")
        slowest = _time_decoding()
        summary = encode_folder(
            open_checkpoint(checkpoint),
            RuntimeConfig(device="cpu"),
            Inputs([folder / "in"]),
            folder / "out",
            EncodeOptions(),
            progress=Progress(),
            stop=Stop(),
        )
        encoded = set(FeatureStore(folder / "out"))
        errors = folder / "out/errors-00000.jsonl"
        lines = errors.read_text().splitlines() if errors.exists() else []
        named = {json.loads(line)["id"] for line in lines}
        problems = check_folder(folder / "out").problems
        everything = {path.name for path in (folder / "in").iterdir()}
    print(
        f"{len(everything)} damaged images: {len(encoded)} encoded, {len(named)} named, "
        f"the slowest took {slowest[0]:.2f} s"
    )
    lost = everything - encoded - named
    wrong = lost or encoded & named or problems or slowest[0] > SECONDS
    if wrong:
        print(f"lost: {sorted(lost)}; both: {sorted(encoded & named)}; check: {problems}")
    return 1 if wrong or len(everything) != summary.state.listed else 0


def _time_decoding() -> list[float]:
    """Have the slowest decoding recorded."""
    slowest = [0.0]
    prepare = ImageProcessor.prepare

    def timed(self: ImageProcessor, image: str, name: str | None = None) -> PreparedImage:
        started = time.perf_counter()
        try:
            return prepare(self, image, name)
        finally:
            slowest[0] = max(slowest[0], time.perf_counter() - started)

    ImageProcessor.prepare = timed  # type: ignore[method-assign,assignment]
    return slowest


def write_mutants(folder: Path, count: int, seed: int) -> None:
    """`count` damaged image files."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    originals = _originals()
    names = sorted(originals)
    for index in range(count):
        name = names[index % len(names)]
        damage = DAMAGES[index // len(names) % len(DAMAGES)]
        data = damage(random, originals[name], list(originals.values()))
        suffix = name.split(".")[-1]
        (folder / f"{index:05}-{damage.__name__}.{suffix}").write_bytes(data)


Damage = Callable[[np.random.Generator, bytes, list[bytes]], bytes]


def flips(random: np.random.Generator, data: bytes, others: list[bytes]) -> bytes:
    """A few bytes anywhere."""
    changed = bytearray(data)
    for place in random.integers(0, len(data), random.integers(1, 12)):
        changed[place] ^= int(random.integers(1, 256))
    return bytes(changed)


def header(random: np.random.Generator, data: bytes, others: list[bytes]) -> bytes:
    """A few bytes where the fields are."""
    changed = bytearray(data)
    for place in random.integers(0, min(len(data), 200), random.integers(1, 5)):
        changed[place] = int(random.choice([0, 1, 127, 128, 255, random.integers(0, 256)]))
    return bytes(changed)


def cut(random: np.random.Generator, data: bytes, others: list[bytes]) -> bytes:
    """The start only."""
    return data[: random.integers(0, len(data))]


def splice(random: np.random.Generator, data: bytes, others: list[bytes]) -> bytes:
    """The start of one file and the end of another."""
    other = others[random.integers(0, len(others))]
    return data[: random.integers(1, len(data))] + other[random.integers(0, len(other)) :]


def hole(random: np.random.Generator, data: bytes, others: list[bytes]) -> bytes:
    """Zeros where a block of the disk was not written."""
    start = int(random.integers(0, len(data)))
    length = min(int(random.integers(1, 4096)), len(data) - start)
    return data[:start] + bytes(length) + data[start + length :]


DAMAGES: tuple[Damage, ...] = (flips, header, cut, splice, hole)


def _originals() -> dict[str, bytes]:
    """Real files of several formats and variants."""
    rows = np.linspace(0, 7, 160)[:, None]
    columns = np.linspace(0, 9, 200)[None, :]
    waves = [np.sin(rows + k) * np.cos(columns * (k + 1)) for k in range(3)]
    image = Image.fromarray(((np.stack(waves, -1) + 1) * 127).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description" * 5
    frames = [image.rotate(angle) for angle in (30, 60)]
    variants: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "plain.jpg": (image, {"quality": 85, "exif": exif}),
        "progressive.jpg": (image, {"progressive": True, "icc_profile": bytes(range(256)) * 3}),
        "cmyk.jpg": (image.convert("CMYK"), {}),
        "plain.png": (image, {"exif": exif}),
        "palette.png": (image.convert("P"), {"transparency": 3}),
        "alpha.png": (image.convert("RGBA"), {}),
        "lossy.webp": (image, {"quality": 80}),
        "lossless.webp": (image, {"lossless": True, "exif": exif}),
        "moving.webp": (image, {"save_all": True, "append_images": frames}),
        "still.gif": (image, {}),
        "moving.gif": (image, {"save_all": True, "append_images": frames}),
        "plain.tif": (image, {}),
        "packed.tif": (image, {"compression": "tiff_lzw"}),
        "deflated.tif": (image.convert("L"), {"compression": "tiff_adobe_deflate"}),
        "plain.bmp": (image, {}),
    }
    formats = {"jpg": "JPEG", "tif": "TIFF"}
    files = {}
    for name, (picture, options) in variants.items():
        buffer = io.BytesIO()
        suffix = name.split(".")[-1]
        picture.save(buffer, formats.get(suffix, suffix.upper()), **options)
        files[name] = buffer.getvalue()
    return files


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="default: a tiny one is made")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
