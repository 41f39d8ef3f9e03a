"""A tower at work: a batch of patches and a request in, an output out; it knows no images.

Shapes: T patches.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from vitrt.attention import AttentionChoice, resolve_attention
from vitrt.config import RuntimeConfig, VisionConfig
from vitrt.engine.batch import Batch, PixelBatch
from vitrt.engine.buckets import AUTO_MAX_PATCHES
from vitrt.engine.device import (
    budget_from_memory,
    check_batch_invariant,
    check_precision,
    resolve_device,
    resolve_dtype,
    values_per_patch,
)
from vitrt.engine.eager_runner import EagerRunner, RunnerStats
from vitrt.engine.graph_runner import GraphRunner
from vitrt.engine.loader import load_tower
from vitrt.engine.outside_compiler import outside_compiler
from vitrt.engine.request import TOKENS, Request
from vitrt.engine.upload import PixelUploader
from vitrt.kernels.dispatch import HAVE_TRITON
from vitrt.layers.weights import TensorSlice
from vitrt.models.plan import ForwardPlan
from vitrt.models.tower import TowerOutput, VisionTower
from vitrt.parallel.context import SINGLE, ParallelContext

_forks = 0  # between this process and the one that imported this module


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


def kernel_plans(runner: EagerRunner) -> list[ForwardPlan]:
    """Images and lists, which between them use every kernel that an eager forward runs."""
    merge = runner.tower.config.spatial_merge_size
    few = [merge * side for side in (1, 4, 6, 7, 8)]  # 4 to 256 patches: products in shares of K
    larger = range(16 * merge, 32 * merge, merge)  # at most 3844 patches
    plans = [runner.tower.plan([(1, side, side)]) for side in (*few, *larger)]
    large = plans[len(few) :]
    # 2048 patches in short segments: our flash kernel takes other blocks than for one small image.
    short = runner.tower.plan([(1, 8 * merge, 8 * merge)] * 8)
    some = runner.tower.plan([(1, 16 * merge, 16 * merge)] * 5)
    scheduled = {
        attention.key: plan
        for plan in (some, *reversed(large))
        if (attention := runner.attention_for(plan)).schedule is not None
    }
    return [*plans[: len(few) + 1], short, *scheduled.values()]


def attention_of(tower: VisionTower, runtime: RuntimeConfig) -> AttentionChoice:
    """The backends that `runtime` gives a tower where its weights are. ValueError as `Engine`."""
    weight = next(tower.parameters())
    return resolve_attention(
        runtime.attention,
        device=weight.device,
        dtype=weight.dtype,
        head_dim=tower.config.head_dim,
        window_patches=tower.window_patches,
        batch_invariant=runtime.batch_invariant,
    )


class Engine:
    """Runs a filled tower where its weights are, as `runtime` says.

    Threads may share one: forwards are launched one after the other. Several engines may run one
    tower in different ways and share its weights. A deep copy has a tower of its own; a pickled
    engine contains its weights, and everything else is made anew when it is loaded.
    """

    def __init__(
        self, tower: VisionTower, runtime: RuntimeConfig, parallel: ParallelContext = SINGLE
    ) -> None:
        """ValueError for an attention backend or CUDA graphs that cannot be had here."""
        self.tower = tower
        self.config: VisionConfig = tower.config
        self.runtime = runtime
        self.parallel = parallel
        weight = next(tower.parameters())
        self.device = weight.device
        self.dtype = weight.dtype
        if runtime.batch_invariant:
            check_batch_invariant(self.device)
            tower.fix_products()  # for all engines on this tower
            tower.compile_kernels()
        self.runner = self._make_runner(attention_of(tower, runtime))
        self._uploader = PixelUploader(self.device)
        budget = runtime.max_batch_tokens or budget_from_memory(tower, self.device, self.dtype)
        # Ranks that share a tower must pack the same batches, whatever memory each has free.
        self.max_batch_patches: int = parallel.agree_min(budget)
        self._forks = _forks

    @classmethod
    def load(
        cls,
        config: VisionConfig,
        tensors: Iterable[tuple[str, TensorSlice]],
        runtime: RuntimeConfig,
        parallel: ParallelContext = SINGLE,
    ) -> Engine:
        """An engine on a new tower where `runtime` says, filled with `tensors` by `load_tower`."""
        device = resolve_device(runtime.device)
        dtype = resolve_dtype(runtime.dtype, device)
        check_precision(runtime.precision, device, dtype)
        if runtime.batch_invariant:
            check_batch_invariant(device)
        tower = load_tower(config, tensors, device=device, dtype=dtype, parallel=parallel)
        if runtime.precision == "fp8":
            tower.use_float8(runtime.fp8_skip_blocks)
            tower.compile_kernels()
        engine = cls(tower, runtime, parallel)
        if device.type == "cuda":
            engine.load_kernels()
        return engine

    @property
    def attention(self) -> AttentionChoice:
        """The backends of full and of window attention."""
        return self.runner.attention

    @outside_compiler
    def run(self, batch: Batch, request: Request = TOKENS) -> TowerOutput:
        """What `request` asks for of the batch, in tensors of its own on the device.

        ValueError for grids that no tower takes, and for patches that do not fit them. RuntimeError
        in a process that was forked from the one that made this engine, where it would hang.
        """
        if self._forks != _forks:
            self._check_fork()
        with self._own_settings():
            plan = self.tower.plan(batch.grids)
            batch.send(plan, self.config, self._uploader)
            return self.runner.run(plan, batch, request)

    def patches_for(self, request: Request) -> int:
        """The most patches of one forward: fewer where it keeps hidden states, unless the user set
        the number.
        """
        if not request.layers or self.runtime.max_batch_tokens is not None:
            return self.max_batch_patches
        plain, kept = (values_per_patch(self.config, n) for n in (0, len(request.layers)))
        return max(int(self.max_batch_patches * plain / kept), 1)

    def warmup(self, buckets: Sequence[int] | None = None) -> None:
        """Record CUDA graphs now instead of during requests, of all buckets or of `buckets`.

        A bucket is a number of patches; ValueError for one that graphs do not go up to. Does
        nothing where the engine uses no graphs.
        """
        if isinstance(self.runner, GraphRunner):
            with self._own_settings():
                self.runner.warmup(buckets)

    def load_kernels(self) -> None:
        """Run black images that between them use every kernel, so that no call waits for one.

        What a forward compiles and loads at first use costs seconds. A small image and a large one
        may go to different backends, and a backend may have further kernels for some batches.
        """
        patch = self.config.patch_size
        table = torch.zeros(2, 3, 256, dtype=torch.float32, device=self.device)
        for plan in kernel_plans(self.runner):
            _, rows, columns = plan.grids[0]
            pixels = np.zeros((1, rows * patch, columns * patch, 3), dtype=np.uint8)
            batch = PixelBatch([pixels] * len(plan.grids), plan.grids, table)
            with self._own_settings():
                batch.send(plan, self.config, self._uploader)
                self.runner.run_eager(plan, batch, "to load kernels")
        self.runner.stats.eager.clear()

    def stats(self) -> RunnerStats:
        """Graph replays by bucket, eager forwards by reason, padding share, graph memory."""
        return self.runner.stats

    def __reduce__(self) -> tuple[Any, ...]:
        ranks = self.parallel.tp_size * self.parallel.dp_size
        if ranks > 1:
            raise TypeError(
                f"an encoder that is one of {ranks} ranks is bound to their connections and is "
                "neither copied nor pickled: load one in each process, with its own `parallel`"
            )
        return Engine, (self.tower, self.runtime)

    def _check_fork(self) -> None:
        """A child of a fork has neither the GPU nor the threads that its parent computed with."""
        if self.device.type == "cpu" and torch.get_num_threads() == 1:
            return  # as in the workers of a DataLoader: nothing is missing
        raise RuntimeError(
            f"this encoder on {self.device} was made before the process was forked, and what it "
            "computes with does not survive that: make it in the child, start the child by spawn "
            '(multiprocessing.get_context("spawn"), DataLoader(..., '
            'multiprocessing_context="spawn")), or encode in the parent'
        )

    @contextmanager
    def _own_settings(self) -> Iterator[None]:
        """Makes the engine's device current, where Triton launches, and switches autocast off: it
        would change products, and recorded graphs would keep that.
        """
        kind = self.device.type
        device = torch.cuda.device(self.device) if kind == "cuda" else nullcontext()
        autocast = torch.is_autocast_enabled(kind)
        with device, torch.autocast(kind, enabled=False) if autocast else nullcontext():
            yield

    def _make_runner(self, attention: AttentionChoice) -> EagerRunner:
        wanted = self.runtime.cuda_graphs
        lacking = None
        if self.device.type != "cuda":
            lacking = f"a CUDA device, and this encoder is on {self.device}"
        elif not HAVE_TRITON:  # the functions in its place read numbers back from the device
            lacking = "Triton, which is not installed"
        if wanted is True and lacking is not None:
            raise ValueError(f"cuda_graphs=True needs {lacking}")
        if wanted is False or lacking is not None:
            return EagerRunner(self.tower, attention)
        limit = int(self.runtime.graph_memory_mib * (1 << 20))
        largest = 1 << 16 if wanted is True else AUTO_MAX_PATCHES
        return GraphRunner(
            self.tower, attention, limit_bytes=limit, max_patches=largest, parallel=self.parallel
        )
