"""Kill `vitrt encode` at random moments, let it resume, and compare with a run that was left alone.

    python scripts/stress/kill.py --kills 200

Each run is a process of its own, forked with the tower loaded, and dies by SIGKILL. Exit code 1 if
in the end an image is missing or there twice, `vitrt check` finds anything, or a feature differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image

from vitrt.checkpoint.opened import open_checkpoint
from vitrt.config import RuntimeConfig
from vitrt.encoder import VisionEncoder
from vitrt.job.encode import EncodeOptions, encode_folder
from vitrt.job.progress import Progress
from vitrt.job.stop import Stop
from vitrt.sources.inputs import Inputs
from vitrt.store.check import check_folder
from vitrt.store.writer import FeatureStore

# Batches of two runs hold other images, and matrix products of other shapes round otherwise.
TOLERANCE = 1e-5


def main() -> int:
    args = _arguments()
    torch.set_num_threads(1)  # threads do not survive a fork
    random.seed(args.seed)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        photos = _photos(folder / "in", args.images)
        checkpoint = args.checkpoint or _checkpoint(folder / "checkpoint")
        job = _Job(checkpoint, photos)
        started = time.perf_counter()
        assert job.run(folder / "alone") == 0
        alone = time.perf_counter() - started
        kills = resumed = 0
        while kills < args.kills:
            # Spread so that a folder takes a few lives to complete.
            delay = random.uniform(0, alone / 2)
            if job.run(folder / f"killed-{resumed}", kill_after=delay) == 0:
                _compare(folder / f"killed-{resumed}", folder / "alone")
                resumed += 1
            else:
                kills += 1
        last = folder / f"killed-{resumed}"
        assert job.run(last) == 0
        _compare(last, folder / "alone")
    print(f"{kills} kills, {resumed + 1} folders completed, every image once, all features equal")
    return 0


class _Job:
    """Runs over one folder of photos, each in a fork of this process."""

    def __init__(self, checkpoint: Path, photos: Path) -> None:
        self._checkpoint = open_checkpoint(checkpoint)
        self._runtime = RuntimeConfig(device="cpu", max_batch_tokens=256)
        self._photos = photos
        encoder = VisionEncoder.from_checkpoint(self._checkpoint, self._runtime)
        VisionEncoder.from_checkpoint = classmethod(  # type: ignore[method-assign]
            lambda cls, *arguments, **options: encoder  # loaded once, for all forks
        )

    def run(self, output: Path, kill_after: float | None = None) -> int:
        """The exit code; -9 if it was killed before it ended."""
        child = os.fork()
        if child == 0:
            os._exit(self._encode(output))
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _encode(self, output: Path) -> int:
        options = EncodeOptions(workers=2, shard_mib=1 / 16)
        inputs = Inputs([self._photos])
        summary = encode_folder(
            self._checkpoint,
            self._runtime,
            inputs,
            output,
            options,
            progress=Progress(),
            stop=Stop(),
        )
        return 3 if summary.state.skipped else 0


def _compare(found: Path, wanted: Path) -> None:
    result = check_folder(found)
    if result.problems:
        raise SystemExit("\n".join(["vitrt check:", *result.problems]))
    killed, alone = FeatureStore(found), FeatureStore(wanted)
    if set(killed) != set(alone):
        raise SystemExit(f"images differ: {set(killed) ^ set(alone)}")
    for name, features in killed.items():
        for kind in ("embeddings", "deepstack"):
            mine, other = getattr(features, kind), getattr(alone[name], kind)
            error = float((mine - other).norm() / other.norm())
            if not error <= TOLERANCE:
                raise SystemExit(f"{name}: {kind} differ by {error}")


def _photos(folder: Path, count: int) -> Path:
    random_pixels = np.random.default_rng(0)
    for index in range(count):
        path = folder / str(index % 7) / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = random_pixels.integers(40, 160, 2)
        pixels = random_pixels.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def _checkpoint(folder: Path) -> Path:
    from tests.support.checkpoints import tiny_checkpoint

    return tiny_checkpoint("qwen3_vl", folder)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="default: a tiny one is made")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
