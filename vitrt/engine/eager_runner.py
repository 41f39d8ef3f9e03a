"""Runs a tower over a batch: plan to the device, patches in, forward, features out.

Shapes: T patches, P values of one patch.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitrt.attention import AttentionChoice, BatchAttention
from vitrt.engine.batch import Batch
from vitrt.engine.request import TOKENS, Request
from vitrt.layers.cache import ByteCache
from vitrt.layers.side_stream import SideStream
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

    def __init__(self, tower: VisionTower, attention: AttentionChoice) -> None:
        self.tower = tower
        self.attention = attention
        weight = next(tower.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.stats = RunnerStats()
        self._lock = threading.RLock()  # forwards are launched one after the other
        self._packed: ByteCache[object, Tensor] = ByteCache(_PACKED_CACHE_BYTES)

    def run(self, plan: ForwardPlan, batch: Batch, request: Request = TOKENS) -> TowerOutput:
        """What `request` asks for, in tensors of its own. `batch` has been sent."""
        with self._lock:
            return self.run_eager(plan, batch, "graphs are off", request)

    def run_eager(
        self, plan: ForwardPlan, batch: Batch, reason: str, request: Request = TOKENS
    ) -> TowerOutput:
        self.stats.eager[reason] += 1
        attention = self.attention_for(plan)
        layout = (
            PlanLayout.exact(plan).scheduled(attention.schedule).with_origins(batch.origins(plan))
        )
        buffer = self.pack(plan, layout, attention, batch).to(self.device, non_blocking=True)
        views = view_plan(buffer, layout, plan, padded=False)
        width = self.tower.config.patch_dim
        patches = torch.empty(plan.num_patches, width, dtype=self.dtype, device=self.device)
        batch.write(patches, views.origins, plan.num_patches)
        return self.forward(patches, views, attention.choice, request)

    def attention_for(self, plan: ForwardPlan) -> BatchAttention:
        """The backends that a batch runs with, and the schedule that travels in its packed plan."""
        return self.attention.for_batch(plan.segment_lengths, self.tower.block(0).attn.heads)

    def pack(
        self, plan: ForwardPlan, layout: PlanLayout, attention: BatchAttention, batch: Batch | None
    ) -> Tensor:
        """The packed plan on the host, ready to be copied; without a batch, for no patches.

        It is kept, so that a grid that returns costs nothing.
        """
        key = (plan.grids, layout, attention.key, None if batch is None else batch.key)
        return self._packed.get(
            key,
            lambda: pack_plan(
                plan,
                layout,
                origins=None if batch is None else batch.rows(plan),
                pinned=self.device.type == "cuda",
                schedule=attention.schedule,
            ),
        )

    def forward(
        self,
        patches: Tensor,
        plan: DevicePlan,
        attention: AttentionChoice,
        request: Request = TOKENS,
        side_stream: SideStream | None = None,
    ) -> TowerOutput:
        # Not inference mode: adapters are trained on what comes out.
        with torch.no_grad(), side_stream or nullcontext():
            return self.tower(
                patches,
                plan,
                attention,
                request.layers,
                merged=request.merged,
                side_stream=side_stream,
            )
