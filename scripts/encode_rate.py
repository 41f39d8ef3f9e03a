"""How much of the device's own rate `vitrt encode` reaches, from JPEG files to shards.

    python scripts/encode_rate.py MODEL --images 4000 --size 700x1120 --pool mean

Prints, in one run: decoding alone with threads and with processes, the device alone on images that
lie ready, the whole of `vitrt encode`, and their ratios. MODEL may be a config folder: the weights
are random then, and `encode` runs on the same tower.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from vitrt.batching import default_workers
from vitrt.config import RuntimeConfig
from vitrt.encode import EncodeOptions, encode_folder
from vitrt.encoder import VisionEncoder
from vitrt.image import ImageProcessor, PreparedImage
from vitrt.listing import Inputs
from vitrt.packing import pack
from vitrt.pipeline import Stop
from vitrt.progress import Progress
from vitrt.weights import Checkpoint, open_checkpoint


def main() -> int:
    args = _arguments()
    height, width = map(int, args.size.split("x"))
    runtime = RuntimeConfig(device=args.device, max_batch_tokens=args.max_batch_tokens)
    workers = args.workers or default_workers()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        photos = _photos(folder / "in", args.images, height, width)
        paths = sorted(str(path) for path in photos.iterdir())
        checkpoint = _open(args.model, folder / "checkpoint")
        encoder = VisionEncoder.from_checkpoint(checkpoint, runtime)
        sample = paths[: min(len(paths), 1000)]
        rates = {
            "decode, threads": _decode_rate(ThreadPoolExecutor(workers), encoder.processor, sample),
            "device only": _device_rate(encoder, sample, args.seconds),
        }
        if not args.no_processes:
            processes = ProcessPoolExecutor(
                workers, initializer=_keep, initargs=[encoder.processor]
            )
            rates["decode, processes"] = _decode_rate(processes, encoder.processor, sample)
        busy = 0.0
        for run in range(args.runs):
            rates[f"vitrt encode, run {run + 1}"], busy = _encode_rate(
                checkpoint, runtime, encoder, photos, folder / f"out-{run}", args
            )
    best = max(rate for name, rate in rates.items() if name.startswith("vitrt"))
    for name, rate in rates.items():
        print(f"{name:<22} {rate:8.1f} images/s")
    print(f"device busy            {busy:8.1%} of the last run")
    for name in ("device only", "decode, threads"):
        print(f"vitrt encode / {name:<16} {best / rates[name]:.3f}")
    if args.json:
        args.json.write_text(json.dumps({**rates, "busy": busy}))
    return 0


def _decode_rate(pool: Executor, processor: ImageProcessor, paths: list[str]) -> float:
    """Images a second through decoding and resizing alone."""
    task: Callable[[str], int] = _task(processor)
    if isinstance(pool, ProcessPoolExecutor):
        task = _decode_in_process
    with pool:
        list(pool.map(task, paths[:64]))
        started = time.perf_counter()
        for _ in pool.map(task, paths, chunksize=8):
            pass
        return len(paths) / (time.perf_counter() - started)


def _task(processor: ImageProcessor) -> Callable[[str], int]:
    return lambda path: processor.prepare(path).pixels.nbytes


_processor: ImageProcessor


def _keep(processor: ImageProcessor) -> None:
    global _processor
    _processor = processor


def _decode_in_process(path: str) -> PreparedImage:
    return _processor.prepare(path)  # sent back: the parent needs the pixels


def _device_rate(encoder: VisionEncoder, paths: list[str], seconds: float) -> float:
    """Images a second of forwards over images that lie ready, uploads included."""
    images = [encoder.processor.prepare(path) for path in paths[:128]]
    batches = pack([prod(image.grid_thw) for image in images], encoder.max_batch_tokens)
    batches = batches[:-1] or batches  # the last one is not full

    def cycle() -> Iterator[list[PreparedImage]]:
        while True:
            for batch in batches:
                yield [images[index] for index in batch]

    for batch in islice(cycle(), 2 * len(batches)):
        encoder.encode_prepared(batch)
    _synchronize(encoder)
    started, count = time.perf_counter(), 0
    for number, batch in enumerate(cycle(), 1):
        encoder.encode_prepared(batch)
        count += len(batch)
        if number % 4 == 0:  # stay a few batches ahead, not hundreds
            _synchronize(encoder)
            if time.perf_counter() - started > seconds:
                break
    return count / (time.perf_counter() - started)


def _synchronize(encoder: VisionEncoder) -> None:
    if encoder.device.type == "cuda":
        torch.cuda.synchronize(encoder.device)


def _encode_rate(
    checkpoint: Checkpoint,
    runtime: RuntimeConfig,
    encoder: VisionEncoder,
    photos: Path,
    output: Path,
    args: argparse.Namespace,
) -> tuple[float, float]:
    VisionEncoder.from_checkpoint = classmethod(  # type: ignore[method-assign]
        lambda cls, *arguments, **options: encoder
    )
    options = EncodeOptions(workers=args.workers, pool=args.pool)
    progress = Progress()
    summary = encode_folder(
        checkpoint, runtime, Inputs([photos]), output, options, progress=progress, stop=Stop()
    )
    return summary.state.images_per_second, summary.state.busy_share


def _open(model: str, folder: Path) -> Checkpoint:
    checkpoint = open_checkpoint(model)
    if checkpoint.tensors:
        return checkpoint
    from tests.checkpoints import full_size_checkpoint

    return open_checkpoint(full_size_checkpoint(Path(model).name, folder))


def _photos(folder: Path, count: int, height: int, width: int) -> Path:
    """JPEG files like photographs: scikit-image's, cropped and scaled, or else smooth noise."""
    folder.mkdir()
    random = np.random.default_rng(0)
    scenes = _scenes()
    for index in range(min(count, 200)):
        scene = scenes[index % len(scenes)]
        share = random.uniform(0.6, 1.0)
        side = int(scene.width * share), int(scene.height * share)
        left, top = (
            int(random.integers(0, t - s + 1)) for t, s in zip(scene.size, side, strict=True)
        )
        part = scene.crop((left, top, left + side[0], top + side[1]))
        size = int(width * random.uniform(0.97, 1.03)), int(height * random.uniform(0.97, 1.03))
        buffer = io.BytesIO()
        part.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        (folder / f"{index:06}.jpg").write_bytes(buffer.getvalue())
    for index in range(200, count):
        os.link(folder / f"{index % 200:06}.jpg", folder / f"{index:06}.jpg")
    return folder


def _scenes() -> list[Image.Image]:
    try:
        from skimage import data
    except ImportError:
        random = np.random.default_rng(1)
        coarse = [random.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(8)]
        return [Image.fromarray(scene).resize((1280, 960), 3) for scene in coarse]
    names = ("astronaut", "chelsea", "coffee", "rocket", "immunohistochemistry")
    return [Image.fromarray(getattr(data, name)()) for name in names]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--size", default="700x1120", metavar="HxW")
    parser.add_argument("--pool", choices=("none", "mean"), default="none")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--max-batch-tokens", type=int)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10, help="of timing the device alone")
    parser.add_argument("--no-processes", action="store_true", help="do not time processes")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
