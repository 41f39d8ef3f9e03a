"""Several GPUs against one, on a random full-size tower: errors, times, and how sums travel.

    torchrun --standalone --nproc-per-node 4 scripts/bench_parallel.py [--model qwen3-vl-8b]

Prints one table. Every rank runs the same calls the same number of times; a time is the slowest
rank's median.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vitrt import ParallelContext, VisionEncoder, distributed
from vitrt.bench.towers import build_tower, float32_copy, resolve, save_checkpoint

ACCURACY = [(1, 44, 70), (1, 36, 36), (2, 16, 18)]
SMALL, LARGE = [(1, 36, 36)], [(1, 128, 256)]
LIST = [(1, 44, 70)] * 16
MESSAGE_ROWS = (64, 256, 648, 1296, 3080, 8192, 16384, 32768)
DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
Grids = list[tuple[int, int, int]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3-vl-8b", help="a size of configs/")
    parser.add_argument("--skip-messages", action="store_true", help="no table of single sums")
    args = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    started = time.perf_counter()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    folder = Path(tempfile.gettempdir()) / f"vitrt-bench-{args.model}-{os.environ['MASTER_PORT']}"
    if rank == 0:
        write_inputs(args.model, folder)
    bench = Bench(folder, rank, world)
    bench.say(f"{world} x {torch.cuda.get_device_name()}, torch {torch.__version__}, {args.model}")
    if not args.skip_messages:
        bench.messages()
    bench.towers()
    bench.say(f"total {time.perf_counter() - started:.0f} s")
    bench.close()
    return 1 if bench.failed else 0


def write_inputs(model: str, folder: Path) -> None:
    """The checkpoint, and what transformers makes of the accuracy inputs in float32 and bf16."""
    source = resolve(model)
    tower = build_tower(source, device=DEVICE, dtype=DTYPE)
    save_checkpoint(tower, source, folder)
    pixels = pixel_values(ACCURACY, source.config.patch_dim)
    grids = torch.tensor(ACCURACY)
    with torch.inference_mode():
        rounded = outputs(tower(pixels, grid_thw=grids))
        exact = outputs(float32_copy(tower, source.config)(pixels.float(), grid_thw=grids))
    bounds = [1.05 * relative_l2(a, b) for a, b in zip(rounded, exact, strict=True)]
    torch.save({"exact": [t.cpu() for t in exact], "bounds": bounds}, folder / "expected.pt")
    del tower
    gc.collect()
    torch.cuda.empty_cache()


def outputs(output: Any) -> list[Tensor]:
    """Embeddings, and deepstack where there is one, of transformers' or of our output."""
    if hasattr(output, "embeddings"):
        return [t for t in (output.embeddings, output.deepstack) if t is not None]
    levels = getattr(output, "deepstack_features", None)
    return [output.pooler_output, *([torch.stack(list(levels))] if levels else [])]


def pixel_values(grids: Grids, width: int) -> Tensor:
    rows = sum(t * h * w for t, h, w in grids)
    generator = torch.Generator(DEVICE).manual_seed(rows)
    return torch.randn(rows, width, device=DEVICE, generator=generator).to(DTYPE)


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double().to(actual.device)
    return float((actual - expected).norm() / expected.norm())


class Bench:
    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self.failed = False
        self.contexts: dict[tuple[int, str], ParallelContext] = {}
        sizes = [tp for tp in (world, 2) if tp > 1]
        for tp in dict.fromkeys(sizes):
            for method in ("nccl", "symmetric", "auto"):
                self.contexts[tp, method] = ParallelContext.from_env(tp, all_reduce=method)  # type: ignore[arg-type]
        self.sizes = sorted(set(sizes))
        self.expected = torch.load(folder / "expected.pt")

    def close(self) -> None:
        torch.cuda.synchronize()
        first = self.contexts[self.world, "nccl"]
        self.contexts.clear()
        gc.collect()
        first.close()

    def say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)

    def slowest(self, value: float) -> float:
        return max(self.everyones(value))

    def everyones(self, value: float) -> list[float]:
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    # Single sums

    def messages(self) -> None:
        """Microseconds of one sum inside a graph, by size and method."""
        self.say("\none sum of [rows, 1152] bf16, microseconds inside a graph")
        self.say("tp  rows      MiB     nccl  one-shot  two-shot  fastest   auto takes")
        for tp in self.sizes:
            context = self.contexts[tp, "symmetric"]
            symmetric, auto = context.symmetric, self.contexts[tp, "auto"].symmetric
            assert symmetric is not None and context.tp_group is not None
            choice = {"reduce_op": "sum", "group_name": context.tp_group.group_name}
            ops = torch.ops.symm_mem
            for rows in MESSAGE_ROWS:
                message = symmetric.buffer("bench", (rows, 1152), DTYPE)
                assert message is not None
                times = {
                    "nccl": self.sum_us(message.clone(), self.contexts[tp, "nccl"].all_reduce),
                    "one-shot": self.sum_us(message, partial(ops.one_shot_all_reduce, **choice)),
                    "two-shot": self.sum_us(message, partial(ops.two_shot_all_reduce_, **choice)),
                }
                taken = "nccl"
                if auto is not None and auto.buffer("bench", (rows, 1152), DTYPE) is not None:
                    taken = "one-shot" if message.nbytes <= auto._one_shot else "two-shot"
                row = "".join(f"{value:10.1f}" for value in times.values())
                best = min(times, key=times.__getitem__)
                size = message.nbytes / 2**20
                self.say(f"{tp:2}{rows:7}{size:9.2f}{row}  {best:8}  {taken}")

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
        milliseconds = self.median_ms(graph.replay, calls=7)
        del graph
        return 1e3 * milliseconds / calls

    def median_ms(
        self, call: Callable[[], object], *, calls: int, warm: int = 3, alone: bool = False
    ) -> float:
        """The slowest rank's median between the ends of successive calls (of ranks that work
        alone, the fastest's: nothing is to look better than one GPU at its best).
        """
        for _ in range(warm):
            call()
        torch.cuda.synchronize()
        dist.barrier()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in pairwise(events)]
        medians = self.everyones(statistics.median(times))
        return min(medians) if alone else max(medians)

    # Towers

    def towers(self) -> None:
        self.say("\nbf16 error against float32, over the bound of 1.05 x transformers' bf16 error")
        self.say("and milliseconds (device, median of the slowest rank)")
        head = "1x560 graph  1x560 eager   1x4k  16x1120x700"
        self.say(f"{'tp':>2} {'sums':>10}  error / bound (embeddings, deepstack)   {head}")
        times: dict[tuple[int, str], dict[str, float]] = {}
        for tp, method in [(1, "-"), *((tp, m) for tp, m in self.contexts)]:
            with self.encoder(tp, method) as encoder:
                errors = self.errors(encoder)
                row = {
                    "graph": self.forward_ms(encoder, SMALL, calls=50),
                    "4k": self.forward_ms(encoder, LARGE, calls=5),
                    "list": self.forward_ms(encoder, LIST, calls=7),
                }
                if tp == 1:
                    per_gpu = self.rates(encoder)
                hits = encoder.stats().hits.total()
            with self.encoder(tp, method, cuda_graphs=False) as encoder:
                row["eager"] = self.forward_ms(encoder, SMALL, calls=20)
                if method == "nccl":
                    overlapping, distributed.OVERLAP_ROWS = distributed.OVERLAP_ROWS, sys.maxsize
                    row["4k in sequence"] = self.forward_ms(encoder, LARGE, calls=5)
                    distributed.OVERLAP_ROWS = overlapping
            times[tp, method] = row
            shown = "  ".join(f"{e:.2e} / {b:.2e}" for e, b in errors)
            right = hits > 0 and all(e <= b for e, b in errors)
            self.failed |= not right
            self.say(
                f"{tp:2} {method:>10}  {shown}  {'ok ' if right else 'BAD'}"
                f"{row['graph']:12.3f}{row['eager']:13.3f}{row['4k']:8.1f}{row['list']:11.1f}"
            )
        self.ratios(times, *per_gpu)

    def ratios(
        self,
        times: dict[tuple[int, str], dict[str, float]],
        alone: float,
        together: list[float],
    ) -> None:
        one = times[1, "-"]
        self.say("")
        for (tp, method), row in times.items():
            if tp > 1:
                gains = {name: one[name] / row[name] for name in ("4k", "list", "graph")}
                self.say(
                    f"tp {tp} {method:>9} over one GPU: 1x4k {gains['4k']:.2f}x, "
                    f"16x1120x700 {gains['list']:.2f}x, 1x560 {gains['graph']:.2f}x; "
                    f"graphs over eager at 1x560 {row['eager'] / row['graph']:.2f}x"
                )
        for tp in self.sizes:
            nccl, symmetric = times[tp, "nccl"], times[tp, "symmetric"]
            gains = {name: nccl[name] / symmetric[name] for name in ("graph", "4k")}
            self.say(
                f"tp {tp} symmetric memory over NCCL: 1x560 {gains['graph']:.2f}x, "
                f"1x4k {gains['4k']:.2f}x; overlap over sums in sequence: "
                f"1x4k {nccl['4k in sequence'] / nccl['4k']:.2f}x"
            )
        self.say(
            f"dp {self.world}: 16x1120x700 lists at {sum(together):.2f} lists/s together, "
            f"{alone:.2f} on one GPU alone: {sum(together) / alone:.2f}x"
        )

    def rates(self, encoder: VisionEncoder) -> tuple[float, list[float]]:
        """Lists per second of one GPU while the others rest, and of each while all work."""
        call = self.call(encoder, LIST)
        alone = self.rate(call) if self.rank == 0 else 0.0
        dist.barrier()
        return self.everyones(alone)[0], self.everyones(self.rate(call))

    def rate(self, call: Callable[[], object], calls: int = 15) -> float:
        for _ in range(3):
            call()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        for _ in range(calls):
            call()
        last.record()
        torch.cuda.synchronize()
        return 1e3 * calls / first.elapsed_time(last)

    @contextmanager
    def encoder(self, tp: int, method: str, **options: Any) -> Iterator[VisionEncoder]:
        if tp > 1:
            options["parallel"] = self.contexts[tp, method]
        encoder = VisionEncoder.from_pretrained(self.folder, device=DEVICE, dtype=DTYPE, **options)
        try:
            yield encoder
        finally:
            del encoder
            gc.collect()
            torch.cuda.empty_cache()

    def call(self, encoder: VisionEncoder, grids: Grids) -> Callable[[], object]:
        pixels = pixel_values(grids, encoder.config.patch_dim)
        return lambda: encoder(pixels, grids)

    def forward_ms(self, encoder: VisionEncoder, grids: Grids, *, calls: int) -> float:
        alone = encoder.parallel.tp_size == 1
        return self.median_ms(self.call(encoder, grids), calls=calls, alone=alone)

    def errors(self, encoder: VisionEncoder) -> list[tuple[float, float]]:
        """(relative L2 error, bound) of each output; the largest of all ranks."""
        call = self.call(encoder, ACCURACY)
        for _ in range(3):
            output: Any = call()
        errors = [
            self.slowest(relative_l2(actual, exact))
            for actual, exact in zip(outputs(output), self.expected["exact"], strict=True)
        ]
        return list(zip(errors, self.expected["bounds"], strict=True))


if __name__ == "__main__":
    raise SystemExit(main())
