"""Products whose rows do not depend on how many there are: the kernel, and what chooses it."""

from __future__ import annotations

import pytest
import torch

from tests.support.interpreter import interpreted, rows_alike
from tests.support.products import expected, problem, relative_error, tolerance
from vitrt.kernels import gemm, gemm_triton
from vitrt.kernels.gemm_table import KINDS, Choice, Kind, Product, Table, Tile

__all__ = ["rows_alike"]  # a fixture


@interpreted
@pytest.mark.parametrize("shape", [(77, 48, 40), (33, 130, 96), (1, 64, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: Kind, shape: tuple[int, int, int]):
    x, weight, bias, residual = problem(kind, *shape)
    got = gemm_triton.product(kind, x, weight, bias, residual)
    want = expected(kind, x, weight, bias, residual)
    assert got.shape == want.shape and got.dtype == torch.float32
    assert relative_error(got, want) < tolerance(torch.float32, shape[2], 1)
    if kind == "bias":
        bare = gemm_triton.product(kind, x, weight, None)
        assert relative_error(bare, expected(kind, x, weight, None, None)) < tolerance(
            torch.float32, shape[2], 1
        )


@interpreted
def test_in_place_and_with_strides():
    x, weight, bias, residual = problem("residual")
    assert residual is not None
    want = gemm_triton.product("residual", x, weight, bias, residual)
    wide = torch.zeros(len(x), 3 * x.shape[1])
    wide[:, : x.shape[1]] = x
    kept = residual.clone()
    result = gemm_triton.product("residual", wide[:, : x.shape[1]], weight, bias, kept, kept)
    assert result is kept and torch.equal(kept, want)
    empty = gemm_triton.product("swiglu", x[:0], weight, bias)
    assert empty.shape == (0, weight.shape[0] // 2)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_bits_among_any_others(kind: Kind, rows_alike: None):
    x, weight, bias, residual = problem(kind, 90, 80, 72)
    whole = gemm_triton.product(kind, x, weight, bias, residual)
    for first, last in ((0, 1), (31, 33), (17, 90), (64, 65)):
        rows = slice(first, last)
        part = None if residual is None else residual[rows]
        assert torch.equal(gemm_triton.product(kind, x[rows], weight, bias, part), whole[rows])


def table() -> Table:
    split, whole = Tile(128, 192, True, 1, 2, 2), Tile(128, 160, True, 1, 1)
    rows = [
        (64, Choice("addmm")),
        (1024, Choice("quack", Tile(64, 64, True, 1, 1))),
        (6000, Choice("quack", whole)),
        (8192, Choice("quack", split)),
        (9000, Choice("mm")),
    ]
    return Table("NVIDIA H100", (9, 0), {Product("bias", 512, 256): rows})


def test_one_tile_for_every_number_of_rows():
    """That of many rows, and never one that adds up K in parts."""
    assert table().one_tile(Product("bias", 512, 256)) == Tile(128, 160, True, 1, 1)
    assert table().one_tile(Product("residual", 512, 256)) is None
    entry = {"kind": "bias", "n": 512, "k": 256, "one_tile": "128x96p1x1"}
    rows = [{"m": 8192, "use": "quack 128x160p1x1"}]
    content = {"device": "NVIDIA H100", "capability": [9, 0], "products": [entry | {"rows": rows}]}
    assert Table.parse(content).one_tile(Product("bias", 512, 256)) == Tile(128, 96, True, 1, 1)


@pytest.mark.parametrize("quack", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_what_runs_never_depends_on_the_rows(
    kind: Kind, quack: bool, monkeypatch: pytest.MonkeyPatch
):
    """Resolved as on a GPU; nothing is launched."""
    chosen = []
    monkeypatch.setattr(gemm, "_usable_table", lambda *arguments: table() if quack else None)
    monkeypatch.setattr(
        gemm.gemm_quack, "compiled", lambda kind, tile, dtype, device: chosen.append(tile)
    )
    for m in (1, 63, 64, 1024, 8192, 50000):
        x = torch.empty(m, 256, device="meta")
        weight, bias = torch.empty(512, 256, device="meta"), torch.empty(512, device="meta")
        residual = torch.empty(m, 512, device="meta") if kind == "residual" else None
        function = gemm._choose_function(kind, x, weight, bias, residual, fixed=True)
        if function is not None:
            chosen.append((function.func, function.args))
    tile = Tile(128, 160, True, 1, 1)
    ours = (gemm_triton.product, (kind,))
    assert set(chosen) == {tile if quack and kind == "bias" else ours} and len(chosen) == 6
    assert gemm.fuses_residual(x, weight, fixed=True)
