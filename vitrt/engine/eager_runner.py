"""Runs a tower over a batch: plan to the device, patches in, forward, features out.

Shapes: T patches, P values of one patch.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitrt.attention import AttentionChoice, BatchAttention
from vitrt.engine.batch import PatchFeed
from vitrt.layers.cache import ByteCache
from vitrt.models.packed_plan import DevicePlan, PlanLayout, pack_plan, view_plan
from vitrt.models.plan import ForwardPlan
from vitrt.models.tower import TowerOutput, VisionTower

_PACKED_CACHE_BYTES = 64 << 20  # page-locked where the device is a GPU


@dataclass(slots=True)
class RunnerStats:
    """What ran how since the encoder was made."""

    hits: Counter[int] = field(default_factory=Counter)  # replays by bucket, in patches
    eager: Counter[str] = field(default_factory=Counter)  # eager forwards by reason
    captures: int = 0
    evictions: int = 0
    patches: int = 0  # real ones, of replays
    padding: int = 0  # padded rows, of replays
    graph_bytes: int = 0

    @property
    def padding_share(self) -> float:
        """Padded rows over all rows that graphs ran."""
        return self.padding / max(self.padding + self.patches, 1)

    @property
    def hit_rate(self) -> float:
        """Replays over all forwards."""
        replays = self.hits.total()
        return replays / max(replays + self.eager.total(), 1)


class EagerRunner:
    """Every batch on its own: exact sizes, nothing recorded."""

    def __init__(
        self,
        tower: VisionTower,
        attention: AttentionChoice,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.tower = tower
        self.attention = attention
        self.device = device
        self.dtype = dtype
        self.stats = RunnerStats()
        self._lock = threading.RLock()  # forwards are launched one after the other
        self._packed: ByteCache[object, Tensor] = ByteCache(_PACKED_CACHE_BYTES)

    def run(
        self,
        plan: ForwardPlan,
        feed: PatchFeed,
        keep_hidden: Sequence[int] = (),
        *,
        merged: bool = True,
    ) -> TowerOutput:
        """Features of the batch, in tensors of their own.

        `keep_hidden` names layers to return the hidden states of; without `merged` they are all
        that is returned.
        """
        with self._lock:
            return self.run_eager(plan, feed, "graphs are off", keep_hidden, merged=merged)

    def run_eager(
        self,
        plan: ForwardPlan,
        feed: PatchFeed,
        reason: str,
        keep_hidden: Sequence[int] = (),
        *,
        merged: bool = True,
    ) -> TowerOutput:
        self.stats.eager[reason] += 1
        attention = self.attention_for(plan)
        layout = PlanLayout.exact(plan).scheduled(attention.schedule).fed_by(feed.kind)
        buffer = self.pack(plan, layout, attention, feed).to(self.device, non_blocking=True)
        views = view_plan(buffer, layout, plan, padded=False)
        width = self.tower.config.patch_dim
        patches = torch.empty(plan.num_patches, width, dtype=self.dtype, device=self.device)
        feed.write(patches, views.feed, plan.num_patches)
        return self.forward(patches, views, attention.choice, keep_hidden, merged=merged)

    def attention_for(self, plan: ForwardPlan) -> BatchAttention:
        """The backends that a batch runs with, and the schedule that travels in its packed plan."""
        return self.attention.for_batch(plan.segment_lengths, self.tower.block(0).attn.heads)

    def pack(
        self,
        plan: ForwardPlan,
        layout: PlanLayout,
        attention: BatchAttention,
        feed: PatchFeed | None,
    ) -> Tensor:
        """The packed plan on the host, ready to be copied; without a feed, for no patches.

        It is kept, so that a grid that returns costs nothing.
        """
        key = (plan.grids, layout, attention.key, None if feed is None else feed.key)
        return self._packed.get(
            key,
            lambda: pack_plan(
                plan,
                layout,
                feed=None if feed is None else feed.rows(plan),
                pinned=self.device.type == "cuda",
                schedule=attention.schedule,
            ),
        )

    def forward(
        self,
        patches: Tensor,
        plan: DevicePlan,
        attention: AttentionChoice,
        keep_hidden: Sequence[int] = (),
        *,
        merged: bool = True,
    ) -> TowerOutput:
        with torch.no_grad():  # not inference mode: adapters are trained on what comes out
            return self.tower(patches, plan, attention, keep_hidden, merged=merged)
