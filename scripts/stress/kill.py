"""Kill `vitrt encode` at random moments, let it resume, and compare with a run that was left alone.

    python scripts/stress/kill.py --kills 200
    python scripts/stress/kill.py --kills 10 --images 20000 --rounds 3 \\
        --sources folder tar parquet dataset memory

Each run is a process of its own, forked with the tower loaded, and dies by SIGKILL. Every source
holds the same images. Exit code 1 if in the end an image is missing or there twice, `vitrt check`
finds anything, or a feature differs from that of a folder's run. With --rounds, the sources are
also timed in turns, and their images/s compared with a folder's.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image

from tests.support.checkpoints import tiny_checkpoint
from tests.support.shards import write_dataset, write_parquet, write_remote, write_tar
from vitrt.checkpoint.opened import open_checkpoint
from vitrt.config import RuntimeConfig
from vitrt.encoder import VisionEncoder
from vitrt.job.encode import EncodeOptions, encode_folder
from vitrt.job.progress import Progress
from vitrt.job.stop import Stop
from vitrt.sources.inputs import Inputs
from vitrt.sources.options import SourceOptions
from vitrt.store.check import check_folder
from vitrt.store.feature_store import FeatureStore

# Batches of two runs hold other images, and matrix products of other shapes round otherwise.
TOLERANCE = 1e-5
SOURCES = ("folder", "tar", "parquet", "dataset", "memory")


def main() -> int:
    args = _arguments()
    torch.set_num_threads(1)  # threads do not survive a fork
    random.seed(args.seed)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        photos = _photos(folder / "in", args.images)
        job = _Job(
            args.checkpoint or tiny_checkpoint("qwen3_vl", folder / "checkpoint"), args.shard_mib
        )
        sources = {kind: _source(kind, photos, folder) for kind in args.sources}
        alone = folder / "alone"
        seconds = job.time(alone, photos)
        for kind, source in sources.items():
            kills = resumed = 0
            while True:
                output = folder / f"{kind}-{resumed}"
                # Spread so that a folder takes a few lives to complete.
                delay = random.uniform(0, seconds / 2) if kills < args.kills else None
                if job.run(output, source, kill_after=delay) == 0:
                    _compare(output, alone)
                    shutil.rmtree(output)
                    resumed += 1
                    if delay is None:
                        break
                else:
                    kills += 1
            print(
                f"{kind}: {kills} kills, {resumed} folders completed, every image once, all "
                "features equal",
                flush=True,
            )
        _race(job, {"folder": photos, **sources}, folder, args)
    return 0


def _race(
    job: _Job, sources: dict[str, Path | str], folder: Path, args: argparse.Namespace
) -> None:
    """Images/s of whole runs, the best of so many rounds in turns, and processor time beside it."""
    never = float("inf"), float("inf")
    best = dict.fromkeys(sources, never)
    for _ in range(args.rounds):
        for kind, source in sources.items():
            seconds = job.time(folder / "timed", source)
            best[kind] = min(best[kind][0], seconds), min(best[kind][1], job.cpu_seconds)
            shutil.rmtree(folder / "timed")
    for kind, (seconds, cpu) in best.items() if args.rounds else ():
        print(
            f"{kind}: {args.images / seconds:.0f} images/s, {best['folder'][0] / seconds:.0%} of a "
            f"folder's; {1000 * cpu / args.images:.2f} ms of processor time an image, "
            f"{cpu / best['folder'][1]:.0%} of a folder's"
        )


class _Job:
    """Runs over one source, each in a fork of this process."""

    def __init__(self, checkpoint: Path, shard_mib: float) -> None:
        self.cpu_seconds = 0.0  # of the last run
        self._options = EncodeOptions(workers=2, shard_mib=shard_mib)
        self._checkpoint = open_checkpoint(checkpoint)
        self._runtime = RuntimeConfig(device="cpu", max_batch_tokens=256)
        encoder = VisionEncoder.from_checkpoint(self._checkpoint, self._runtime)
        VisionEncoder.from_checkpoint = classmethod(  # type: ignore[method-assign]
            lambda cls, *arguments, **options: encoder  # loaded once, for all forks
        )

    def time(self, output: Path, source: Path | str) -> float:
        """Seconds of a run that is left alone."""
        started = time.perf_counter()
        assert self.run(output, source) == 0
        return time.perf_counter() - started

    def run(self, output: Path, source: Path | str, kill_after: float | None = None) -> int:
        """The exit code; -9 if it was killed before it ended."""
        child = os.fork()
        if child == 0:
            os._exit(self._encode(output, source))
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        _, status, used = os.wait4(child, 0)
        self.cpu_seconds = used.ru_utime + used.ru_stime
        return os.waitstatus_to_exitcode(status)

    def _encode(self, output: Path, source: Path | str) -> int:
        has_names = str(source).endswith(("parquet", "dataset"))
        inputs = Inputs([source], SourceOptions(id_column="name" if has_names else None))
        summary = encode_folder(
            self._checkpoint,
            self._runtime,
            inputs,
            output,
            self._options,
            progress=Progress(),
            stop=Stop(),
        )
        return 3 if summary.state.skipped else 0


def _compare(found: Path, wanted: Path) -> None:
    result = check_folder(found)
    if result.problems:
        raise SystemExit("\n".join(["vitrt check:", *result.problems]))
    killed, alone = FeatureStore(found), FeatureStore(wanted)
    names = {image_id: _name(image_id) for image_id in killed}
    if len(names) != len(alone) or set(names.values()) != set(alone):
        raise SystemExit(f"images differ: {set(names.values()) ^ set(alone)}")
    for image_id, name in names.items():
        features = killed[image_id]
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


def _source(kind: str, photos: Path, folder: Path) -> Path | str:
    """The photos once more, in three shards where they are shards."""
    names = [record.id for record in Inputs([photos])]
    if kind == "folder":
        return photos
    if kind == "memory":  # which forks of this process share
        return write_remote({name: (photos / name).read_bytes() for name in names}, "memory://in")
    target = folder / kind
    target.mkdir()
    step = -(-len(names) // 3)
    for start in range(0, len(names), step):
        images = {name: (photos / name).read_bytes() for name in names[start : start + step]}
        if kind == "tar":
            write_tar(images, target / f"{start:06}.tar")
        elif kind == "parquet":
            write_parquet(images, target / f"{start:06}.parquet")
    if kind == "dataset":
        write_dataset({name: (photos / name).read_bytes() for name in names}, target)
    return target


def _name(image_id: str) -> str:
    """What a folder calls the image."""
    shard, _, key = image_id.partition("/")
    return f"{key}.png" if shard.endswith(".tar") else image_id


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--sources", nargs="+", default=["folder"], choices=SOURCES)
    parser.add_argument("--shard-mib", type=float, default=1 / 16)
    parser.add_argument("--rounds", type=int, default=0, help="of timing, after the kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="default: a tiny one is made")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
