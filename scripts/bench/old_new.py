#!/usr/bin/env python3
"""Two checkouts of vitrt against each other on one card, in turns.

    python scripts/bench/old_new.py OLD [NEW] --json FILE

OLD and NEW are folders that hold a `vitrt` package; NEW is this checkout where it is left out. Each
has a process of its own, and the two are asked for one short measurement in turns: old, new, old,
new. `--pairs` starts the processes anew so many times, since a process keeps the luck that it had
with memory and clocks. Both run the same random weights and pixels; ratios are old over new, above
1 where the new one is faster. Single images go by the clock on the wall, lists by the device.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SIDES = ("old", "new")
MODELS = ("qwen3-vl-8b", "qwen2.5-vl-7b")
WORKLOADS = ("1x560", "1x1120x700", "32x560", "16x1120x700", "1x4k", "mixed16")
FIGURES = ("wall_ms", "rate_ms", "host_ms")


# The process of one checkout. What it uses of vitrt has to exist in both.


class Server:
    """Measures one checkout's encoder, as it is asked to on standard input."""

    def __init__(self) -> None:
        # The same timer for both, whatever their own is.
        path = ROOT / "vitrt" / "bench" / "timing.py"
        spec = importlib.util.spec_from_file_location("timer_of_old_new", path)
        assert spec is not None and spec.loader is not None
        self.timer: Any = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = self.timer
        spec.loader.exec_module(self.timer)
        self.encoder: Any = None
        self.samples: dict[str, Any] = {}

    def load(self, folder: str, device: str, dtype: str) -> dict[str, Any]:
        """Load a checkpoint in place of the one before."""
        import torch

        import vitrt

        self.samples.clear()
        self.encoder = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        start = time.monotonic()
        self.encoder = vitrt.VisionEncoder.from_pretrained(folder, device=device, dtype=dtype)
        return {
            "package": str(Path(vitrt.__file__).parent),
            "version": vitrt.__version__,
            "seconds": time.monotonic() - start,
        }

    def warm(self, name: str, grids: list[list[int]], reference: str | None) -> dict[str, Any]:
        """Run a workload until it is warm; its error, and what tells its outputs apart."""
        import torch

        encoder = self.encoder
        patches = sum(math.prod(grid) for grid in grids)
        pixels = random_pixels(patches, encoder.config.patch_dim, encoder.device, encoder.dtype)
        thw = torch.tensor(grids)
        with torch.inference_mode():
            self.samples[name] = self.timer.Samples(
                lambda x: encoder(x, thw), pixels, encoder.device
            )
            out = encoder(pixels[0], thw)
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (out.embeddings, out.deepstack):
            if tensor is not None:
                digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy())
        error = None
        if reference is not None:
            expected = torch.load(reference)
            embeddings = out.embeddings.float().cpu()
            error = float((embeddings - expected).norm() / expected.norm())
        return {"digest": digest.hexdigest(), "error": error}

    def measure(self, name: str, seconds: float, single: bool) -> dict[str, Any]:
        """One short measurement of a warm workload: medians in milliseconds."""
        import torch

        samples = self.samples[name]
        for times in (samples.rates, samples.walls, samples.hosts):
            times.clear()
        count = max(2, min(100, int(seconds / samples.seconds)))
        with torch.inference_mode():
            samples.burst(count)
            samples.single_calls(count if single else min(count, 5))
        timing = samples.timing()
        samples.seconds = timing.rate_ms / 1e3  # the other process no longer runs beside it
        return asdict(timing)


def random_pixels(patches: int, width: int, device: Any, dtype: Any) -> list[Any]:
    """Sets of pixels [T, P], the same in every process on one device."""
    import torch

    generator = torch.Generator(device).manual_seed(patches)
    return [
        torch.randn((patches, width), generator=generator, device=device).to(dtype)
        for _ in range(2)
    ]


def serve() -> None:
    """Answer requests, one JSON line each, until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not get between the answers
    server = Server()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(server, request.pop("do"))(**request)
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


# The process that asks.


class FailedError(RuntimeError):
    """A checkout could not do what it was asked for."""


class Side:
    """A checkout's process, as seen from here."""

    def __init__(self, name: str, checkout: Path) -> None:
        self.name = name
        path = [str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        )

    def send(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"failed": "its process ended"}
        if "failed" in answer:
            raise FailedError(f"{self.name}: {answer['failed']}")
        return answer

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.send(do, **arguments)
        return self.receive()

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()


@dataclass
class Row:
    """One workload of one model."""

    model: str
    workload: str
    grids: list[list[int]]
    figures: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: {side: {name: [] for name in FIGURES} for side in SIDES}
    )
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)  # digest and error by side

    @property
    def judged_by(self) -> str:
        return "wall_ms" if len(self.grids) == 1 else "rate_ms"

    def median(self, side: str, figure: str) -> float:
        return statistics.median(self.figures[side][figure])

    def ratio(self, figure: str) -> float:
        """Old over new, the median of the turns: each beside the one that followed it."""
        old, new = (self.figures[side][figure] for side in SIDES)
        return statistics.median(a / b for a, b in zip(old, new, strict=True))


@dataclass(frozen=True)
class Model:
    """A checkpoint of random weights, and what transformers makes of the pixels in float32."""

    name: str
    folder: Path
    workloads: dict[str, list[list[int]]]
    references: dict[str, str]


def make_model(args: argparse.Namespace, name: str, folder: Path) -> Model:
    """Write checkpoint and references into `folder`."""
    import torch

    from vitrt.bench.workloads import build_workloads
    from vitrt.compare.errors import float32_reference
    from vitrt.compare.reference import build_tower, find_model, float32_copy, save_checkpoint

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    source = find_model(name, tiny=args.tiny)
    workloads = build_workloads(source.config.patch_size, args.workloads, tiny=args.tiny)
    tower = build_tower(source, device=device, dtype=dtype)
    save_checkpoint(tower, source, folder)
    references = {}
    if args.errors:
        exact = float32_copy(tower, source.config)
        for workload in workloads:
            pixels = random_pixels(workload.patches, source.config.patch_dim, device, dtype)[0]
            with torch.inference_mode():
                embeddings, _ = float32_reference(exact, pixels, workload.grids)
            references[workload.name] = str(folder / f"{workload.name}.pt")
            torch.save(embeddings.cpu(), references[workload.name])
        del exact
    del tower
    if device.type == "cuda":
        torch.cuda.empty_cache()
    grids = {workload.name: [list(grid) for grid in workload.grids] for workload in workloads}
    return Model(name, folder, grids, references)


@contextlib.contextmanager
def both_sides(args: argparse.Namespace) -> Iterator[list[Side]]:
    sides = [Side(name, checkout) for name, checkout in zip(SIDES, args.checkouts, strict=True)]
    try:
        yield sides
    finally:
        for side in sides:
            side.close()


def run_pair(args: argparse.Namespace, models: list[Model], rows: dict[Any, Row]) -> None:
    """Start both processes and take all rows in turns."""
    with both_sides(args) as sides:
        for model in models:
            # Loading and compiling may run at once; nothing is timed meanwhile.
            for side in sides:
                side.send("load", folder=str(model.folder), device=args.device, dtype=args.dtype)
            for side, checkout in zip(sides, args.checkouts, strict=True):
                loaded = side.receive()
                if Path(loaded["package"]).resolve() != (checkout / "vitrt").resolve():
                    raise FailedError(f"{side.name} runs {loaded['package']}, not {checkout}")
                say(args, f"{model.name}: {side.name} loaded in {loaded['seconds']:.1f} s")
            for name, grids in model.workloads.items():
                row = rows.setdefault((model.name, name), Row(model.name, name, grids))
                for side in sides:
                    side.send("warm", name=name, grids=grids, reference=model.references.get(name))
                for side in sides:
                    row.outputs[side.name] = side.receive()
                for _ in range(args.rounds):
                    for side in sides:
                        found = side.ask(
                            "measure", name=name, seconds=args.seconds, single=len(grids) == 1
                        )
                        for figure in FIGURES:
                            row.figures[side.name][figure].append(found[figure])
                say(args, line_of(row))


def line_of(row: Row) -> str:
    figure = row.judged_by
    old, new = (row.median(side, figure) for side in SIDES)
    text = f"{row.model:<15}{row.workload:<13}{figure[:4]:<5}{old:>10.4g}{new:>10.4g}"
    text += f"{row.ratio(figure):>8.3f}"
    old, new = (row.median(side, "host_ms") for side in SIDES)
    text += f"{old:>10.3f}{new:>8.3f}{row.ratio('host_ms'):>8.3f}"
    errors = [row.outputs[side]["error"] for side in SIDES]
    text += "".join(f"{'-' if error is None else format(error, '.4e'):>12}" for error in errors)
    same = row.outputs["old"]["digest"] == row.outputs["new"]["digest"]
    return text + ("  bit-equal" if same else "  differ")


def table(rows: list[Row]) -> Iterator[str]:
    yield (
        f"{'model':<15}{'workload':<13}{'by':<5}{'old ms':>10}{'new ms':>10}{'old/new':>8}"
        f"{'host old':>10}{'new':>8}{'old/new':>8}{'error old':>12}{'new':>12}  outputs"
    )
    yield from map(line_of, rows)
    for model in dict.fromkeys(row.model for row in rows):
        ratios = [row.ratio(row.judged_by) for row in rows if row.model == model]
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        yield f"{model}: old/new {min(ratios):.3f} to {max(ratios):.3f}, geometric mean {mean:.3f}"


def say(args: argparse.Namespace, line: str) -> None:
    print(f"{time.monotonic() - args.started:6.0f} s  {line}", file=sys.stderr, flush=True)


def to_json(args: argparse.Namespace, rows: list[Row]) -> dict[str, Any]:
    import torch

    cuda = args.device.startswith("cuda")
    return {
        "format": "vitrt.old_new.v1",
        "device": torch.cuda.get_device_name(args.device) if cuda else "cpu",
        "torch": torch.__version__,
        "dtype": args.dtype,
        "tiny": args.tiny,
        "pairs": args.pairs,
        "rounds": args.rounds,
        "seconds": time.monotonic() - args.started,
        "rows": [
            asdict(row)
            | {"judged_by": row.judged_by}
            | {"ratios": {figure: row.ratio(figure) for figure in FIGURES}}
            for row in rows
        ],
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="a folder that holds a vitrt package")
    parser.add_argument("new", type=Path, nargs="?", default=ROOT, help="default: this checkout")
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="default: %(default)s")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--tiny", action="store_true", help="scaled down, as for a CPU")
    parser.add_argument(
        "--pairs", type=int, default=2, help="starts of both (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=4, help="turns of a row in each pair (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.2, help="of one measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--errors",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with transformers in float32",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    args = parser.parse_args(argv)
    args.checkouts = [args.old.resolve(), args.new.resolve()]
    for checkout in args.checkouts:
        if not (checkout / "vitrt" / "__init__.py").is_file():
            parser.error(f"{checkout} holds no vitrt package")
    args.models = tuple(args.models.split(","))
    args.workloads = tuple(args.workloads.split(","))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.started = time.monotonic()
    sys.path.insert(0, str(ROOT))
    import torch

    args.device = args.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    args.dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    rows: dict[Any, Row] = {}
    code = 0
    with tempfile.TemporaryDirectory() as folder:
        models = []
        for name in args.models:
            models.append(make_model(args, name, Path(folder) / name))
            say(args, f"{name}: weights and references")
        try:
            for _ in range(args.pairs):
                run_pair(args, models, rows)
        except FailedError as error:  # what was measured until then is still worth a table
            print(f"failed: {error}", file=sys.stderr)
            code = 1
    finished = [row for row in rows.values() if row.figures["new"]["rate_ms"]]
    for row in finished:  # a pair that broke off in the middle of a turn
        count = len(row.figures["new"]["rate_ms"])
        for figure in FIGURES:
            del row.figures["old"][figure][count:]
    print("\n".join(table(finished)))
    if args.json is not None:
        args.json.write_text(json.dumps(to_json(args, finished), indent=1) + "\n")
    return code


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        raise SystemExit(main())
