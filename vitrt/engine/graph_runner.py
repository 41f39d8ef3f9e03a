"""A CUDA-graph runner keyed by token-count buckets.

One recording serves every batch that fits its bucket: positions, segment boundaries, window layout
and order are read from static buffers that each batch's packed plan is copied into. Nothing here
names a window, a deepstack level or a backend: what a recording fixes of them is in a plan's layout
and in the attention's key. A backend that cannot be recorded splits the forward
into pieces, each a graph of its own, and runs between them.

Padding is inert. Its rows belong to no segment, the rotary kernel zeroes their q, k and v (a flash
kernel multiplies masked values by 0, and 0 * NaN is NaN), everything else works row by row, and
results are copied from real rows only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from vitrt.attention import AttentionChoice, BatchAttention
from vitrt.engine.batch import Batch
from vitrt.engine.buckets import AUTO_MAX_PATCHES, Buckets, GraphKey, default_buckets
from vitrt.engine.eager_runner import EagerRunner
from vitrt.engine.graph_cache import GraphCache, Recording
from vitrt.engine.graph_pool import GraphPool
from vitrt.engine.recording import Pieces, record_pieces
from vitrt.engine.request import TOKENS, Request
from vitrt.engine.static_inputs import StaticInputs
from vitrt.models.packed_plan import PlanLayout, view_plan
from vitrt.models.plan import ForwardPlan
from vitrt.models.tower import TowerOutput, VisionTower
from vitrt.parallel.context import SINGLE, ParallelContext

logger = logging.getLogger(__name__)

_MOST_CLASSES = 1024
_FINE, _FORWARD_FAILED, _RECORDING_FAILED = 0, 2, 1  # what ranks tell each other, the worst wins


class GraphRunner(EagerRunner):
    """Replays batches that fit a bucket, runs the others eagerly, and counts both."""

    def __init__(
        self,
        tower: VisionTower,
        attention: AttentionChoice,
        *,
        limit_bytes: int,
        max_patches: int = AUTO_MAX_PATCHES,
        buckets: Sequence[int] | None = None,
        parallel: ParallelContext = SINGLE,
    ) -> None:
        super().__init__(tower, attention)
        self.parallel = parallel
        self.buckets = Buckets(tower, buckets or default_buckets(max_patches))
        self.graphs = GraphCache(limit_bytes, self.stats)
        self._classes: dict[Any, tuple[GraphKey, BatchAttention] | str] = {}  # by grids, request
        self._classes_of = self.attention, self.buckets
        self._inputs = StaticInputs(self.buckets, self.device, self.dtype)

    def run(self, plan: ForwardPlan, batch: Batch, request: Request = TOKENS) -> TowerOutput:
        with self._lock:  # the static buffers are shared
            if self.graphs.limit_bytes <= 0:
                return self.run_eager(plan, batch, "no graph memory", request)
            found = self._class_of(plan, request)
            if isinstance(found, str):
                return self.run_eager(plan, batch, found, request)
            key, attention = found
            recording = self.graphs.use(key)
            if recording is None and key not in self.graphs.refused:
                if (reason := self.graphs.reason_to_wait(key)) is not None:
                    return self.run_eager(plan, batch, reason, request)
                recording = self._record(key, plan, attention, batch)
            if recording is None:
                return self.run_eager(plan, batch, "not recorded: memory", request)
            return self._replay(key, recording, plan, attention, batch)

    def _class_of(
        self, plan: ForwardPlan, request: Request
    ) -> tuple[GraphKey, BatchAttention] | str:
        """The shape class of a batch, and how it attends; or why no graph can serve it. Kept, since
        a replay of a small image waits for what the host does before it.
        """
        choice = self.attention, self.buckets
        known = plan.grids, request
        if self._classes_of != choice:
            self._classes.clear()
            self._classes_of = choice
        if known not in self._classes:
            if len(self._classes) >= _MOST_CLASSES:
                self._classes.clear()
            reason = self.buckets.refusal(plan, request)
            if reason is None:
                attention = self.attention_for(plan)
                self._classes[known] = self.buckets.key(plan, attention, request), attention
            else:
                self._classes[known] = reason
        return self._classes[known]

    def warmup(self, buckets: Sequence[int] | None = None) -> None:
        """Record these buckets (default: all) now, the largest first.

        A number between two buckets is the larger one's. ValueError for one that no bucket holds.
        """
        wanted = self.buckets.sizes if buckets is None else buckets
        chosen = {self.buckets.of(patches) for patches in wanted}
        if self.graphs.limit_bytes <= 0:
            return
        with self._lock:
            for bucket in sorted(chosen, reverse=True):
                for plan in self.buckets.warmup_plans(bucket):
                    attention = self.attention_for(plan)
                    key = self.buckets.key(plan, attention)
                    if not self.graphs.knows(key):
                        self._record(key, plan, attention, None)

    # Record and replay

    def _record(
        self, key: GraphKey, plan: ForwardPlan, attention: BatchAttention, batch: Batch | None
    ) -> Recording | None:
        """Record the shape class of `plan`; None if it cannot be, or is over the memory limit."""
        if self.graphs.pool is None:
            self.graphs.pool = GraphPool(self.device, self.dtype)
            # Recorded first, the largest bucket sizes the pool that all others then fit in.
            for largest in self.buckets.warmup_plans(self.buckets.largest)[:1]:
                others = self.attention_for(largest)
                if (other := self.buckets.key(largest, others)) not in (key, *self.graphs.refused):
                    self._record(other, largest, others, None)
        pool = self.graphs.pool or GraphPool(self.device, self.dtype)
        layout = key.layout(plan, attention)
        patches, buffer = self._load(key.bucket, plan, layout, attention, batch)
        choice = attention.choice
        # A split ends a graph and what runs beside it, and ranks must sum in one order.
        whole_graph = choice.full.capturable and choice.window.capturable
        side_stream = pool.side_stream if whole_graph and self.parallel.tp_size == 1 else None

        def forward(choice: AttentionChoice) -> TowerOutput:
            # Views of its own: what is computed from them once would else not be recorded.
            views = view_plan(buffer, layout, plan, padded=True)
            return self.forward(patches, views, choice, key.request, side_stream)

        taken = self._try_to_record(pool, forward, choice, key.bucket)
        if taken is None:
            self.graphs.refused.add(key)
            return None
        pieces, whole, own = taken
        recording = Recording(pieces, layout, self.parallel.agree_max(own))
        pool.nbytes = self.parallel.agree_max(whole)
        return self.graphs.add(key, recording, pool)

    def _try_to_record(
        self,
        pool: GraphPool,
        forward: Callable[[AttentionChoice], TowerOutput],
        choice: AttentionChoice,
        bucket: int,
    ) -> tuple[Pieces, int, int] | None:
        """What `GraphPool.record` gives, on all ranks of a group or on none of them.

        Allocations fail with many faces (cuBLAS's and NCCL's have no exception class), so whatever
        ends a recording ends only that: the batch then runs eagerly, and says so itself if the
        fault is another one.
        """
        taken, failed, problem = None, _FINE, ""
        try:
            forward(choice)  # compiles and loads every kernel first
            failed = _RECORDING_FAILED
            taken = pool.record(partial(record_pieces, forward, choice))
            failed = _FINE
        except Exception as error:
            failed = failed or _FORWARD_FAILED
            problem = f"{type(error).__name__}: {error}"
            logger.debug("", exc_info=True)
        worst = self.parallel.agree_max(failed)
        if worst == _FORWARD_FAILED and self.parallel.tp_size > 1:
            # The others wait in a sum that this rank never came to: none can go on.
            raise RuntimeError(
                f"a rank of this group failed in a forward of {bucket} patches; here: "
                f"{problem or 'nothing went wrong'}"
            )
        if worst == _FINE:
            return taken
        logger.warning(
            "a graph of %d patches was not recorded, and such batches run eagerly: %s",
            bucket,
            problem or "another rank of the group could not",
        )
        return None

    def _load(
        self,
        bucket: int,
        plan: ForwardPlan,
        layout: PlanLayout,
        attention: BatchAttention,
        batch: Batch | None,
    ) -> tuple[Tensor, Tensor]:
        """Copy a batch into the static inputs, which it returns: patches, and the packed plan."""
        layout = layout.with_origins(None if batch is None else batch.origins(plan))
        packed = self.pack(plan, layout, attention, batch)
        return self._inputs.load(bucket, packed, layout, plan, batch)

    def _replay(
        self,
        key: GraphKey,
        recording: Recording,
        plan: ForwardPlan,
        attention: BatchAttention,
        batch: Batch,
    ) -> TowerOutput:
        _, buffer = self._load(key.bucket, plan, recording.layout, attention, batch)
        live = None
        if recording.pieces.splits:
            live = view_plan(buffer, recording.layout, plan, padded=True)
        output = recording.pieces.replay(live)
        self.stats.hits[key.bucket] += 1
        self.stats.patches += plan.num_patches
        self.stats.padding += key.bucket - plan.num_patches
        tokens = plan.num_patches // plan.merge_unit
        deepstack = output.deepstack
        # Copies, never views: the next replay overwrites what the graph wrote.
        return TowerOutput(
            output.embeddings[:tokens].clone(),
            None if deepstack is None else deepstack[:, :tokens].clone(),
            tuple(states[: plan.num_patches].clone() for states in output.hidden),
        )
