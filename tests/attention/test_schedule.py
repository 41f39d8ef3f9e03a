"""A backend's schedule: which rows leave the last wave, and that it reaches the backend whole."""

from __future__ import annotations

import heapq
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.attention_cases import dense_reference, make_segments, no_rotary
from vitrt import VisionEncoder, kernels
from vitrt.attention import AttentionChoice, Schedule, fa4, get_backend, usable
from vitrt.attention.last_wave import (
    MOST_ENTRIES,
    rows_in_whole_tiles,
    schedule_last_wave,
    tail_list,
    tail_rows,
)
from vitrt.attention.sdpa import SdpaBackend
from vitrt.engine.batch import PixelValues
from vitrt.engine.buckets import GraphKey
from vitrt.engine.graph_runner import GraphRunner
from vitrt.kernels.dispatch import NotCompiledError
from vitrt.kernels.segments import Rotary, ScheduleTensors, Segments
from vitrt.kernels.tail_attention import TAIL_ROWS, tail_attention
from vitrt.layers.attention import VisionAttention
from vitrt.models.packed_plan import view_plan
from vitrt.models.plan import ForwardPlan
from vitrt.models.tower import TowerOutput
from vitrt.parallel.context import ParallelContext

H200 = {"tile_rows": 192, "processors": 132}


# Which rows


@pytest.mark.parametrize(
    ("lengths", "heads", "left_out"),
    [
        ([3080], 16, [8]),  # 272 blocks: 8 in a third wave
        ([3072], 16, None),  # whole tiles, and two waves
        ([1296], 16, None),  # 112 blocks: one wave
        ([1600], 16, [64]),  # 144 blocks: 12 in a second wave
        ([4000], 16, None),  # 336 blocks: 72 in a third wave, and a tile has only 16
        ([3080] * 16, 16, None),  # many segments
        ([3080] * 2, 16, [8, 0]),  # 544 blocks: 16 in a fifth wave, one tile's
        ([3090, 3080], 16, [0, 8]),  # the smallest rest goes first
        ([900], 40, None),  # short
        ([100], 16, None),
        ([1600, 100], 16, None),  # 160 blocks: 28 in the second wave, two tiles' and one to cut
        ([3080], 8, [8]),  # two ranks: 136 blocks
        ([3080], 4, None),  # four ranks: half a wave
        ([8], 16, None),
    ],
    ids=str,
)
def test_which_rows_are_left_out(
    lengths: list[int], heads: int, left_out: list[int] | None
) -> None:
    schedule = schedule_last_wave(lengths, heads, **H200)
    if left_out is None:
        assert schedule is None
    else:
        assert schedule is not None
        assert schedule.per_segment.dtype == schedule.work.dtype == np.int32
        assert (np.array(lengths) - schedule.per_segment).tolist() == left_out
        assert schedule.work[0] == sum(-(-rows // TAIL_ROWS) for rows in left_out)
        assert len(schedule.work) == 4 + 3 * MOST_ENTRIES


@given(
    st.lists(st.integers(1, 6000), min_size=1, max_size=6),
    st.sampled_from([2, 4, 8, 16, 20]),
    st.sampled_from([78, 114, 132, 148]),
)
def test_a_schedule_saves_a_wave(lengths: list[int], heads: int, processors: int) -> None:
    if len(lengths) > 4 or max(lengths) < 1024:
        assert schedule_last_wave(lengths, heads, tile_rows=192, processors=processors) is None
        return
    whole = rows_in_whole_tiles(lengths, heads, tile_rows=192, processors=processors)
    if whole is None:
        return

    def waves(rows: Sequence[int]) -> int:
        return -(-sum(-(-n // 192) * heads for n in rows) // processors)

    assert waves(whole.tolist()) == waves(lengths) - 1
    for length, kept in zip(lengths, whole.tolist(), strict=True):
        assert kept in (length, length // 192 * 192)
        assert kept == length or length >= 1024
        if kept < length:
            # Every tail is needed: with any of them back, the wave is back.
            assert waves([*whole.tolist(), length - kept]) == waves(lengths)
    boundaries = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    work = tail_list(lengths, whole)
    assert 0 < len(work) <= MOST_ENTRIES
    rows = [r for first, _, end in work for r in range(first, min(first + TAIL_ROWS, end))]
    kept_rows = [r for s, n in zip(boundaries[:-1], whole, strict=True) for r in range(s, s + n)]
    assert sorted(rows + kept_rows) == list(range(sum(lengths))), "every row once"


def test_heads_are_those_of_the_rank(tiny_qwen3_vl: Path) -> None:
    config = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu").config
    context = ParallelContext(tp_rank=1, tp_size=2)
    assert VisionAttention(config, context).heads == config.num_heads // 2


# What reaches the backend


class Scheduling(SdpaBackend):
    """Computes tiles of 16 query rows; with a schedule, the rest is the kernel's or stays NaN."""

    name = "scheduling"
    capturable = True

    def __init__(self, *, asks: bool = True) -> None:
        self.asks = asks
        self.seen: list[tuple[list[int], int]] = []
        self.heads: set[int] = set()

    def whole_rows(self, lengths: Sequence[int]) -> list[int] | None:
        if not self.asks or len(lengths) > MOST_ENTRIES or not any(n % 16 for n in lengths):
            return None
        return [n // 16 * 16 for n in lengths]

    def schedule(self, lengths: Sequence[int], heads: int) -> Schedule | None:
        self.heads.add(heads)
        whole = self.whole_rows(lengths)
        return None if whole is None else make_schedule(lengths, whole)

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        out = super().__call__(qkv, segments, rotary, out)
        if segments.schedule is None:
            return out
        used, whole = int(segments.count), segments.schedule.per_segment
        starts, ends = segments.cu_seqlens[:used], segments.cu_seqlens[1 : used + 1]
        for start, end, rows in zip(starts, ends, whole[:used], strict=True):
            out[start + rows : end] = torch.nan
        assert not whole[used:].any(), "unused segments have no rows"
        tail = tail_rows(segments.schedule)
        self.seen.append((whole[:used].tolist(), int(tail.count)))
        return tail_attention(qkv, tail, out)


def make_schedule(lengths: Sequence[int], whole: Sequence[int]) -> Schedule:
    entries = tail_list(lengths, np.array(whole, dtype=np.int32))
    work = np.zeros(4 + 3 * MOST_ENTRIES, dtype=np.int32)
    work[0], work[4 : 4 + entries.size] = len(entries), entries.reshape(-1)
    return Schedule("tiles of 16", work, np.array(whole, dtype=np.int32))


@pytest.fixture(params=["tiny_qwen2_5_vl", "tiny_qwen3_vl"])
def encoder(request: pytest.FixtureRequest) -> VisionEncoder:
    return VisionEncoder.from_pretrained(request.getfixturevalue(request.param), device="cpu")


GRIDS = [[(1, 6, 10)], [(2, 6, 6)], [(1, 4, 4), (1, 10, 10), (1, 2, 6)]]


@pytest.mark.parametrize("grids", GRIDS, ids=str)
def test_eager_forwards_with_a_schedule_are_the_same(encoder: VisionEncoder, grids: Any) -> None:
    lengths = [h * w for t, h, w in grids for _ in range(t)]
    values = torch.randn(sum(lengths), encoder.config.patch_dim)
    expected = encoder(values, grids)
    backend = Scheduling()
    encoder.engine.runner.attention = AttentionChoice(backend, SdpaBackend())
    for _ in range(2):  # the second from the cache of packed plans
        torch.testing.assert_close(encoder(values, grids).embeddings, expected.embeddings)
    whole = [n // 16 * 16 for n in lengths]
    assert backend.seen
    tails = sum(n > w for n, w in zip(lengths, whole, strict=True))
    assert all(seen == (whole, tails) for seen in backend.seen)
    assert backend.heads == {encoder.config.num_heads}


@pytest.mark.parametrize("scheduled", [1156, None])
def test_kernels_of_a_schedule_are_loaded_with_the_model(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch, scheduled: int | None
) -> None:
    backend = Scheduling()
    monkeypatch.setattr(
        backend,
        "whole_rows",
        lambda lengths: [1152] if list(lengths) == [scheduled] else None,
    )
    encoder.engine.runner.attention = AttentionChoice(backend, SdpaBackend())
    encoder.engine.load_kernels()
    assert bool(backend.seen) == (scheduled is not None)
    assert not encoder.stats().eager


def test_kernels_of_lists_are_loaded_with_the_model(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as persistent blocks, which a single image does not run."""
    backend = Scheduling()
    monkeypatch.setattr(backend, "whole_rows", lambda n: [0] * 5 if len(n) == 5 else None)
    monkeypatch.setattr("tests.attention.test_schedule.MOST_ENTRIES", 400)
    encoder.engine.runner.attention = AttentionChoice(backend, SdpaBackend())
    encoder.engine.load_kernels()
    assert backend.seen and {len(whole) for whole, _ in backend.seen} == {5}


@pytest.mark.parametrize("grids", [[(1, 8, 8)], [(1, 2, 6)] * 5], ids=str)
def test_a_batch_without_a_schedule(encoder: VisionEncoder, grids: Any) -> None:
    """Whole tiles, and more segments than this backend plans for."""
    backend = Scheduling()
    encoder.engine.runner.attention = AttentionChoice(backend, SdpaBackend())
    encoder(torch.randn(sum(h * w for _, h, w in grids), encoder.config.patch_dim), grids)
    assert not backend.seen


def graph_runner(encoder: VisionEncoder, backend: SdpaBackend) -> GraphRunner:
    """What decides and packs for graphs; only recording needs a GPU."""
    return GraphRunner(
        encoder.tower,
        AttentionChoice(backend, SdpaBackend()),
        limit_bytes=0,
        buckets=(64, 128),
    )


def key_of(runner: GraphRunner, plan: ForwardPlan) -> GraphKey:
    return runner.buckets.key(plan, runner.attention_for(plan))


WITH = GraphKey(128, 8, ("scheduling", "tiles of 16"))
WITHOUT = GraphKey(128, 8, ("scheduling", None))


def test_graphs_are_keyed_by_the_schedule(encoder: VisionEncoder) -> None:
    runner = graph_runner(encoder, Scheduling())
    tails, whole = (encoder.tower.plan(grids) for grids in ([(1, 6, 18)], [(1, 8, 16)]))
    assert key_of(runner, tails) == WITH
    assert key_of(runner, whole) == WITHOUT
    assert key_of(runner, encoder.tower.plan([(1, 2, 6)] * 5)).attention == WITHOUT.attention
    assert key_of(graph_runner(encoder, Scheduling(asks=False)), tails) == WITHOUT
    assert key_of(graph_runner(encoder, SdpaBackend()), tails).attention == ("sdpa", None)


def test_a_bucket_is_warmed_up_with_and_without_a_schedule(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 65 to 128 patches: 128 fills tiles of 64 rows, and 96 does not."""
    backend = Scheduling()
    monkeypatch.setattr(
        backend,
        "whole_rows",
        lambda lengths: [64] if list(lengths) == [96] else None,
    )
    runner = graph_runner(encoder, backend)
    keys = {key_of(runner, plan) for plan in runner.buckets.warmup_plans(128)}
    assert keys == {WITH, WITHOUT}


def test_replays_with_other_tails_are_right(encoder: VisionEncoder) -> None:
    """One static buffer, loaded for one batch after the other: schedules are read from there."""
    backend = Scheduling()
    runner = graph_runner(encoder, backend)
    batches = [[(1, 6, 18)], [(1, 4, 10), (1, 6, 6)], [(3, 6, 6)], [(1, 6, 18)]]
    assert {key_of(runner, encoder.tower.plan(grids)) for grids in batches} == {WITH}
    for grids in batches:
        plan = encoder.tower.plan(grids)
        values = torch.randn(plan.num_patches, encoder.config.patch_dim)
        attention = runner.attention_for(plan)
        layout = WITH.layout(plan, attention)
        runner._inputs.of(WITH.bucket)[0].fill_(torch.nan)
        batch = PixelValues(values, grids)
        patches, buffer = runner._load(WITH.bucket, plan, layout, attention, batch)
        views = view_plan(buffer, layout, plan, padded=True)
        backend.seen.clear()
        output: TowerOutput = runner.forward(patches, views, runner.attention)
        expected = encoder(values, grids).embeddings
        torch.testing.assert_close(
            output.embeddings[: sum(plan.tokens)], expected, rtol=1e-5, atol=1e-5
        )
        assert backend.seen
        whole = [n // 16 * 16 for n in plan.segment_lengths]
        assert all(seen[0] == whole for seen in backend.seen)


def test_static_buffers_hold_every_layout(encoder: VisionEncoder) -> None:
    runner = graph_runner(encoder, Scheduling())
    _, buffer = runner._inputs.of(64)
    for key, grid in ((WITH, (1, 6, 18)), (WITHOUT, (1, 8, 16))):
        plan = encoder.tower.plan([grid])
        layout = key.layout(plan, runner.attention_for(plan)).with_origins("sources")
        assert layout.size <= buffer.numel()
        fields = sorted(layout.fields().values())
        for (offset, shape), (following, _) in pairwise(fields):
            assert offset + int(np.prod(shape)) <= following
        fields_of_a_schedule = {"schedule", "per_segment"}
        assert (layout.fields().keys() >= fields_of_a_schedule) == (key == WITH)


# FA4


def flash_attn_4(monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]]) -> None:
    """A stand-in for the package that keeps to `seqused_q`, on a GPU that is not there."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, out: Tensor, **options: Any) -> None:
        calls.append(options)
        starts = options["cu_seqlens_q"].tolist()
        used = options["seqused_q"]
        for index, (start, end) in enumerate(pairwise(starts)):
            rows = slice(start, end if used is None else start + int(used[index]))
            keys = slice(start, end)
            scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * q.shape[-1] ** -0.5
            out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys])

    interface = ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd = attend
    cute = ModuleType("flash_attn.cute")
    cute.interface = interface
    for name, module in (
        ("flash_attn", ModuleType("flash_attn")),
        ("flash_attn.cute", cute),
        ("flash_attn.cute.interface", interface),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fa4, "is_hopper", lambda device: True)
    monkeypatch.setattr(fa4, "processors", lambda device: 132)
    monkeypatch.setattr(fa4.fa4_kept.kept, "any_of", lambda family: False)  # whatever is on disk


@pytest.mark.parametrize(
    ("lengths", "even"),
    [
        ([1296] * 32, True),
        ([3080] * 16, True),
        ([4 * (8 + i) * (20 - i) for i in range(16)], True),  # 640 to 784
        ([800] * 5, True),
        ([16384, *[256] * 60], True),
        ([4096, 1024] * 8, False),
        ([1024, 8192] * 3, False),
    ],
    ids=lambda value: str(value)[:24],
)
def test_persistent_blocks_run_even(lengths: list[int], even: bool) -> None:
    assert fa4.runs_even(tuple(lengths), 16, 132) == even


def test_persistent_blocks_are_little_behind_the_hardwares_order() -> None:
    """Where they are taken, against a block that goes to whichever processor is free first."""
    draw = random.Random(0)
    behind = []
    for _ in range(200):
        images = range(draw.randint(5, 40))
        lengths = [4 * draw.randint(4, 64) * draw.randint(4, 64) for _ in images]
        if not fa4.runs_even(tuple(lengths), 16, 132):
            continue
        costs = [n + 256 for n in lengths for _ in range(-(-n // 192) * 16)]
        free = [0] * 132
        for cost in costs:
            heapq.heapreplace(free, free[0] + cost)
        behind.append(max(sum(costs[first::132]) for first in range(132)) / max(free))
    assert len(behind) > 100
    assert sum(behind) / len(behind) < 1.02 and max(behind) < 1.08


class OwnParts(ModuleType):
    """In place of kernels/fa4_hopper.py."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("vitrt.kernels.fa4_hopper")
        self.error = error
        self.calls: list[bool] = []

    def forward(self, *, persistent: bool, processors: int) -> Any:
        assert processors == 132
        if self.error is not None:
            raise self.error

        def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
            assert options["seqused_q"] is None or not persistent
            self.calls.append(persistent)

        return attend


def own_parts(monkeypatch: pytest.MonkeyPatch, parts: OwnParts, release: str = "4.0.0b36") -> None:
    monkeypatch.setattr(fa4.metadata, "version", lambda name: release)
    monkeypatch.setitem(sys.modules, parts.__name__, parts)
    monkeypatch.setattr(kernels, "fa4_hopper", parts, raising=False)


def attend_twice(backend: fa4.FlashAttention4, head_dim: int) -> list[str | None]:
    """One batch for each kernel; the keys of their schedules."""
    keys = []
    for lengths in ([1600], [1296] * 6, [4096, 1024] * 4):
        schedule = backend.schedule(lengths, 16)
        segments = make_segments(lengths)
        if schedule is not None:
            arrays = (torch.from_numpy(a) for a in (schedule.work, schedule.per_segment))
            segments = replace(segments, schedule=ScheduleTensors(*arrays))
        qkv = torch.zeros(sum(lengths), 3, 1, head_dim)
        backend(qkv, segments, no_rotary(1, head_dim))
        keys.append(None if schedule is None else str(schedule.key))
    return keys


@pytest.mark.parametrize("head_dim", [72, 80])
def test_fa4_runs_with_our_parts(monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    theirs: list[dict[str, Any]] = []
    flash_attn_4(monkeypatch, theirs)
    parts = OwnParts()
    own_parts(monkeypatch, parts)
    monkeypatch.setattr(fa4, "tail_attention", lambda qkv, tail, out: out)
    backend = fa4.FlashAttention4(torch.device("cuda"), head_dim)
    assert attend_twice(backend, head_dim) == ["last wave", "persistent", None]
    assert parts.calls == [False, True, False] and not theirs


@pytest.mark.parametrize("why", ["release", "head size", "import", "attribute"])
def test_fa4_runs_without_our_parts_where_they_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    theirs: list[dict[str, Any]] = []
    flash_attn_4(monkeypatch, theirs)
    errors = {"import": ImportError("cutlass.cute"), "attribute": AttributeError("rescale_O")}
    release = "4.0.0b37" if why == "release" else "4.0.0b36"
    own_parts(monkeypatch, OwnParts(errors.get(why)), release)
    monkeypatch.setattr(fa4, "tail_attention", lambda qkv, tail, out: out)
    head_dim = 64 if why == "head size" else 72
    backend = fa4.FlashAttention4(torch.device("cuda"), head_dim)
    assert attend_twice(backend, head_dim) == ["last wave", None, None]
    assert len(theirs) == 3
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == (why in errors) and all(str(errors[why]) in text for text in warned)


def test_fa4_runs_without_our_parts_where_they_do_not_compile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refused(OwnParts):
        def forward(self, *, persistent: bool, processors: int) -> Any:
            def attend(*qkv: Tensor, **options: Any) -> None:
                raise NotCompiledError("no such operation")

            return attend

    theirs: list[dict[str, Any]] = []
    flash_attn_4(monkeypatch, theirs)
    own_parts(monkeypatch, Refused())
    backend = fa4.FlashAttention4(torch.device("cuda"), 72)
    lengths = [40] * 6
    plan = backend.schedule(lengths, 16)
    assert plan is not None and plan.key == "persistent"
    on_device = ScheduleTensors(torch.from_numpy(plan.work), torch.from_numpy(plan.per_segment))
    segments = replace(make_segments(lengths), schedule=on_device)
    qkv = torch.randn(sum(lengths), 3, 16, 72)
    for _ in range(2):
        out = backend(qkv, segments, no_rotary(1, 72))
        expected = dense_reference(qkv, lengths)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert backend.schedule(lengths, 16) is None and len(theirs) == 2
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1 and "no such operation" in warned[0]


@pytest.mark.parametrize("hopper", [True, False])
def test_a_broken_package_is_found_when_the_backend_is_made(
    monkeypatch: pytest.MonkeyPatch, hopper: bool
) -> None:
    """Where "auto" still takes another one."""
    flash_attn_4(monkeypatch, [])
    monkeypatch.setattr(fa4, "is_hopper", lambda device: hopper)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", ModuleType("flash_attn.cute"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", None)
    with pytest.raises((ImportError, AttributeError)):
        fa4.FlashAttention4(torch.device("cpu"), 64)


def test_fa4_leaves_the_tail_to_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    flash_attn_4(monkeypatch, calls)
    backend = fa4.FlashAttention4(torch.device("cpu"), 16)
    assert backend.schedule([1296], 16) is None
    lengths = [1160, 40]
    qkv = torch.randn(1200 + 5, 3, 2, 16)
    segments = make_segments(lengths, room=2)
    out = torch.full((1205, 32), torch.nan)
    expected = dense_reference(qkv, lengths)
    backend(qkv, segments, no_rotary(1205, 16), out)
    assert calls[-1]["seqused_q"] is None
    torch.testing.assert_close(out[:1200].double(), expected, rtol=1e-5, atol=1e-5)

    schedule = on_device(make_schedule(lengths, [1152, 40]), room=2)
    out.fill_(torch.nan)
    backend(qkv, replace(segments, schedule=schedule), no_rotary(1205, 16), out)
    assert calls[-1]["seqused_q"] is schedule.per_segment
    torch.testing.assert_close(out[:1200].double(), expected, rtol=1e-5, atol=1e-5)
    assert out[1200:].isnan().all()


@pytest.mark.parametrize(("hopper", "head_dim"), [(True, 72), (True, 128), (False, 72)])
def test_fa4_schedules_where_its_tiles_are_known(
    monkeypatch: pytest.MonkeyPatch, hopper: bool, head_dim: int
) -> None:
    flash_attn_4(monkeypatch, [])
    monkeypatch.setattr(fa4, "is_hopper", lambda device: hopper)
    backend = fa4.FlashAttention4(torch.device("cpu"), head_dim)
    schedule = backend.schedule([3080], 16)
    assert (None if schedule is None else schedule.per_segment.tolist()) == (
        [3072] if hopper and head_dim == 72 else None
    )


def on_device(schedule: Schedule, *, room: int, device: str = "cpu") -> ScheduleTensors:
    """With zeros for segments that are not in use, as in a graph."""
    per_segment = np.concatenate([schedule.per_segment, np.zeros(room, np.int32)])
    return ScheduleTensors(
        torch.as_tensor(schedule.work, device=device), torch.as_tensor(per_segment, device=device)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 80])
@pytest.mark.parametrize(
    ("lengths", "tails"), [([3080], [8]), ([1600, 300, 1290], [64, 0, 138])], ids=str
)
def test_fa4_with_a_schedule_on_gpu(head_dim: int, lengths: list[int], tails: list[int]) -> None:
    reason = dict(usable("cuda", torch.bfloat16, head_dim))["fa4"]
    if reason is not None:
        pytest.skip(reason)
    backend = get_backend("fa4", device="cuda", dtype=torch.bfloat16, head_dim=head_dim)
    tokens, padding, heads = sum(lengths), 40, 3
    qkv = torch.randn(tokens + padding, 3, heads, head_dim, device="cuda").bfloat16()
    qkv[tokens:] = 0
    segments = make_segments(lengths, room=5, device="cuda")
    rotary = no_rotary(tokens, head_dim, "cuda")
    plain = backend(qkv, segments, rotary)
    out = torch.full_like(plain, torch.nan)
    whole = [n - tail for n, tail in zip(lengths, tails, strict=True)]
    schedule = on_device(make_schedule(lengths, whole), room=5, device="cuda")
    backend(qkv, replace(segments, schedule=schedule), rotary, out)
    rows = torch.cat([torch.arange(n) < kept for n, kept in zip(lengths, whole, strict=True)])
    assert torch.equal(out[:tokens][rows.cuda()], plain[:tokens][rows.cuda()])
    expected = dense_reference(qkv, lengths)
    error = (out[:tokens].double().cpu() - expected)[~rows].norm() / expected[~rows].norm()
    # Probabilities and outputs are rounded to bf16 once each, 2^-9 relative at most.
    assert error < 2**-9 * 2**0.5
