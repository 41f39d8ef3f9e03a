"""Video through an encoder, against its device alone and against bare decoding loops.

Writes 1080p H.264 clips of a moving, detailed picture, then measures rates in frames of video a
second, in turns: decoding the clips and looking at nothing, one after the other with all threads
and side by side with a thread each; running the tower on their prepared pixels; and
`encoder.stream` on the files. The last should reach 85% of the device's rate or the better loop's,
whichever is lower.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vitrt import VisionEncoder
from vitrt.cores import usable_cores
from vitrt.images.prepared import PreparedImage


def write_clip(path: Path, frames: int, height: int, width: int, seed: int) -> None:
    """A picture with large and fine detail that moves, so that no frame is a copy of another."""
    rng = np.random.default_rng(seed)
    rows, columns = height + 160, width + 720
    picture = np.zeros((rows, columns), np.float32)
    for cell, strength in ((160, 60), (40, 30), (8, 3)):
        cells = rng.standard_normal((rows // cell + 1, columns // cell + 1)).astype(np.float32)
        picture += strength * cells.repeat(cell, 0).repeat(cell, 1)[:rows, :columns]
    luma = (picture + 128).clip(16, 220).astype(np.uint8)
    grain = rng.integers(0, 10, luma.shape, dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "23", "threads": "1"}
        planes = np.empty((height * 3 // 2, width), np.uint8)
        for index in range(frames):
            down, right = 2 * index % 150, 3 * index % 700
            view = luma[down : down + height, right : right + width]
            down, right = rng.integers(160), rng.integers(720)
            planes[:height] = view + grain[down : down + height, right : right + width]
            planes[height:] = 128
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_clips(folder: Path, count: int, frames: int, height: int, width: int) -> list[Path]:
    paths = [folder / f"{number}.mp4" for number in range(count)]
    with ProcessPoolExecutor(usable_cores(), mp_context=get_context("fork")) as pool:
        sizes = [frames] * count, [height] * count, [width] * count
        list(pool.map(write_clip, paths, *sizes, range(count)))
    return paths


def decode_clip(path: Path, threads: int = 0) -> None:
    """`threads` 0: as many as FFmpeg takes."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        for _ in container.decode(stream):
            pass


def decode_in_turn(paths: Sequence[Path]) -> None:
    for path in paths:
        decode_clip(path)


def decode_side_by_side(paths: Sequence[Path]) -> None:
    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(partial(decode_clip, threads=1), paths))


def run_device(encoder: VisionEncoder, prepared: Sequence[PreparedImage]) -> None:
    for image in prepared:
        for part in image.split(encoder.max_batch_tokens):
            encoder.encode_prepared([part])


def run_stream(encoder: VisionEncoder, paths: Sequence[Path]) -> None:
    deque(encoder.stream(paths), maxlen=0)


def timed(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measure(args: argparse.Namespace, paths: list[Path]) -> tuple[dict[str, float], float]:
    """Frames of video a second, and the patches of one."""
    encoder = VisionEncoder.from_pretrained(args.model, device=args.device, fps=args.fps)
    with ThreadPoolExecutor(usable_cores()) as pool:
        prepared = [each.decoded() for each in pool.map(encoder.processor.prepare, paths)]
    frames = len(paths) * args.seconds * 30
    patches = sum(image.num_patches for image in prepared)
    print(f"{len(paths)} clips, {patches // len(paths)} patches each")
    works: dict[str, tuple[int, Callable[[], object]]] = {
        "decoding, clip by clip": (1, lambda: decode_in_turn(paths)),
        "decoding, side by side": (1, lambda: decode_side_by_side(paths)),
        "device alone": (1, lambda: run_device(encoder, prepared)),
        "stream": (args.listed, lambda: run_stream(encoder, paths * args.listed)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    run_stream(encoder, paths)  # warms up
    run_device(encoder, prepared)
    for _ in range(args.rounds):
        for name, (times, work) in works.items():
            seconds[name].append(timed(work, encoder.device) / times)
    return {name: frames / statistics.median(each) for name, each in seconds.items()}, (
        patches / frames
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--listed", type=int, default=3, help="times that a stream sees each clip")
    parser.add_argument("--seconds", type=int, default=20, help="of each clip")
    parser.add_argument("--height", type=int, default=1080)
    parser.add_argument("--width", type=int, default=1920)
    parser.add_argument("--fps", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        shape = 30 * args.seconds, args.height, args.width
        paths = write_clips(Path(folder), args.clips, *shape)
        size = sum(path.stat().st_size for path in paths)
        megabits = 8e-6 * size / args.seconds / args.clips
        print(f"written in {time.perf_counter() - began:.1f} s, {megabits:.1f} Mbit/s")
        rates, patches = measure(args, paths)
    for name, rate in rates.items():
        print(f"{name:>22}: {rate:9.0f} frames/s, {rate * patches:9.0f} patches/s")
    decoding = max(rate for name, rate in rates.items() if name.startswith("decoding"))
    share = rates["stream"] / min(decoding, rates["device alone"])
    print(f"stream reaches {100 * share:.0f}% of the lower of decoding and the device")
    if args.json is not None:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        asked = vars(args) | {"model": Path(args.model).name, "json": None, "device_name": name}
        found = {"frames_per_second": rates, "stream_of_the_lower": share}
        facts = {"cores": usable_cores(), "megabits_per_second": megabits}
        args.json.write_text(json.dumps(asked | facts | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
