"""How much of `vitrt encode`'s rate one Ray actor reaches, on the same images.

Makes JPEGs from scikit-image's photographs, then encodes them in turns: by the command, by
`encode_dataset` into a folder, and by `map_batches(RayEncoder)` into rows. Start-up is counted
nowhere: the command's rate begins where its model is loaded, the actor's where its first batch
does; all end when the last image is done (in a folder: durable). All features are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from end_to_end import make_images, run_encode  # beside this file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from vitrt import FeatureStore
from vitrt.compare.reference import build_tower, find_model, save_checkpoint
from vitrt.cores import usable_cores
from vitrt.integrations.ray import RayEncoder, encode_dataset, two_at_a_time
from vitrt.job.options import EncodeOptions

ROOT = Path(__file__).resolve().parents[2]
POOLED = EncodeOptions(pool="mean", overwrite=True)
Vectors = dict[str, np.ndarray]


class TimedEncoder(RayEncoder):
    """Rows that say when their batch began, and when they were ready."""

    def __call__(self, batch: Any) -> Iterator[pa.Table]:
        began = time.time()
        for table in super().__call__(batch):
            for name, value in (("began", began), ("ended", time.time())):
                table = table.append_column(name, pa.array([value] * len(table)))
            yield table


def by_command(model: Path, images: Path, count: int, output: Path) -> tuple[float, Vectors]:
    end, _ = run_encode(model, str(images), output, ["--pool", "mean", "--overwrite"])
    if end["images"] != count:
        raise SystemExit(f"vitrt encode did {end['images']} of {count} images")
    return end["images_per_second"], stored(output)


def stored(output: Path) -> Vectors:
    store = FeatureStore(output)
    return {name: store[name].embeddings[0].float().numpy() for name in store}


def by_dataset(model: Path, rows: Sequence[dict[str, str]], output: Path) -> tuple[float, Vectors]:
    """From when the first call takes a place in the folder until the last manifest is written."""
    began: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        while not (began or ended.is_set()):
            if any(output.glob("manifest-*.jsonl")):
                began.append(time.time())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        summary = encode_dataset(ray.data.from_items(list(rows)), model, output, options=POOLED)
    finally:
        ended.set()
        watcher.join()
    if summary.images != len(rows):
        raise SystemExit(f"encode_dataset did {summary} of {len(rows)} images")
    last = max(path.stat().st_mtime for path in output.glob("features-*"))
    return len(rows) / (last - began[0]), stored(output)


def by_rows(model: Path, rows: Sequence[dict[str, str]]) -> tuple[float, Vectors]:
    dataset = ray.data.from_items(list(rows)).map_batches(
        TimedEncoder,
        fn_constructor_kwargs={"model": model, "options": POOLED},
        batch_size=1024,
        compute=two_at_a_time(1),
        num_cpus=1,
        num_gpus=1 if torch.cuda.is_available() else 0,
    )
    found = list(dataset.iter_rows())
    if any(row["error"] for row in found) or len(found) != len(rows):
        raise SystemExit(f"RayEncoder did not do all of {len(rows)} images")
    seconds = max(row["ended"] for row in found) - min(row["began"] for row in found)
    return len(rows) / seconds, {row["id"]: np.asarray(row["vector"]) for row in found}


def largest_difference(found: Vectors, wanted: Vectors) -> float:
    """Relative to the largest value of an image."""
    if set(found) != set(wanted):
        raise SystemExit(f"{len(set(found) ^ set(wanted))} images are in one output alone")
    return max(
        float(np.abs(found[name] - wanted[name]).max() / np.abs(wanted[name]).max())
        for name in wanted
    )


def compare(model: Path, size: tuple[int, int], count: int, rounds: int, work: Path) -> dict:
    """Images a second of each, their ratios, and how far features differ."""
    images = work / f"images-{size[0]}x{size[1]}"
    paths = make_images(images, count, *size, usable_cores())
    rows = [{"id": path.name, "image": str(path)} for path in paths]
    rates: dict[str, list[float]] = {}
    differences: dict[str, float] = {}
    for _ in range(rounds):
        rate, wanted = by_command(model, images, count, work / "command")
        rates.setdefault("vitrt encode", []).append(rate)
        for name, (rate, found) in (
            ("encode_dataset", by_dataset(model, rows, work / f"ray-{len(rates)}-{time.time()}")),
            ("map_batches", by_rows(model, rows)),
        ):
            rates.setdefault(name, []).append(rate)
            difference = largest_difference(found, wanted)
            differences[name] = max(difference, differences.get(name, 0.0))
    medians = {name: statistics.median(each) for name, each in rates.items()}
    print(f"{count} JPEGs of about {size[0]} x {size[1]}")
    for name, rate in medians.items():
        print(
            f"{name:>16}: {rate:8.1f} images/s, {100 * rate / medians['vitrt encode']:5.1f}% of "
            f"the command's; features differ by up to {differences.get(name, 0.0):.1e}"
        )
    return {"size": size, "images": count, "rates": rates, "differences": differences}


def checkpoint(name: str, tiny: bool, work: Path) -> Path:
    if Path(name).is_dir() and any(Path(name).glob("*.safetensors")):
        return Path(name)
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    source = find_model(name, tiny=tiny)
    tower = build_tower(source, device=torch.device(device), dtype=dtype)
    model = save_checkpoint(tower, source, work / "model")
    del tower
    torch.cuda.empty_cache()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3-vl-8b", help="a checkpoint, or a size")
    parser.add_argument("--tiny", action="store_true", help="a scaled-down tower, for trying this")
    parser.add_argument("--sizes", nargs="+", default=["1120x700", "448x448"], metavar="WxH")
    parser.add_argument("--images", nargs="+", type=int, default=[2000, 4000], help="of each size")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"  # for Ray's workers
    # One core's worth for reading and one for the actor, whose threads Ray does not count.
    ray.init(address="local", num_cpus=max(usable_cores(), 2), include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    found = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = checkpoint(args.model, args.tiny, work)
        compare(model, (224, 224), 64, 1, work)  # compiles what is kept on disk
        for text, count in zip(args.sizes, args.images, strict=True):
            width, height = map(int, text.split("x"))
            found.append(compare(model, (width, height), count, args.rounds, work))
    ray.shutdown()
    if args.json is not None:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        facts = {"model": args.model, "device_name": name, "cores": usable_cores(), "runs": found}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
