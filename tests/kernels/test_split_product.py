"""Products in shares of K and the norm that adds them up; the interpreter here, bf16 on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import interpreted
from vitrt.kernels import gemm
from vitrt.kernels.gemm_table import Choice, Product, SplitTile, Table
from vitrt.kernels.norm import _norm_triton, add_norm
from vitrt.kernels.split_product import split_product


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@interpreted
@pytest.mark.parametrize("tile", ["16x32x64/3w4s3", "16x32x64t/3w4s3", "16x64x128t/1w4s3"])
def test_shares_add_up(tile: str):
    x, weight = normal(19, 150), normal(38, 150)
    shares = split_product(x, weight, SplitTile.parse(tile))
    assert shares.shape == (SplitTile.parse(tile).shares, 19, 38) and shares.dtype == torch.float32
    torch.testing.assert_close(shares.sum(dim=0), x @ weight.t(), rtol=1e-5, atol=2e-5)


@interpreted
@pytest.mark.parametrize("width", [144, 64])
@pytest.mark.parametrize("centred", [True, False])
def test_the_norm_adds_them_up(centred: bool, width: int):
    shares, residual = normal(3, 5, width), normal(5, width)
    bias, weight, shift = normal(3, width)
    norm_bias = shift if centred else None
    expected = add_norm(shares.sum(dim=0), bias, residual, weight, norm_bias, 1e-6)
    total = torch.empty_like(residual)
    out = _norm_triton(
        shares, weight, norm_bias, 1e-6, residual=residual, delta_bias=bias, total=total
    )
    torch.testing.assert_close(total, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, expected[1], rtol=1e-5, atol=1e-5)
    by_reference = add_norm(shares, bias, residual, weight, norm_bias, 1e-6)
    for got, want in zip(by_reference, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_tiles_are_read_as_they_are_written():
    for text in ("64x64x128t/8w4s3", "64x32x64/3w4s4"):
        assert str(SplitTile.parse(text)) == text
        assert str(Choice.parse(f"split {text}")) == f"split {text}"
    for wrong in ("split", "split 128x128p1x1", "mm 64x32x64/3w4s4"):
        with pytest.raises(ValueError, match="expected"):
            Choice.parse(wrong)


def test_which_rows_are_split(monkeypatch: pytest.MonkeyPatch):
    tile = SplitTile.parse("64x32x64/3w4s4")
    rows = [(64, Choice("split", None, tile)), (128, Choice("mm"))]
    table = Table("this", (9, 0), {Product("residual", 96, 64): rows})
    monkeypatch.setattr(gemm, "_table_of", lambda weight: table)
    weight = torch.empty(96, 64)
    assert gemm._split_tile(4, weight) == gemm._split_tile(64, weight) == tile
    assert gemm._split_tile(128, weight) is None
    assert gemm.residual_shares(torch.empty(64, 64), weight) is None, "a CPU has no shares"


def test_shares_are_compiled_where_the_weight_is(monkeypatch: pytest.MonkeyPatch):
    """Triton launches on the current device, which need not be the one that a tower loads to."""
    tile = SplitTile.parse("64x32x64/3w4s4")
    rows = [(64, Choice("split", None, tile)), (128, Choice("mm"))]
    table = Table("this", (9, 0), {Product("residual", 96, 64): rows})
    current, seen = [], []

    @contextmanager
    def device(index: torch.device) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(gemm, "_table_of", lambda weight: table)
    monkeypatch.setattr(gemm, "split_product", lambda x, w, tile: seen.append((tile, *current)))
    weight = torch.empty(96, 64)
    gemm.compile_product(weight, None, residual=True)
    assert seen == [(tile, weight.device)]
    gemm.compile_product(weight, None, residual=True, fixed=True)
    gemm.compile_product(weight, None)
    assert len(seen) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 200])
@pytest.mark.parametrize("tile", ["64x64x128t/8w4s3", "64x32x64/3w4s4"])
def test_shares_on_gpu(tile: str, rows: int):
    x, weight = (normal(*shape).cuda().bfloat16() for shape in ((rows, 1152), (640, 1152)))
    shares = split_product(x, weight, SplitTile.parse(tile))
    expected = x.double() @ weight.double().t()
    # Products of bfloat16 are exact in float32: only their sums round.
    assert (shares.double().sum(dim=0) - expected).norm() < 1e-6 * expected.norm()
    residual, bias = normal(rows, 640).cuda(), normal(640).cuda().bfloat16()
    scale = (1 + 0.1 * normal(640)).cuda().bfloat16()
    want = residual.double() + expected + bias.double()
    total, normed = add_norm(shares, bias, residual, scale, None, 1e-6)
    assert (total.double() - want).norm() < 1e-6 * want.norm()
    exact = torch.nn.functional.rms_norm(want, (640,), scale.double(), 1e-6)
    assert (normed.double() - exact).norm() < 2**-8 * exact.norm()
