"""Query rows taken from a backend to save a wave: which, and that exactly they reach the kernel."""

from __future__ import annotations

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

from tests.attention.test_attention import dense_reference, make_segments, no_rotary
from tests.kernels.test_rest_attention import make_cut
from vitrt import VisionEncoder
from vitrt.attention import AttentionChoice, Rotary, Segments, fa4, get_backend, usable
from vitrt.attention.base import REST_ROWS
from vitrt.attention.rests import MOST_RESTS, cut_last_wave, rest_list, whole_rows
from vitrt.attention.sdpa import SdpaBackend
from vitrt.engine.batch import ValuesFeed
from vitrt.engine.graph_runner import GraphKey, GraphRunner
from vitrt.kernels.rest_attention import rest_attention
from vitrt.layers.attention import VisionAttention
from vitrt.models.packed_plan import view_plan
from vitrt.models.tower import TowerOutput
from vitrt.parallel.context import ParallelContext

H200 = {"tile_rows": 192, "processors": 132}


# Which rows


@pytest.mark.parametrize(
    ("lengths", "heads", "cut"),
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
def test_what_is_cut(lengths: list[int], heads: int, cut: list[int] | None) -> None:
    whole = cut_last_wave(lengths, heads, **H200)
    if cut is None:
        assert whole is None
    else:
        assert whole is not None
        assert whole.dtype == np.int32
        assert (np.array(lengths) - whole).tolist() == cut


@given(
    st.lists(st.integers(1, 6000), min_size=1, max_size=6),
    st.sampled_from([2, 4, 8, 16, 20]),
    st.sampled_from([78, 114, 132, 148]),
)
def test_a_cut_saves_a_wave_and_is_small(lengths: list[int], heads: int, processors: int) -> None:
    whole = cut_last_wave(lengths, heads, tile_rows=192, processors=processors)
    if whole is None:
        return

    def waves(rows: Sequence[int]) -> int:
        return -(-sum(-(-n // 192) * heads for n in rows) // processors)

    assert waves(whole.tolist()) == waves(lengths) - 1
    for length, kept in zip(lengths, whole.tolist(), strict=True):
        assert kept in (length, length // 192 * 192)
        assert kept == length or length >= 1024
        if kept < length:
            # Every cut is needed: with any of them undone, the wave is back.
            assert waves([*whole.tolist(), length - kept]) == waves(lengths)
    boundaries = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    work = rest_list(boundaries, whole)
    assert 0 < len(work) <= MOST_RESTS
    rows = [r for first, _, end in work for r in range(first, min(first + REST_ROWS, end))]
    kept_rows = [r for s, n in zip(boundaries[:-1], whole, strict=True) for r in range(s, s + n)]
    assert sorted(rows + kept_rows) == list(range(sum(lengths))), "every row once"


def test_heads_are_those_of_the_rank(tiny_qwen3_vl: Path) -> None:
    config = VisionEncoder.from_pretrained(tiny_qwen3_vl, device="cpu").config
    context = ParallelContext(tp_rank=1, tp_size=2)
    assert VisionAttention(config, context).heads == config.num_heads // 2


# Which of them reach the backend


class Cutting(SdpaBackend):
    """Computes tiles of 16 query rows; with a cut, whatever else is the kernel's or stays NaN."""

    name = "cutting"
    capturable = True

    def __init__(self, *, asks: bool = True) -> None:
        self.asks = asks
        self.cuts: list[tuple[list[int], int]] = []
        self.heads: set[int] = set()

    def whole_rows(self, lengths: Sequence[int], heads: int) -> np.ndarray | None:
        self.heads.add(heads)
        if not self.asks or len(lengths) > MOST_RESTS or not any(n % 16 for n in lengths):
            return None
        return np.array([n // 16 * 16 for n in lengths], dtype=np.int32)

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        out = super().__call__(qkv, segments, rotary, out)
        cut = segments.cut
        if cut is None:
            return out
        used = int(segments.count)
        starts, ends = segments.cu_seqlens[:used], segments.cu_seqlens[1 : used + 1]
        for start, end, rows in zip(starts, ends, cut.whole[:used], strict=True):
            out[start + rows : end] = torch.nan
        assert not cut.whole[used:].any(), "unused segments have no rows"
        self.cuts.append((cut.whole[:used].tolist(), int(cut.rest_count)))
        return rest_attention(qkv, cut, out)


@pytest.fixture(params=["tiny_qwen2_5_vl", "tiny_qwen3_vl"])
def encoder(request: pytest.FixtureRequest) -> VisionEncoder:
    return VisionEncoder.from_pretrained(request.getfixturevalue(request.param), device="cpu")


CUT_GRIDS = [[(1, 6, 10)], [(2, 6, 6)], [(1, 4, 4), (1, 10, 10), (1, 2, 6)]]


@pytest.mark.parametrize("grids", CUT_GRIDS, ids=str)
def test_eager_forwards_with_a_cut_are_the_same(encoder: VisionEncoder, grids: Any) -> None:
    lengths = [h * w for t, h, w in grids for _ in range(t)]
    values = torch.randn(sum(lengths), encoder.config.patch_dim)
    expected = encoder(values, grids)
    backend = Cutting()
    encoder.runner.attention = AttentionChoice(backend, SdpaBackend())
    for _ in range(2):  # the second from the cache of packed plans
        torch.testing.assert_close(encoder(values, grids).embeddings, expected.embeddings)
    whole = [n // 16 * 16 for n in lengths]
    assert backend.cuts
    rests = sum(n > w for n, w in zip(lengths, whole, strict=True))
    assert all(cut == (whole, rests) for cut in backend.cuts)
    assert backend.heads == {encoder.config.num_heads}


@pytest.mark.parametrize("cut", [1156, None])
def test_kernels_of_a_cut_are_loaded_with_the_model(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch, cut: int | None
) -> None:
    backend = Cutting()
    monkeypatch.setattr(
        backend,
        "whole_rows",
        lambda lengths, heads: np.array([1152]) if list(lengths) == [cut] else None,
    )
    encoder.runner.attention = AttentionChoice(backend, SdpaBackend())
    encoder._load_kernels()
    assert bool(backend.cuts) == (cut is not None)
    assert not encoder.stats().eager


@pytest.mark.parametrize("grids", [[(1, 8, 8)], [(1, 2, 6)] * 5], ids=str)
def test_what_is_not_cut_has_no_rests(encoder: VisionEncoder, grids: Any) -> None:
    """Whole tiles, and more segments than this backend wants to cut."""
    backend = Cutting()
    encoder.runner.attention = AttentionChoice(backend, SdpaBackend())
    encoder(torch.randn(sum(h * w for _, h, w in grids), encoder.config.patch_dim), grids)
    assert not backend.cuts


def graph_runner(encoder: VisionEncoder, backend: SdpaBackend) -> GraphRunner:
    """What decides and packs for graphs; only recording needs a GPU."""
    return GraphRunner(
        encoder.tower,
        AttentionChoice(backend, SdpaBackend()),
        encoder.device,
        encoder.dtype,
        limit_bytes=0,
        buckets=(64, 128),
    )


def test_graphs_are_keyed_by_the_cut(encoder: VisionEncoder) -> None:
    runner = graph_runner(encoder, Cutting())
    cut, whole = (encoder.tower.plan(grids) for grids in ([(1, 6, 18)], [(1, 8, 16)]))
    assert runner._key(cut) == GraphKey(128, 8, "cutting", cut=True)
    assert runner._key(whole) == GraphKey(128, 8, "cutting", cut=False)
    assert runner._key(encoder.tower.plan([(1, 2, 6)] * 5)).cut is False
    assert runner._ineligible(cut, ()) is None
    assert graph_runner(encoder, Cutting(asks=False))._key(cut).cut is False
    assert graph_runner(encoder, SdpaBackend())._key(cut).cut is False


def test_a_bucket_is_warmed_up_with_and_without_a_cut(
    encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 65 to 128 patches: 128 fills tiles of 64 rows, and 96 does not."""
    backend = Cutting()
    monkeypatch.setattr(
        backend,
        "whole_rows",
        lambda lengths, heads: np.array([64]) if list(lengths) == [96] else None,
    )
    runner = graph_runner(encoder, backend)
    keys = {runner._key(plan) for plan in runner._warmup_plans(128)}
    assert keys == {GraphKey(128, 8, "cutting", cut=cut) for cut in (False, True)}


def test_replays_with_other_rests_are_right(encoder: VisionEncoder) -> None:
    """One static buffer, loaded for one cut batch after the other: rests are read from there."""
    backend = Cutting()
    runner = graph_runner(encoder, backend)
    batches = [[(1, 6, 18)], [(1, 4, 10), (1, 6, 6)], [(3, 6, 6)], [(1, 6, 18)]]
    keys = {runner._key(encoder.tower.plan(grids)) for grids in batches}
    assert keys == {GraphKey(128, 8, "cutting", cut=True)}
    for grids in batches:
        plan = encoder.tower.plan(grids)
        values = torch.randn(plan.num_patches, encoder.config.patch_dim)
        (key,) = keys
        layout = runner._layout(key)
        patches, buffer = runner._static(key.bucket)
        patches.fill_(torch.nan)
        feed = ValuesFeed(values, reordered=plan.order is not None)
        runner._load(plan, layout, feed, patches, buffer)
        views = view_plan(buffer, layout, plan, max_seqlen=key.bucket, padded=True)
        backend.cuts.clear()
        output: TowerOutput = runner.forward(patches, views, runner.attention)
        expected = encoder(values, grids).embeddings
        torch.testing.assert_close(
            output.embeddings[: sum(plan.tokens)], expected, rtol=1e-5, atol=1e-5
        )
        assert backend.cuts
        assert all(cut[0] == [n // 16 * 16 for n in plan.segment_lengths] for cut in backend.cuts)


def test_static_buffers_hold_every_layout(encoder: VisionEncoder) -> None:
    runner = graph_runner(encoder, Cutting())
    _, buffer = runner._static(64)
    for cut in (False, True):
        layout = runner._layout(GraphKey(128, 8, "", cut=cut)).fed_by("sources")
        assert layout.size <= buffer.numel()
        fields = sorted(layout.fields().values())
        for (offset, shape), (following, _) in pairwise(fields):
            assert offset + int(np.prod(shape)) <= following
        assert layout.fields().keys() >= ({"whole", "rests"} if cut else set())


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


def test_fa4_leaves_the_rests_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    flash_attn_4(monkeypatch, calls)
    backend = fa4.FlashAttention4(torch.device("cpu"), 16)
    assert whole_rows(backend, [1296], 16) is None
    lengths = [1160, 40]
    qkv = torch.randn(1200 + 5, 3, 2, 16)
    segments = make_segments(lengths, room=2)
    out = torch.full((1205, 32), torch.nan)
    expected = dense_reference(qkv, lengths)
    backend(qkv, segments, no_rotary(1205, 16), out)
    assert calls[-1]["seqused_q"] is None
    torch.testing.assert_close(out[:1200].double(), expected, rtol=1e-5, atol=1e-5)

    cut = make_cut(lengths, [8, 0], room=2)
    out.fill_(torch.nan)
    backend(qkv, replace(segments, cut=cut), no_rotary(1205, 16), out)
    assert calls[-1]["seqused_q"] is cut.whole
    torch.testing.assert_close(out[:1200].double(), expected, rtol=1e-5, atol=1e-5)
    assert out[1200:].isnan().all()


@pytest.mark.parametrize(("hopper", "head_dim"), [(True, 72), (True, 128), (False, 72)])
def test_fa4_is_cut_where_its_tiles_are_known(
    monkeypatch: pytest.MonkeyPatch, hopper: bool, head_dim: int
) -> None:
    flash_attn_4(monkeypatch, [])
    monkeypatch.setattr(fa4, "is_hopper", lambda device: hopper)
    backend = fa4.FlashAttention4(torch.device("cpu"), head_dim)
    whole = whole_rows(backend, [3080], 16)
    assert (None if whole is None else whole.tolist()) == (
        [3072] if hopper and head_dim == 72 else None
    )


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 72, 80])
@pytest.mark.parametrize(
    ("lengths", "rests"), [([3080], [8]), ([1600, 300, 1290], [64, 0, 138])], ids=str
)
def test_fa4_with_a_cut_on_gpu(head_dim: int, lengths: list[int], rests: list[int]) -> None:
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
    cut = make_cut(lengths, rests, room=5, device="cuda")
    backend(qkv, replace(segments, cut=cut), rotary, out)
    rows = torch.cat([torch.arange(n) < n - rest for n, rest in zip(lengths, rests, strict=True)])
    assert torch.equal(out[:tokens][rows.cuda()], plain[:tokens][rows.cuda()])
    expected = dense_reference(qkv, lengths)
    error = (out[:tokens].double().cpu() - expected)[~rows].norm() / expected[~rows].norm()
    # Probabilities and outputs are rounded to bf16 once each, 2^-9 relative at most.
    assert error < 2**-9 * 2**0.5
