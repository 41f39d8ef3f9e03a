"""FlashAttention-4 with our parts: right, and each row by itself alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.attention_cases import dense_reference, make_segments, no_rotary
from vitrt.attention import fa4
from vitrt.kernels.persistent import processors

pytestmark = pytest.mark.gpu

HEADS = 4
CASES = {
    "one": [1296],
    "lists": [784] * 6,
    "many tiles": [400] * 70,  # 840 tiles for 132 processors
    "unequal": [1, 400, 65, 3080, 112, 113, 191, 192, 193, 2],
}


@pytest.fixture(scope="module", params=[72, 80])
def forwards(request: pytest.FixtureRequest):
    """(head size, our forward, our persistent one)"""
    device = torch.device("cuda")
    reason = fa4._unavailable(device, torch.bfloat16, request.param)
    if reason is not None or fa4._release() != fa4._RELEASE or not fa4.is_hopper(device):
        pytest.skip(reason or "another release of flash-attn-4, or no Hopper")
    ours, persistent = fa4._forwards(True, processors(device))
    assert persistent is not None
    return request.param, ours, persistent


def run(forward, qkv: Tensor, lengths: list[int], used: list[int] | None = None) -> Tensor:
    segments = make_segments(lengths, device="cuda")
    out = torch.full((*qkv.shape[:1], *qkv.shape[2:]), math.nan, dtype=qkv.dtype, device="cuda")
    q, k, v = qkv.unbind(1)
    forward(
        q,
        k,
        v,
        cu_seqlens_q=segments.cu_seqlens,
        cu_seqlens_k=segments.cu_seqlens,
        seqused_q=None if used is None else torch.tensor(used, dtype=torch.int32, device="cuda"),
        max_seqlen_q=max(lengths),
        max_seqlen_k=max(lengths),
        out=out,
    )
    return out.flatten(1)


def peaked(lengths: list[int], head_dim: int, dtype: torch.dtype) -> Tensor:
    """Scores that spread over tens, and grow towards the keys that a kernel reads last."""
    torch.manual_seed(head_dim + len(lengths))
    qkv = torch.randn(sum(lengths), 3, HEADS, head_dim, device="cuda")
    qkv[:, 0] *= 6
    qkv[:, 1] *= torch.linspace(4, 0.1, len(qkv), device="cuda")[:, None, None]
    return qkv.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES)
def test_right_and_the_same_bits_in_persistent_blocks(forwards, lengths, dtype):
    head_dim, ours, persistent = forwards
    qkv = peaked(lengths, head_dim, dtype)
    expected = torch.cat([dense_reference(part, [len(part)]) for part in qkv.split(lengths)])
    for forward in (ours, persistent):
        out = run(forward, qkv, lengths)
        error = (out.double().cpu() - expected).norm() / expected.norm()
        assert error < (4e-3 if dtype == torch.bfloat16 else 6e-4)
    assert torch.equal(run(ours, qkv, lengths), run(persistent, qkv, lengths))


def test_a_segment_is_the_same_bits_beside_any_other(forwards):
    """Rows behind a segment's end are loaded with its last tile: none may raise its maxima."""
    head_dim, ours, persistent = forwards
    lengths = [1000, 300, 500]
    qkv = peaked(lengths, head_dim, torch.bfloat16)
    alone = [run(ours, part, [len(part)]) for part in qkv.split(lengths)]
    for forward in (ours, persistent):
        for scale in (1.0, 30.0, 0.0):
            other = qkv.clone()
            other[1000:1300] *= scale
            out = run(forward, other, lengths).split(lengths)
            assert torch.equal(out[0], alone[0]) and torch.equal(out[2], alone[2])


def test_rows_that_are_left_out_are_left(forwards):
    head_dim, ours, _ = forwards
    lengths = [1600, 100]
    qkv = peaked(lengths, head_dim, torch.bfloat16)
    out, whole = run(ours, qkv, lengths, [1536, 100]), run(ours, qkv, lengths)
    assert out[1536:1600].isnan().all()
    out[1536:1600] = whole[1536:1600]
    assert torch.equal(out, whole)


def test_a_recorded_list_serves_others(forwards):
    head_dim, _, _ = forwards
    backend = fa4.FlashAttention4(torch.device("cuda"), head_dim)
    lengths = [800] * 6
    segments = make_segments(lengths, device="cuda")
    qkv = peaked(lengths, head_dim, torch.bfloat16)
    rotary = no_rotary(len(qkv), head_dim, "cuda")
    out = backend(qkv, segments, rotary)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend(qkv, segments, rotary, out)
    others = [900, 700, 810, 790, 1000, 600]
    segments.cu_seqlens.copy_(make_segments(others, device="cuda").cu_seqlens)
    qkv.copy_(peaked(others, head_dim, torch.bfloat16))
    graph.replay()
    assert torch.equal(out, backend(qkv, make_segments(others, device="cuda"), rotary))


def test_infinite_and_missing_numbers_stay_in_their_row(forwards):
    head_dim, ours, persistent = forwards
    lengths = [400] * 6
    qkv = peaked(lengths, head_dim, torch.bfloat16)
    clean = run(ours, qkv, lengths)
    qkv[10, 0] = math.nan
    for forward in (ours, persistent):
        out = run(forward, qkv, lengths)
        assert out[10].isnan().all()
        out[10] = clean[10]
        assert torch.equal(out, clean)
