"""Several GPUs against one, on a random full-size tower: errors, times, and how sums travel.

    torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node 4 scripts/bench/parallel_gpus.py
        [--model qwen3-vl-8b] [--json FILE] [--seconds 170] [STEP...]

A step is TP:SUMS (SUMS is nccl, symmetric or auto), or `messages` for a table of single sums. The
row of one GPU always comes first; every line is printed, and the file written, as soon as it is
known. Every rank runs the same calls the same number of times; a time is the slowest rank's median.
NVLink multicast stays off.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

# A fault in NVLink multicast takes down every GPU of the host.
os.environ["NCCL_NVLS_ENABLE"] = "0"
os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from vitrt import ParallelContext, VisionEncoder
from vitrt.bench.timing import mark, milliseconds
from vitrt.compare.reference import (
    NamedModel,
    build_tower,
    find_model,
    float32_copy,
    save_checkpoint,
    shrink,
)
from vitrt.engine.engine import Engine
from vitrt.parallel import context as distributed

Grids = list[tuple[int, int, int]]
MESSAGE_ROWS = (64, 256, 648, 1296, 3080, 8192, 16384, 32768)
HANGING_SECONDS = 45  # past --seconds, every rank says where it is and ends


@dataclass(frozen=True)
class Setup:
    """Where it runs, and on what."""

    device: torch.device
    dtype: torch.dtype
    accuracy: Grids
    small: Grids
    large: Grids
    list: Grids


GPU = Setup(
    torch.device("cuda"),
    torch.bfloat16,
    accuracy=[(1, 44, 70), (1, 36, 36), (2, 16, 18)],
    small=[(1, 36, 36)],
    large=[(1, 128, 256)],
    list=[(1, 44, 70)] * 16,
)
TINY = Setup(
    torch.device("cpu"),
    torch.float32,
    accuracy=[(1, 6, 4), (2, 4, 4)],
    small=[(1, 4, 6)],
    large=[(1, 12, 16)],
    list=[(1, 4, 4)] * 4,
)


@dataclass
class Row:
    """One way to share a tower. Times in milliseconds; a graph runs the 1x560 image."""

    tp: int
    sums: str
    errors: list[float] = field(default_factory=list)  # embeddings, deepstack
    bounds: list[float] = field(default_factory=list)
    right: bool = False
    ms: dict[str, float] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help="default: all, the shortest first")
    parser.add_argument("--model", default="qwen3-vl-8b", help="a size of configs/")
    parser.add_argument("--seconds", type=float, default=170, help="start no step after that many")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go too")
    parser.add_argument("--tiny", action="store_true", help="a tiny tower on CPUs: a rehearsal")
    args = parser.parse_args()
    faulthandler.dump_traceback_later(args.seconds + HANGING_SECONDS, exit=True)
    try:
        bench = Bench(args, TINY if args.tiny else GPU)
        bench.run()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # what is alive of NCCL would wait for the other ranks
    return 1 if bench.failed else 0


def default_steps(world: int) -> list[str]:
    """What is asked for first comes first; with two ranks there is one size only."""
    steps = [f"{world}:nccl", f"{world}:symmetric", "2:nccl", "messages", f"{world}:auto"]
    return list(dict.fromkeys([*steps, "2:auto", "2:symmetric"]))


class Bench:
    def __init__(self, args: argparse.Namespace, setup: Setup) -> None:
        self.args, self.setup = args, setup
        self.started = time.perf_counter()
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.steps: list[str] = args.steps or default_steps(self.world)
        self.failed = False
        self.rows: dict[tuple[int, str], Row] = {}
        self.notes: list[str] = []
        self.messages_table: list[dict[str, Any]] = []
        self.lists_per_second: dict[str, Any] = {}
        self.contexts: dict[tuple[int, str], ParallelContext] = {}
        port = os.environ["MASTER_PORT"]
        self.folder = Path(tempfile.gettempdir()) / f"vitrt-bench-{args.model}-{port}"
        if setup.device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        else:
            distributed.OVERLAP_ROWS = 100
        if self.rank == 0:
            self.write_inputs()
        base = ParallelContext.from_env(self.world, all_reduce="nccl", device=setup.device.type)
        self.contexts[self.world, "nccl"] = base
        dist.barrier()
        self.expected = torch.load(self.folder / "expected.pt")

    def run(self) -> None:
        self.say(f"{self.world} x {self.device_name()}, torch {torch.__version__}", note=True)
        self.say("bf16 error against float32 / the bound of 1.05 x transformers' bf16 error; ms")
        head = "1x560 graph  1x560 eager   1x4k  16x1120x700"
        self.say(f"{'tp':>2} {'sums':>10}  error / bound (embeddings, deepstack)       {head}")
        self.step("1:-")
        for name in self.steps:
            if self.slowest(time.perf_counter() - self.started) > self.args.seconds:
                self.say(f"no time for {name}", note=True)
                continue
            self.step(name)
        self.say(f"total {time.perf_counter() - self.started:.0f} s", note=True)
        self.close()

    def step(self, name: str) -> None:
        if name == "messages":
            self.messages()
        else:
            tp, method = name.split(":")
            self.row(int(tp), method)
        gc.collect()
        if self.setup.device.type == "cuda":
            torch.cuda.empty_cache()
        self.save()

    def close(self) -> None:
        """Graphs are freed by now: NCCL waits for them."""
        self.finish()
        dist.barrier()  # nobody reads a peer's memory any more
        if self.rank == 0:
            shutil.rmtree(self.folder)
        base = self.contexts[self.world, "nccl"]
        self.contexts.clear()
        gc.collect()
        base.close()
        faulthandler.cancel_dump_traceback_later()

    # Inputs

    def write_inputs(self) -> None:
        """The checkpoint, and what transformers makes of the accuracy inputs in both precisions."""
        source = find_model(self.args.model)
        if self.args.tiny:
            config = shrink(source.config)
            config = replace(config, num_heads=4, hidden_size=4 * config.head_dim)
            source = NamedModel(source.name, config, None)
        tower = build_tower(source, device=self.setup.device, dtype=self.setup.dtype)
        save_checkpoint(tower, source, self.folder)
        pixels = self.pixel_values(self.setup.accuracy, source.config.patch_dim)
        grids = torch.tensor(self.setup.accuracy, device=self.setup.device)
        with torch.inference_mode():
            rounded = outputs(tower(pixels, grid_thw=grids))
            exact = outputs(float32_copy(tower, source.config)(pixels.float(), grid_thw=grids))
        floor = 1e-5 if self.setup.dtype == torch.float32 else 0.0
        bounds = [max(1.05 * relative_l2(a, b), floor) for a, b in zip(rounded, exact, strict=True)]
        expected = {"exact": [t.cpu() for t in exact], "bounds": bounds}
        torch.save(expected, self.folder / "expected.pt")
        del tower, rounded, exact
        gc.collect()
        if self.setup.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"[{time.perf_counter() - self.started:4.0f} s] inputs are written", flush=True)

    def pixel_values(self, grids: Grids, width: int) -> Tensor:
        rows = sum(t * h * w for t, h, w in grids)
        generator = torch.Generator(self.setup.device).manual_seed(rows)
        values = torch.randn(rows, width, device=self.setup.device, generator=generator)
        return values.to(self.setup.dtype)

    # Saying

    def say(self, line: str, *, note: bool = False) -> None:
        if note:
            self.notes.append(line)
        if self.rank == 0:
            print(f"[{time.perf_counter() - self.started:4.0f} s] {line}", flush=True)

    def save(self) -> None:
        if self.rank > 0 or self.args.json is None:
            return
        nccl = torch.cuda.nccl.version() if self.setup.device.type == "cuda" else None
        results = {
            "device": self.device_name(),
            "gpus": self.world,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "nccl": nccl,
            "model": self.args.model,
            "nvlink_multicast": False,
            "ok": not self.failed,
            "rows": [asdict(row) for row in self.rows.values()],
            "lists_per_second": self.lists_per_second,
            "messages": self.messages_table,
            "notes": self.notes,
        }
        self.args.json.parent.mkdir(parents=True, exist_ok=True)
        self.args.json.write_text(json.dumps(results, indent=1) + "\n")

    def device_name(self) -> str:
        return torch.cuda.get_device_name() if self.setup.device.type == "cuda" else "CPU"

    # Between ranks

    def slowest(self, value: float) -> float:
        return max(self.everyones(value))

    def everyones(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def context(self, tp: int, method: str) -> ParallelContext | None:
        """Made when first asked for; None where it cannot be had."""
        if (tp, method) not in self.contexts:
            made, problem = None, ""
            try:
                made = ParallelContext.from_env(
                    tp,
                    all_reduce=method,  # type: ignore[arg-type]
                    device=self.setup.device.type,
                )
            except ValueError as error:
                problem = str(error)
            problems = [text for text in self.everyones(problem) if text]
            if problems or made is None:
                self.say(f"{tp}:{method} cannot be had: {problems[0]}", note=True)
                self.failed |= self.setup.device.type == "cuda"
                return None
            self.contexts[tp, method] = made
        return self.contexts[tp, method]

    # Time

    def finish(self) -> None:
        """Wait for this rank's device."""
        if self.setup.device.type == "cuda":
            torch.cuda.synchronize()

    def median_ms(
        self, call: Callable[[], object], *, calls: int, warm: int = 3, alone: bool = False
    ) -> float:
        """The slowest rank's median between the ends of successive calls (of ranks that work
        alone, the fastest's: nothing is to look better than one GPU at its best).
        """
        for _ in range(warm):
            call()
        self.finish()
        dist.barrier()
        marks = [mark(self.setup.device)]
        for _ in range(calls):
            call()
            marks.append(mark(self.setup.device))
        medians = self.everyones(statistics.median(milliseconds(marks)))
        return min(medians) if alone else max(medians)

    def rate(self, call: Callable[[], object], calls: int = 12) -> float:
        for _ in range(3):
            call()
        first = mark(self.setup.device)
        for _ in range(calls):
            call()
        return 1e3 * calls / milliseconds([first, mark(self.setup.device)])[0]

    # Single sums

    def messages(self) -> None:
        """Microseconds of one sum inside a graph, by size and method."""
        if self.setup.device.type != "cuda":
            return
        self.say("one sum of [rows, 1152] bf16, microseconds inside a graph")
        self.say("tp  rows      MiB     nccl  one-shot  two-shot  fastest   auto takes")
        for tp in sorted({2, self.world}, reverse=True):
            nccl, forced = self.context(tp, "nccl"), self.context(tp, "symmetric")
            auto = self.context(tp, "auto")
            if nccl is None or forced is None or auto is None:
                continue
            symmetric = forced.symmetric
            assert symmetric is not None and forced.tp_group is not None
            choice = {"reduce_op": "sum", "group_name": forced.tp_group.group_name}
            ops = torch.ops.symm_mem
            for rows in MESSAGE_ROWS:
                message = symmetric.buffer("bench", (rows, 1152), self.setup.dtype)
                assert message is not None
                times = {
                    "nccl": self.sum_us(message.clone(), nccl.all_reduce),
                    "one-shot": self.sum_us(message, partial(ops.one_shot_all_reduce, **choice)),
                    "two-shot": self.sum_us(message, partial(ops.two_shot_all_reduce_, **choice)),
                }
                taken = "nccl"
                if auto.symmetric is not None:
                    taken = "two-shot" if auto.symmetric.takes(message.nbytes) else "nccl"
                row = "".join(f"{value:10.1f}" for value in times.values())
                best = min(times, key=times.__getitem__)
                size = message.nbytes / 2**20
                self.say(f"{tp:2}{rows:7}{size:9.2f}{row}  {best:8}  {taken}")
                entry = {"tp": tp, "bytes": message.nbytes, "us": times, "auto": taken}
                self.messages_table.append(entry)

    def sum_us(self, message: Tensor, reduce: Callable[[Tensor], Tensor]) -> float:
        calls = 20
        message.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            reduce(message)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            for _ in range(calls):
                reduce(message)
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        milliseconds = self.median_ms(graph.replay, calls=5, warm=2)
        torch.cuda.synchronize()
        return 1e3 * milliseconds / calls

    # Towers

    def row(self, tp: int, method: str) -> None:
        options: dict[str, Any] = {}
        if tp > 1:
            context = self.context(tp, method)
            if context is None:
                return
            options["parallel"] = context
        encoder = VisionEncoder.from_pretrained(
            self.folder, device=self.setup.device, dtype=self.setup.dtype, **options
        )
        row = Row(tp, method, *self.errors(encoder))
        row.ms["1x560 graph"] = self.forward_ms(encoder, self.setup.small, calls=50)
        row.ms["1x4k"] = self.forward_ms(encoder, self.setup.large, calls=5, warm=2)
        row.ms["16x1120x700"] = self.forward_ms(encoder, self.setup.list, calls=5, warm=2)
        row.ms["1x560 eager"] = self.forward_ms(eager(encoder), self.setup.small, calls=20)
        if method == "nccl":
            overlapping, distributed.OVERLAP_ROWS = distributed.OVERLAP_ROWS, sys.maxsize
            row.ms["1x4k in sequence"] = self.forward_ms(encoder, self.setup.large, calls=5, warm=1)
            distributed.OVERLAP_ROWS = overlapping
        replayed = encoder.stats().hits.total() > 0 or self.setup.device.type != "cuda"
        row.right = replayed and all(
            error <= bound for error, bound in zip(row.errors, row.bounds, strict=True)
        )
        self.failed |= not row.right
        self.rows[tp, method] = row
        self.say_row(row)
        if tp == 1:
            self.data_parallel(encoder)

    def say_row(self, row: Row) -> None:
        pairs = zip(row.errors, row.bounds, strict=True)
        shown = "  ".join(f"{error:.2e} / {bound:.2e}" for error, bound in pairs)
        ms = row.ms
        self.say(
            f"{row.tp:2} {row.sums:>10}  {shown}  {'ok ' if row.right else 'BAD'}"
            f"{ms['1x560 graph']:12.3f}{ms['1x560 eager']:13.3f}{ms['1x4k']:8.1f}"
            f"{ms['16x1120x700']:11.1f}"
        )
        if row.tp == 1:
            return
        one = self.rows[1, "-"].ms
        gains = {name: one[name] / ms[name] for name in ("1x4k", "16x1120x700", "1x560 graph")}
        text = ", ".join(f"{name} {gain:.2f}x" for name, gain in gains.items())
        graphs = ms["1x560 eager"] / ms["1x560 graph"]
        self.say(
            f"tp {row.tp} {row.sums} over one GPU: {text}; graphs over eager at 1x560 "
            f"{graphs:.2f}x",
            note=True,
        )
        if row.sums == "nccl":
            overlap = ms["1x4k in sequence"] / ms["1x4k"]
            self.say(f"tp {row.tp} overlap over sums in sequence: 1x4k {overlap:.2f}x", note=True)
        elif (row.tp, "nccl") in self.rows:
            nccl = self.rows[row.tp, "nccl"].ms
            gains = {name: nccl[name] / ms[name] for name in ("1x560 graph", "1x4k")}
            text = ", ".join(f"{name} {gain:.2f}x" for name, gain in gains.items())
            self.say(f"tp {row.tp} {row.sums} over nccl: {text}", note=True)

    def data_parallel(self, encoder: VisionEncoder) -> None:
        """Lists per second of one GPU while the others rest, and of each while all work."""
        call = self.call(encoder, self.setup.list)
        self.finish()
        dist.barrier()
        alone = self.rate(call) if self.rank == 0 else 0.0
        dist.barrier()
        alone = self.everyones(alone)[0]
        together = self.everyones(self.rate(call))
        self.lists_per_second = {"one GPU alone": alone, "each of all": together}
        self.say(
            f"dp {self.world}: 16x1120x700 lists at {sum(together):.2f} lists/s together, "
            f"{alone:.2f} on one GPU alone: {sum(together) / alone:.2f}x",
            note=True,
        )

    def call(self, encoder: VisionEncoder, grids: Grids) -> Callable[[], object]:
        pixels = self.pixel_values(grids, encoder.config.patch_dim)
        return lambda: encoder(pixels, grids)

    def forward_ms(
        self, encoder: VisionEncoder, grids: Grids, *, calls: int, warm: int = 3
    ) -> float:
        alone = encoder.parallel.tp_size == 1
        return self.median_ms(self.call(encoder, grids), calls=calls, warm=warm, alone=alone)

    def errors(self, encoder: VisionEncoder) -> tuple[list[float], list[float]]:
        """(relative L2 errors, bounds) of the outputs; the largest errors of all ranks."""
        call = self.call(encoder, self.setup.accuracy)
        for _ in range(3):
            output: Any = call()
        errors = [
            self.slowest(relative_l2(actual, exact))
            for actual, exact in zip(outputs(output), self.expected["exact"], strict=True)
        ]
        return errors, self.expected["bounds"]


def eager(encoder: VisionEncoder) -> VisionEncoder:
    """The same tower without graphs."""
    runtime = replace(encoder.runtime, cuda_graphs=False)
    return VisionEncoder(Engine(encoder.tower, runtime, encoder.parallel), encoder.preprocessor)


def outputs(output: Any) -> list[Tensor]:
    """Embeddings, and deepstack where there is one, of transformers' or of our output."""
    if hasattr(output, "embeddings"):
        return [t for t in (output.embeddings, output.deepstack) if t is not None]
    levels = getattr(output, "deepstack_features", None)
    return [output.pooler_output, *([torch.stack(list(levels))] if levels else [])]


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double().to(actual.device)
    return float((actual - expected).norm() / expected.norm())


if __name__ == "__main__":
    raise SystemExit(main())
