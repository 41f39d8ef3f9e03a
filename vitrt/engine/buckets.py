"""Shape classes: which batches one recorded graph serves, and what it has room for.

A class is a bucket of patch counts, room for so many segments, what the attention backends say
that a recording cannot change, and what is asked for. Everything else of a batch is data.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from vitrt.attention import BatchAttention
from vitrt.engine.request import TOKENS, Request
from vitrt.layers.rotary import TABLE_POSITIONS
from vitrt.models.packed_plan import PlanLayout, most_segments
from vitrt.models.plan import ForwardPlan
from vitrt.models.tower import VisionTower

# Up to this many patches a replay beats an eager forward, whose launches then still outlast its
# kernels; above, the two differ by the padding.
AUTO_MAX_PATCHES = 4096
_LITTLE_MORE = 32  # most patches over the bucket below, in an image that warms a bucket up
_FEW_SEGMENTS = 8  # that every bucket has room for
_MOST_SCHEDULE = 64  # int32 values of a backend's schedule, beside those for each segment


def default_buckets(max_patches: int) -> tuple[int, ...]:
    """Patch counts of the graphs: 16, 32, every 64 up to 2048, every 128 to 4096, then 16 steps an
    octave.

    Products work in tiles of 128 or 192 rows, so finer steps would save nothing (one image of
    224x224 loses 2% by them); coarser ones would pay for more than 1/16 of padding. Only the
    smallest images gain: one of 64x64 takes 3% less in the bucket of 16.
    """
    buckets = [16, 32, *range(64, min(max_patches, 2048) + 1, 64)]
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
    attention: Hashable  # what the backends say that a recording cannot change
    request: Request = TOKENS  # its outputs

    def layout(self, plan: ForwardPlan, attention: BatchAttention) -> PlanLayout:
        """Where the values of any plan of this class lie; `plan` is one of them."""
        return PlanLayout.bucket(plan, self.bucket, self.segments).scheduled(attention.schedule)


class Buckets:
    """The shape classes of one tower, by ascending patch counts."""

    def __init__(self, tower: VisionTower, sizes: Sequence[int]) -> None:
        self.tower = tower
        self.sizes = tuple(sorted(sizes))
        # What transformers' towers give beside merged tokens; other layers' states run eagerly.
        self._with_last = Request((tower.config.depth - 1,))

    @property
    def largest(self) -> int:
        return self.sizes[-1]

    def of(self, patches: int) -> int:
        """The bucket of so many patches. ValueError for a number that none holds."""
        if isinstance(patches, bool) or not 0 < patches <= self.largest:
            raise ValueError(f"no graph holds {patches} patches; buckets go up to {self.largest}")
        return next(size for size in self.sizes if size >= patches)

    def refusal(self, plan: ForwardPlan, request: Request) -> str | None:
        """Why no graph can serve the batch; None where one can."""
        if request.layers and request != self._with_last:
            return "hidden states asked for"
        if plan.num_patches > self.largest:
            return "over the largest bucket"
        if plan.largest_position >= TABLE_POSITIONS:
            return "over the rotary table"
        bucket = self.of(plan.num_patches)
        if not PlanLayout.bucket(plan, bucket, most_segments(bucket)).fits(plan):
            return "more segments than the bucket holds"
        return None

    def key(
        self, plan: ForwardPlan, attention: BatchAttention, request: Request = TOKENS
    ) -> GraphKey:
        """The shape class of a batch that is not refused."""
        bucket = self.of(plan.num_patches)
        most = most_segments(bucket)
        segments = min(_FEW_SEGMENTS, most)
        while segments < min(len(plan.segments) - 1, most):
            segments = min(segments * 8, most)
        return GraphKey(bucket, segments, attention.key, request)

    def plan_values(self) -> int:
        """int32 values of the largest packed plan of any class."""
        # Any plan of this tower tells what its layouts hold; a schedule is a few values.
        some = self.tower.plan([(1, *[self.tower.config.spatial_merge_size] * 2)])
        layout = PlanLayout.bucket(some, self.largest, most_segments(self.largest))
        return replace(layout, schedule=_MOST_SCHEDULE).with_origins("sources").size

    def warmup_plans(self, bucket: int) -> list[ForwardPlan]:
        """Batches of `bucket`: one image that fills it, one that hardly needs it (attention may go
        about them differently), and many of at most 256 patches.
        """
        side = 16 if bucket % 256 == 0 else 8
        below = max((size for size in self.sizes if size < bucket), default=0)
        little = below + min(_LITTLE_MORE, (bucket - below) // 2)
        plans = [self._image(bucket), self._image(little)]
        if bucket % side**2 == 0:
            plans.append(self.tower.plan([(bucket // side**2, side, side)]))
        return [plan for plan in plans if self.refusal(plan, TOKENS) is None]

    def _image(self, patches: int) -> ForwardPlan:
        """One image of so many patches, as little drawn out as powers of two allow."""
        merge = self.tower.config.spatial_merge_size
        rows = next(r for r in (16, 8, 4, 2, 1) if patches % (r * merge * merge) == 0) * merge
        return self.tower.plan([(1, rows, patches // rows)])
