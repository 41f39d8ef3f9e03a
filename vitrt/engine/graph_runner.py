"""A CUDA-graph runner keyed by token-count buckets.

One recording serves every batch that fits its bucket: positions, segment boundaries, window layout
and order are read from static buffers that each batch's packed plan is copied into. Nothing here
names a window, a deepstack level or a backend. A backend that cannot be recorded splits the forward
into pieces, each a graph of its own, and runs between them.

Padding is inert. Its rows belong to no segment, the rotary kernel zeroes their q, k and v (a flash
kernel multiplies masked values by 0, and 0 * NaN is NaN), everything else works row by row, and
results are copied from real rows only.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from vitrt.attention.registry import AttentionChoice
from vitrt.engine.batch import PatchFeed
from vitrt.engine.eager_runner import EagerRunner
from vitrt.engine.graph_pool import GraphPool
from vitrt.engine.recording import Pieces, record_pieces
from vitrt.layers.rotary import TABLE_POSITIONS
from vitrt.models.packed_plan import PlanLayout, view_plan
from vitrt.models.plan import ForwardPlan
from vitrt.models.tower import TowerOutput, VisionTower
from vitrt.parallel.context import SINGLE, ParallelContext

logger = logging.getLogger(__name__)

# Up to this many patches a replay beats an eager forward, whose launches then still outlast its
# kernels; above, the two differ by the padding.
AUTO_MAX_PATCHES = 4096
_MOST_SEGMENTS = 16  # patches of a bucket to each segment, or window, that it has room for
_FEWEST_SEGMENTS = 8
_LITTLE_MORE = 32  # patches over the bucket below, in an image that warms a bucket up
_SIGHTINGS = 2  # a shape class is recorded when it comes the second time


def default_buckets(max_patches: int) -> tuple[int, ...]:
    """Patch counts of the graphs: every 64 up to 2048, every 128 to 4096, then 16 steps an octave.

    Products work in tiles of 128 or 192 rows, so finer steps would save nothing; coarser ones would
    pay for more than 1/16 of padding.
    """
    buckets = list(range(64, min(max_patches, 2048) + 1, 64))
    step = 128
    while buckets[-1] + step <= max_patches:
        buckets.append(buckets[-1] + step)
        if buckets[-1] >= 4096 and buckets[-1] == 32 * step:
            step *= 2
    return tuple(buckets)


@dataclass(frozen=True, slots=True)
class GraphKey:
    """A shape class: what a recording cannot change."""

    bucket: int  # patches
    segments: int  # room for so many; some kernels launch blocks for each, used or not
    backend: str  # of the full-attention layers, which may depend on the longest segment
    cut: bool  # whether their last query rows go to a kernel of their own


@dataclass(slots=True)
class _Recording:
    pieces: Pieces
    layout: PlanLayout
    nbytes: int  # device memory of its own, beside the pool


class GraphRunner(EagerRunner):
    """Replays batches that fit a bucket, runs the others eagerly, and counts both."""

    def __init__(
        self,
        tower: VisionTower,
        attention: AttentionChoice,
        device: torch.device,
        dtype: torch.dtype,
        *,
        limit_bytes: int,
        max_patches: int = AUTO_MAX_PATCHES,
        buckets: Sequence[int] | None = None,
        parallel: ParallelContext = SINGLE,
    ) -> None:
        super().__init__(tower, attention, device, dtype)
        self.parallel = parallel
        self.buckets = tuple(sorted(buckets)) if buckets else default_buckets(max_patches)
        self.limit_bytes = limit_bytes
        self._recordings: OrderedDict[GraphKey, _Recording] = OrderedDict()
        self._sightings: Counter[GraphKey] = Counter()
        self._too_large: set[GraphKey] = set()
        self._pool: GraphPool | None = None
        self._patches: Tensor | None = None  # static inputs, shared by all buckets
        self._plan_buffer: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None  # that used them last

    def run(
        self,
        plan: ForwardPlan,
        feed: PatchFeed,
        keep_hidden: Sequence[int] = (),
        *,
        merged: bool = True,
    ) -> TowerOutput:
        with self._lock:  # the static buffers are shared
            reason = self._ineligible(plan, keep_hidden)
            if reason is not None:
                return self.run_eager(plan, feed, reason, keep_hidden, merged=merged)
            key = self._key(plan)
            recording = self._recordings.get(key)
            if recording is None and key not in self._too_large:
                self._sightings[key] += 1
                if self._sightings[key] < _SIGHTINGS:
                    return self.run_eager(plan, feed, "first of its bucket")
                recording = self._record(key, plan, feed)
            if recording is None:
                return self.run_eager(plan, feed, "over the graph memory limit")
            return self._replay(key, recording, plan, feed)

    def warmup(self, buckets: Sequence[int] | None = None) -> None:
        """Record these buckets (default: all) now, the largest first.

        A number between two buckets is the larger one's. ValueError for one that no bucket holds.
        """
        chosen = {self._bucket_of(patches) for patches in buckets or self.buckets}
        with self._lock:
            for bucket in sorted(chosen, reverse=True):
                for plan in self._warmup_plans(bucket):
                    key = self._key(plan)
                    if key not in self._recordings and key not in self._too_large:
                        self._record(key, plan, None)

    # What fits

    def _ineligible(self, plan: ForwardPlan, keep_hidden: Sequence[int]) -> str | None:
        if keep_hidden:
            return "hidden states asked for"
        if plan.num_patches > self.buckets[-1]:
            return "over the largest bucket"
        if plan.largest_position >= TABLE_POSITIONS:
            return "over the rotary table"
        if not self._layout(self._key(plan)).fits(plan):
            return "more segments than the bucket holds"
        return None

    def _bucket_of(self, patches: int) -> int:
        if not 0 < patches <= self.buckets[-1]:
            raise ValueError(
                f"no graph holds {patches} patches; buckets go up to {self.buckets[-1]}"
            )
        return next(bucket for bucket in self.buckets if bucket >= patches)

    def _key(self, plan: ForwardPlan) -> GraphKey:
        bucket = self._bucket_of(plan.num_patches)
        segments, most = _FEWEST_SEGMENTS, max(bucket // _MOST_SEGMENTS, _FEWEST_SEGMENTS)
        while segments < min(len(plan.segments) - 1, most):
            segments = min(segments * 8, most)
        backend = self.attention.full_for(plan.max_seqlen).name
        return GraphKey(bucket, segments, backend, cut=self.whole_rows(plan) is not None)

    def _layout(self, key: GraphKey) -> PlanLayout:
        windows = max(key.bucket // _MOST_SEGMENTS, _FEWEST_SEGMENTS)
        layout = PlanLayout.bucket(
            key.bucket,
            key.segments,
            windows if self.tower.window_patches else None,
            self.tower.config.merge_unit,
            self.tower.config.num_position_embeddings is not None,
        )
        return layout.with_cut(key.cut)

    def _warmup_plans(self, bucket: int) -> list[ForwardPlan]:
        """Batches of `bucket`: one image that fills it, one that hardly needs it (which of the two
        is cut may differ), and many of at most 256 patches.
        """
        side = 16 if bucket % 256 == 0 else 8
        below = max((b for b in self.buckets if b < bucket), default=0)
        plans = [self._image(bucket), self._image(min(below + _LITTLE_MORE, bucket))]
        if bucket % side**2 == 0:
            plans.append(self.tower.plan([(bucket // side**2, side, side)]))
        return [plan for plan in plans if self._ineligible(plan, ()) is None]

    def _image(self, patches: int) -> ForwardPlan:
        """One image of so many patches, as little drawn out as powers of two allow."""
        merge = self.tower.config.spatial_merge_size
        rows = next(r for r in (16, 8, 4, 2, 1) if patches % (r * merge * merge) == 0) * merge
        return self.tower.plan([(1, rows, patches // rows)])

    # Record and replay

    def _record(
        self, key: GraphKey, plan: ForwardPlan, feed: PatchFeed | None
    ) -> _Recording | None:
        """Record the shape class of `plan`; None if it does not fit the memory limit."""
        if self._pool is None:
            self._pool = GraphPool(self.device, self.dtype)
            # Recorded first, the largest bucket sizes the pool that all others then fit in.
            for largest in self._warmup_plans(self.buckets[-1])[:1]:
                if self._key(largest) not in (key, *self._too_large):
                    self._record(self._key(largest), largest, None)
        pool = self._pool or GraphPool(self.device, self.dtype)
        patches, buffer = self._static(key.bucket)
        layout = self._layout(key)
        self._load(plan, layout, feed, patches, buffer)
        attention = replace(self.attention, full=self.attention.full_for(plan.max_seqlen))
        views = view_plan(buffer, layout, plan, max_seqlen=key.bucket, padded=True)

        def forward(choice: AttentionChoice) -> TowerOutput:
            return self.forward(patches, views, choice)

        taken = None
        try:
            forward(attention)  # compiles and loads every kernel first
            taken = pool.record(partial(record_pieces, forward, attention))
        except torch.cuda.OutOfMemoryError:
            logger.debug("out of memory at %d patches", key.bucket)
        # Ranks of a group replay together or not at all, so what each measures decides for all.
        if not self.parallel.agree_min(taken is not None) or taken is None:
            logger.warning("no memory to record a graph of %d patches; it runs eagerly", key.bucket)
            self._too_large.add(key)
            return None
        pieces, whole, own = taken
        recording = _Recording(pieces, layout, self.parallel.agree_max(own))
        pool.nbytes = self.parallel.agree_max(whole)
        self._pool = pool
        self._recordings[key] = recording
        self.stats.captures += 1
        logger.debug("recorded a graph of %s", key)
        self._evict()
        return self._recordings.get(key)

    def _evict(self) -> None:
        """Drop the newest recording if it does not fit even alone, then the least recently used."""
        assert self._pool is not None
        newest, recording = next(reversed(self._recordings.items()))
        if self._pool.nbytes + recording.nbytes > self.limit_bytes:
            self._too_large.add(newest)
            self._drop(newest)
        while self._graph_bytes() > self.limit_bytes:
            self._drop(next(iter(self._recordings)))
        self.stats.graph_bytes = self._graph_bytes()

    def _drop(self, key: GraphKey) -> None:
        del self._recordings[key]
        self.stats.evictions += 1
        if not self._recordings:
            self._pool = None  # no graph holds it any more: the allocator takes it back

    def _graph_bytes(self) -> int:
        if self._pool is None:
            return 0
        return self._pool.nbytes + sum(held.nbytes for held in self._recordings.values())

    def _static(self, bucket: int) -> tuple[Tensor, Tensor]:
        """The static inputs, sized for the largest bucket; smaller ones use their front."""
        if self._patches is None or self._plan_buffer is None:
            largest, width = self.buckets[-1], self.tower.config.patch_dim
            most = max(largest // _MOST_SEGMENTS, _FEWEST_SEGMENTS)
            roomiest = GraphKey(largest, most, "", cut=True)
            size = self._layout(roomiest).fed_by("sources").size
            with torch.inference_mode(False):  # else only callers inside it could write them
                self._patches = torch.zeros(largest, width, dtype=self.dtype, device=self.device)
                self._plan_buffer = torch.zeros(size, dtype=torch.int32, device=self.device)
        return self._patches[:bucket], self._plan_buffer

    def _load(
        self,
        plan: ForwardPlan,
        layout: PlanLayout,
        feed: PatchFeed | None,
        patches: Tensor,
        buffer: Tensor,
    ) -> None:
        """Copy a batch into the static inputs."""
        if self.device.type == "cuda":
            self._take_turns(torch.cuda.current_stream(self.device))
        if feed is None:
            packed = self.pack_unfed(plan, layout)
            buffer[: packed.numel()].copy_(packed, non_blocking=True)
            return
        layout = layout.fed_by(feed.kind)
        packed = self.pack(plan, layout, feed)
        buffer[: packed.numel()].copy_(packed, non_blocking=True)
        rows = None
        if layout.feed is not None:
            offset, shape = layout.fields()["feed"]
            rows = buffer[offset : offset + shape[0] * shape[1]].view(shape)
        feed.write(patches, rows, plan.num_patches)

    def _take_turns(self, stream: torch.cuda.Stream) -> None:
        """Let `stream` wait for the one of the caller before: the lock is let go when a replay is
        launched, not when it has read the static inputs.
        """
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def _replay(
        self, key: GraphKey, recording: _Recording, plan: ForwardPlan, feed: PatchFeed
    ) -> TowerOutput:
        self._recordings.move_to_end(key)
        patches, buffer = self._static(key.bucket)
        self._load(plan, recording.layout, feed, patches, buffer)
        live = None
        if recording.pieces.splits:
            live = view_plan(
                buffer, recording.layout, plan, max_seqlen=plan.max_seqlen, padded=True
            )
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
        )
