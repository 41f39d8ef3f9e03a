"""How much of the device's rate `vitrt encode` reaches: JPEGs on disk in, features on disk out.

Makes JPEGs from scikit-image's photographs (random crops, about the size asked for), then measures,
on the same images: decoding and resizing alone on all cores, the device alone on images that are
ready in memory, and `vitrt encode` as a user runs it. Features are pooled unless asked otherwise:
whole ones of a 1120 x 700 photo are 25 MB on Qwen3-VL-8B, so that a disk, not vitrt, sets the rate.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vitrt import VisionEncoder
from vitrt.bench.timing import synchronize
from vitrt.compare.reference import build_tower, find_model, save_checkpoint
from vitrt.cores import usable_cores
from vitrt.engine.batcher import pack
from vitrt.images.prepared import PreparedImage

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)
VARIATION = 0.1  # sides differ by up to this from the size asked for
WARM_IMAGES = 48
DEVICE_PASSES = 3


@dataclass(frozen=True, slots=True)
class Rates:
    """Images per second."""

    decode: float  # decoding and resizing alone, in threads
    decode_processes: float  # the same in processes, pixels handed back to this one
    device: float  # the device alone
    end_to_end: float  # `vitrt encode`, from when its model is loaded
    whole: float  # the same with Python's start and loading
    busy_share: float  # of the encode run, that the device was computing

    @property
    def of_device(self) -> float:
        return self.end_to_end / self.device

    @property
    def of_lower(self) -> float:
        """Of whichever is lower, the device or decoding."""
        return self.end_to_end / min(self.device, self.decode)


def make_images(folder: Path, count: int, width: int, height: int, workers: int) -> list[Path]:
    """`count` JPEGs, every one another crop of another size, as detailed as the photographs are."""
    import skimage

    data = Path(skimage.__file__).parent / "data"
    photos = [
        _mirrored(Image.open(data / name).convert("RGB"), 2 * width, 2 * height) for name in PHOTOS
    ]
    folder.mkdir(parents=True, exist_ok=True)

    def make(index: int) -> Path:
        draw = random.Random(index)
        photo = photos[index % len(photos)]
        sides = [
            round(side * draw.uniform(1 - VARIATION, 1 + VARIATION)) for side in (width, height)
        ]
        scale = draw.uniform(0.9, 1.5)
        w, h = sides[0] * scale, sides[1] * scale
        left, top = draw.uniform(0, photo.width - w), draw.uniform(0, photo.height - h)
        crop = photo.resize(sides, Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
        path = folder / f"{index:06}.jpg"
        crop.save(path, quality=90)
        return path

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(make, range(count)))


def _mirrored(photo: Image.Image, width: int, height: int) -> Image.Image:
    """The photo and its mirror images, side by side until they cover width x height.

    Enlarging it instead would make smooth JPEGs that decode faster than a camera's.
    """
    canvas = Image.new("RGB", (width, height))
    across, down = Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM
    for row in range(-(-height // photo.height)):
        for column in range(-(-width // photo.width)):
            piece = photo.transpose(across) if column % 2 else photo
            piece = piece.transpose(down) if row % 2 else piece
            canvas.paste(piece, (column * photo.width, row * photo.height))
    return canvas


def decode_rate(
    encoder: VisionEncoder, paths: Sequence[Path], pool: Executor, workers: int
) -> tuple[float, list[PreparedImage]]:
    """Images per second of decoding and resizing, and the images."""
    with pool:
        list(pool.map(encoder.processor.prepare, paths[:workers]))
        start = time.perf_counter()
        prepared = list(pool.map(encoder.processor.prepare, paths))
        return len(paths) / (time.perf_counter() - start), prepared


def device_rate(encoder: VisionEncoder, prepared: Sequence[PreparedImage]) -> float:
    """Images per second of upload and forward, in the batches that vitrt packs.

    The best of several passes: what is compared with it should fall short of the device itself,
    not of a pass that the host held up.
    """
    batches = pack(prepared, encoder.max_batch_tokens, lambda image: image.num_patches)
    seconds = []
    for _ in range(1 + DEVICE_PASSES):
        synchronize(encoder.device)
        start = time.perf_counter()
        for batch in batches:
            encoder.encode_prepared(batch)
        synchronize(encoder.device)
        seconds.append(time.perf_counter() - start)
    return len(prepared) / min(seconds[1:])  # the first pass allocates


def run_encode(
    model: Path, inputs: str, output: Path, options: Sequence[str]
) -> tuple[dict, float]:
    """The closing report of `vitrt encode`, and the seconds of the whole command."""
    command = [sys.executable, "-m", "vitrt", "encode", str(model), inputs]
    command += ["--output", str(output), "--log-json", *options]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    start = time.perf_counter()
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    seconds = time.perf_counter() - start
    lines = done.stderr.splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    ends = [event for event in events if event["event"] == "end"]
    if done.returncode != 0 or not ends:
        raise SystemExit(
            f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}"
        )
    return ends[-1], seconds


def measure(args: argparse.Namespace, work: Path) -> Rates:
    model = Path(args.model)
    if not model.is_dir() or not any(model.glob("*.safetensors")):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        source = find_model(args.model, tiny=args.tiny)
        tower = build_tower(source, device=device, dtype=dtype)
        model = save_checkpoint(tower, source, work / "model")
        del tower
    width, height = args.size
    cores = usable_cores()
    paths = make_images(work / "images", args.images, width, height, cores)
    size = sum(path.stat().st_size for path in paths)
    print(f"{len(paths)} JPEGs of about {width} x {height}, {size / len(paths) / 1e3:.0f} kB each")

    options = ["--pool", args.pool]
    if args.workers is not None:
        options += ["--workers", str(args.workers)]
    warm = work / "warm.txt"
    warm.write_text("".join(f"{path}\n" for path in paths[:WARM_IMAGES]))
    # Kernels compiled once stay on disk; a run over a million images does not pay for them.
    run_encode(model, f"@{warm}", work / "warm", options)
    end, whole = run_encode(model, str(work / "images"), args.output or work / "features", options)
    if end["images"] != len(paths):
        raise SystemExit(f"encoded {end['images']} of {len(paths)} images")

    encoder = VisionEncoder.from_pretrained(model)
    sample = paths[: args.sample]
    forked = ProcessPoolExecutor(cores, mp_context=get_context("spawn"))
    in_processes, _ = decode_rate(encoder, sample, forked, cores)
    decode, prepared = decode_rate(encoder, sample, ThreadPoolExecutor(cores), cores)
    return Rates(
        decode=decode,
        decode_processes=in_processes,
        device=device_rate(encoder, prepared),
        end_to_end=end["images_per_second"],
        whole=len(paths) / whole,
        busy_share=end["busy_share"],
    )


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="qwen3-vl-8b", help="a checkpoint, or a size with random weights"
    )
    parser.add_argument("--tiny", action="store_true", help="a scaled-down tower, for trying this")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--size", type=_size, default=(1120, 700), metavar="WxH")
    parser.add_argument("--workers", type=int, help="of vitrt encode (default: its own)")
    parser.add_argument("--pool", choices=("none", "mean"), default="mean")
    parser.add_argument(
        "--sample", type=int, default=1000, help="images that decoding and the device are timed on"
    )
    parser.add_argument(
        "--output", type=Path, help="where features go (default: a temporary folder)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        rates = measure(args, Path(work))
    cores = usable_cores()
    print(f"decode and resize, {cores:2} threads   {rates.decode:9.1f} images/s")
    print(f"the same, {cores:2} processes          {rates.decode_processes:9.1f} images/s")
    print(f"device only                     {rates.device:9.1f} images/s")
    print(
        f"vitrt encode, pool {args.pool:4}         {rates.end_to_end:9.1f} images/s = "
        f"{rates.of_device:.1%} of the device's, {rates.of_lower:.1%} of the lower of the two, "
        f"device busy {rates.busy_share:.1%}"
    )
    print(f"the whole command               {rates.whole:9.1f} images/s")
    if args.json is not None:
        found = asdict(rates) | {"of_device": rates.of_device, "of_lower": rates.of_lower}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        asked = {
            "device_name": device,
            "images": args.images,
            "size": args.size,
            "pool": args.pool,
            "model": args.model,
            "cores": cores,
            "workers": args.workers,
        }
        args.json.write_text(json.dumps(asked | found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
