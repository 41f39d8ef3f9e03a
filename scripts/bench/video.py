"""Video through an encoder, against its device alone and against a bare decoding loop.

Writes 1080p H.264 clips of a moving test picture, then measures three rates in frames of video a
second, in turns: decoding them and looking at nothing; running the tower on their prepared pixels;
and `encoder.stream` on the files. The last should reach 85% of the lower of the other two.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vitrt import VisionEncoder


def write_clip(path: Path, frames: int, height: int, width: int, seed: int) -> None:
    """A picture that moves, so that no frame is a copy of the one before."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 20 + 1, width // 20 + 40, 3), dtype=np.uint8)
    picture = small.repeat(20, 0).repeat(20, 1)[:height]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "23"}
        for index in range(frames):
            shift = 4 * index % 700
            view = np.ascontiguousarray(picture[:, shift : shift + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        container.mux(stream.encode(None))


def decode_all(paths: list[Path]) -> None:
    for path in paths:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            for _ in container.decode(video=0):
                pass


def timed(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--seconds", type=int, default=20, help="of each clip")
    parser.add_argument("--height", type=int, default=1080)
    parser.add_argument("--width", type=int, default=1920)
    parser.add_argument("--fps", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    encoder = VisionEncoder.from_pretrained(args.model, device=args.device, fps=args.fps)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.mp4" for number in range(args.clips)]
        for number, path in enumerate(paths):
            write_clip(path, 30 * args.seconds, args.height, args.width, number)
        frames = args.clips * args.seconds * 30
        prepared = [encoder.processor.prepare(path) for path in paths]
        prepared = [image.decoded() if image.is_lazy else image for image in prepared]
        patches = sum(image.num_patches for image in prepared)
        works: dict[str, Callable[[], object]] = {
            "decoding alone": lambda: decode_all(paths),
            "device alone": lambda: [encoder.encode_prepared([image]) for image in prepared],
            "stream": lambda: list(encoder.stream(paths)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(args.rounds + 1):
            for name, work in works.items():
                spent = timed(work, encoder.device)
                if turn:  # the first one warms up
                    seconds[name].append(spent)
    rates = {name: frames / statistics.median(spent) for name, spent in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:>15}: {rate:9.0f} frames/s, {rate * patches / frames:9.0f} patches/s")
    least = min(rates["decoding alone"], rates["device alone"])
    print(f"stream reaches {100 * rates['stream'] / least:.0f}% of the lower of the two")


if __name__ == "__main__":
    main()
