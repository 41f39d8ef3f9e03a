"""Matrix products with everything in the epilogue: values at odd sizes, and what runs them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.products import activation_of, expected, problem, relative_error, tolerance
from vitrt.kernels import gemm, gemm_aten, gemm_fp8, gemm_quack, gemm_table
from vitrt.kernels.gemm import compile_product, fuses_residual, linear
from vitrt.kernels.gemm_table import KINDS, Choice, Kind, Product, Table, Tile

# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_cpu_equals_float64(kind: Kind, with_bias: bool) -> None:
    x, weight, bias, residual = problem(kind)
    given = bias if with_bias else None
    kept = None if residual is None else residual.clone()
    actual = linear(x, weight, given, activation=activation_of(kind), residual=residual)
    reference = expected(kind, x, weight, given, residual)
    assert actual.shape == reference.shape
    # Bias, activation and sum round once each.
    assert relative_error(actual, reference) < tolerance(torch.float32, x.shape[1], 3)
    if kept is not None:
        assert torch.equal(residual, kept)


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_is_the_formula(kind: Kind) -> None:
    x, weight, bias, residual = (each for each in problem(kind, m=5))
    x, weight, bias = x.double(), weight.double(), bias.double()
    pre = torch.einsum("mk,nk->mn", x, weight) + bias
    match kind:
        case "bias":
            formula = pre
        case "residual":
            formula = residual.double() + pre
        case "gelu":
            formula = pre * torch.special.ndtr(pre)
        case "gelu_tanh":
            formula = pre * torch.sigmoid((8 / torch.pi) ** 0.5 * (pre + 0.044715 * pre**3))
        case "quick_gelu":
            formula = pre * torch.sigmoid(1.702 * pre)
        case "swiglu":
            formula = pre[:, 0::2] * torch.sigmoid(pre[:, 0::2]) * pre[:, 1::2]
    assert relative_error(expected(kind, x, weight, bias, residual), formula) < 1e-14


@pytest.mark.parametrize("kind", KINDS)
def test_out_is_filled_and_returned(kind: Kind) -> None:
    x, weight, bias, residual = problem(kind)
    whole = torch.full((3, len(x), len(weight) // (2 if kind == "swiglu" else 1)), float("nan"))
    actual = linear(
        x, weight, bias, activation=activation_of(kind), residual=residual, out=whole[1]
    )
    assert actual.data_ptr() == whole[1].data_ptr()
    reference = expected(kind, x, weight, bias, residual)
    assert relative_error(whole[1], reference) < tolerance(torch.float32, x.shape[1], 3)
    assert whole[0].isnan().all() and whole[2].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_nan_stay_their_own(kind: Kind) -> None:
    x, weight, bias, residual = problem(kind)
    activation = activation_of(kind)
    clean = linear(x, weight, bias, activation=activation, residual=residual)
    x[-7:] = float("nan")
    padded = linear(x, weight, bias, activation=activation, residual=residual)
    assert torch.equal(padded[:-7], clean[:-7])


def test_no_rows() -> None:
    x, weight, bias, _ = problem("swiglu")
    assert linear(x[:0], weight, bias, activation="swiglu").shape == (0, len(weight) // 2)
    assert linear(x[:0], weight, bias).shape == (0, len(weight))


@pytest.mark.parametrize("kind", KINDS)
def test_product_then_kernel_equals_float64(kind: Kind) -> None:
    """The path of devices without epilogues, its kernels in Triton's interpreter or in PyTorch."""
    x, weight, bias, residual = problem(kind)
    actual = gemm_aten.product_then_kernel(kind, x, weight, bias, residual)
    reference = expected(kind, x, weight, bias, residual)
    assert relative_error(actual, reference) < tolerance(torch.float32, x.shape[1], 4)
    out = torch.empty_like(actual)
    again = gemm_aten.product_then_kernel(kind, x, weight, bias, residual, out)
    assert again is out and torch.equal(again, actual)


@pytest.mark.parametrize("kind", ["bias", "gelu_tanh", "residual"])
def test_addmm_equals_float64(kind: Kind) -> None:
    x, weight, bias, residual = problem(kind)
    actual = gemm_aten.addmm(kind, x, weight, bias, residual)
    if kind == "gelu_tanh":  # on a CPU the operator has no tanh formula
        reference = expected("gelu", x, weight, bias, residual)
    else:
        reference = expected(kind, x, weight, bias, residual)
    assert relative_error(actual, reference) < tolerance(torch.float32, x.shape[1], 3)
    out = torch.empty_like(actual)
    assert torch.equal(gemm_aten.addmm(kind, x, weight, bias, residual, out), actual)


def test_shapes_must_meet() -> None:
    x, weight, bias, _ = problem("bias")
    with pytest.raises(AssertionError, match="do not share K"):
        linear(x[:, 1:], weight, bias)


# --- the choice -----------------------------------------------------------------------------------

SMALL, LARGE = Tile(128, 192, True, 1, 1), Tile(192, 128, True, 1, 2)


@pytest.fixture
def table() -> Table:
    rows = {
        Product("gelu_tanh", 4304, 1152): [
            (1296, Choice("quack", SMALL)),
            (41472, Choice("quack", LARGE)),
        ],
        Product("gelu_tanh", 4096, 1024): [(1296, Choice("addmm"))],
        Product("residual", 1152, 4304): [(1296, Choice("mm")), (41472, Choice("quack", LARGE))],
    }
    return Table("NVIDIA H200", (9, 0), rows)


@pytest.mark.parametrize(
    ("m", "tile"),
    [(1, SMALL), (1296, SMALL), (7000, SMALL), (7500, LARGE), (41472, LARGE), (10**6, LARGE)],
)
def test_choice_is_nearest_in_m(table: Table, m: int, tile: Tile) -> None:
    # sqrt(1296 * 41472) = 7331
    assert table.choice(Product("gelu_tanh", 4304, 1152), m) == Choice("quack", tile)


def test_an_unmeasured_product_takes_its_neighbours_choice(table: Table) -> None:
    assert table.choice(Product("gelu_tanh", 4000, 1000), 1296) == Choice("addmm")
    assert table.choice(Product("gelu_tanh", 4600, 1200), 1296) == Choice("quack", SMALL)
    assert table.choice(Product("swiglu", 4304, 1152), 1296) is None


def test_tiles_of_a_product(table: Table) -> None:
    assert table.tiles(Product("gelu_tanh", 4304, 1152)) == [SMALL, LARGE]
    assert table.tiles(Product("residual", 1152, 1152)) == [LARGE]
    assert table.tiles(Product("bias", 1152, 1152)) == []


@pytest.mark.parametrize("text", ["128x192p1x1", "256x128c2x1", "128x96p1x1/4"])
def test_tiles_are_written_as_they_are_read(text: str) -> None:
    assert str(Tile.parse(text)) == text
    assert str(Choice.parse(f"quack {text}")) == f"quack {text}"


@pytest.mark.parametrize("text", ["quack", "addmm 128x192p1x1", "cublas", "quack 128x192", ""])
def test_a_broken_table_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        Choice.parse(text)


def test_the_packages_tables_are_sound() -> None:
    assert gemm_table.tables(), "no table in the package"
    for table in gemm_table.tables():
        for product, rows in table.choices.items():
            assert product.kind in KINDS
            assert [m for m, _ in rows] == sorted({m for m, _ in rows})
            for _, choice in rows:
                if choice.implementation == "addmm":
                    assert product.kind in ("bias", "gelu_tanh"), "cuBLAS has no such epilogue"
                if choice.tile is None:
                    continue
                assert (
                    choice.tile.m % 64 == 0 and choice.tile.cluster_m * choice.tile.cluster_n <= 4
                )
                assert choice.tile.n % (32 if product.kind == "swiglu" else 16) == 0


def test_table_for_prefers_the_name_then_the_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = (Table("NVIDIA H100", (9, 0)), Table("NVIDIA H200", (9, 0)))
    monkeypatch.setattr(gemm_table, "tables", lambda: tables)
    gemm_table.table_for.cache_clear()
    assert gemm_table.table_for("NVIDIA H200", (9, 0)) is tables[1]
    assert gemm_table.table_for("NVIDIA GH200", (9, 0)) is tables[0]
    assert gemm_table.table_for("NVIDIA B200", (10, 0)) is None
    gemm_table.table_for.cache_clear()


@pytest.fixture
def hopper(table: Table, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that claims to be an H200 with quack installed."""
    monkeypatch.setattr(gemm_quack, "unavailable", lambda device: None)
    monkeypatch.setattr(gemm, "table_for", lambda name, capability: table)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return torch.device("cuda", 0)


def test_choose_follows_the_table(hopper: torch.device) -> None:
    chosen = gemm.choose("gelu_tanh", 41000, 4304, 1152, torch.bfloat16, hopper)
    assert chosen == Choice("quack", LARGE)
    assert gemm.choose("residual", 1000, 1152, 4304, torch.bfloat16, hopper) == Choice("mm")


def test_choose_without_a_measurement(hopper: torch.device) -> None:
    assert gemm.choose("bias", 1296, 3456, 1152, torch.bfloat16, hopper) == Choice("addmm")
    assert gemm.choose("swiglu", 1296, 6912, 1280, torch.bfloat16, hopper) == Choice("mm")


@pytest.mark.parametrize(
    ("n", "k", "dtype"),
    [(4304, 1150, torch.bfloat16), (4300, 1152, torch.bfloat16), (4304, 1152, torch.float32)],
)
def test_choose_where_tma_cannot_run(
    hopper: torch.device, n: int, k: int, dtype: torch.dtype
) -> None:
    assert gemm.choose("gelu_tanh", 41000, n, k, dtype, hopper).implementation != "quack"


def test_choose_without_quack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_quack, "unavailable", lambda device: "not installed")
    device = torch.device("cuda", 0)
    for kind in KINDS:
        assert gemm.choose(kind, 41472, 1152, 1152, torch.bfloat16, device).tile is None
    assert compile_product(torch.empty(1152, 1152), torch.empty(1152), residual=True) == 0


def test_prepare_compiles_each_tile_once(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(gemm_quack, "compiled", lambda *key: asked.append(key))
    weight = torch.empty(4304, 1152, dtype=torch.bfloat16)
    assert compile_product(weight, torch.empty(4304), activation="gelu_tanh") == 2
    assert [key[:2] for key in asked] == [("gelu_tanh", SMALL), ("gelu_tanh", LARGE)]
    assert compile_product(weight, None, activation="gelu_tanh") == 0


def on_hopper(hopper: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """As much of a tensor on a GPU as choosing a kernel looks at."""
    size = torch.Size(shape)
    return SimpleNamespace(shape=size, ndim=len(shape), dtype=dtype, device=hopper, is_cuda=True)


def test_a_kernel_is_taken_by_all_that_it_depends_on(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A residual in another dtype than the kernel was compiled for comes after one that fits."""
    ran: list[str] = []
    monkeypatch.setattr(gemm, "_chosen", {})
    monkeypatch.setattr(gemm_quack, "compiled", lambda *key: lambda *operands: ran.append("quack"))
    monkeypatch.setattr(
        gemm_aten, "product_then_kernel", lambda kind, *operands: ran.append("cublas")
    )
    half = torch.bfloat16
    x, weight = on_hopper(hopper, (41472, 4304), half), on_hopper(hopper, (1152, 4304), half)
    bias = on_hopper(hopper, (1152,), half)
    for dtype in (torch.float32, half, torch.float32):
        residual = on_hopper(hopper, (41472, 1152), dtype)
        linear(x, weight, bias, residual=residual)
    assert ran == ["quack", "cublas", "quack"]
    with pytest.raises(AssertionError, match="must share a dtype"):
        linear(x, on_hopper(hopper, (1152, 4304), torch.float32), bias)


def test_an_e4m3_product_is_looked_up_once(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finding a tile reads a table and asks the driver: more than a launch costs."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gemm_fp8, "_products", {})
    monkeypatch.setattr(gemm_fp8, "table_for", lambda name, capability: None)
    monkeypatch.setattr(
        gemm_quack,
        "compiled",
        lambda *key: asked.append(key) or (lambda *operands, **vectors: "ran"),
    )
    e4m3 = torch.float8_e4m3fn
    weight = on_hopper(hopper, (3456, 1152), e4m3)
    for rows in (4096, 4096, 2048, 4096):
        x = on_hopper(hopper, (rows, 1152), e4m3)
        assert gemm_fp8.linear_fp8(x, weight, x, x) == "ran"
    assert [key[:3] for key in asked] == [("bias", gemm_fp8._DEFAULT_TILE, e4m3)] * 2


def test_the_cpu_adds_the_residual_in_place() -> None:
    x, weight, _, _ = problem("residual")
    assert fuses_residual(x, weight)


def test_unavailable_names_the_reason() -> None:
    assert "cpu" in str(gemm_quack.unavailable(torch.device("cpu")))
    gemm_quack._unavailable.cache_clear()
    assert "8.0" in str(gemm_quack._unavailable((8, 0)))
    assert "10.0" in str(gemm_quack._unavailable((10, 0)))


# --- on a GPU -------------------------------------------------------------------------------------

GPU_SHAPES = [(1, 1152, 1152), (1237, 4304, 1152), (517, 1152, 4304), (3083, 6912, 1280)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), GPU_SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_on_gpu(kind: Kind, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """Whatever the table chooses."""
    x, weight, bias, residual = problem(kind, m, n, k, dtype, "cuda")
    actual = linear(x, weight, bias, activation=activation_of(kind), residual=residual)
    # The product and the sum or the activation round at most twice, a bias between them once more.
    check_on_gpu(kind, actual, (x, weight, bias, residual), roundings=3)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), GPU_SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_cublas_on_gpu(kind: Kind, m: int, n: int, k: int) -> None:
    operands = problem(kind, m, n, k, torch.bfloat16, "cuda")
    check_on_gpu(kind, gemm_aten.product_then_kernel(kind, *operands), operands, roundings=3)
    if kind in ("bias", "gelu_tanh", "residual"):
        check_on_gpu(kind, gemm_aten.addmm(kind, *operands), operands, roundings=2)


QUACK_TILES = ["192x128p1x2", "128x192p1x1", "256x128c2x1", "128x96p1x1"]


@pytest.mark.gpu
@pytest.mark.parametrize("tile", QUACK_TILES)
@pytest.mark.parametrize("kind", KINDS)
def test_quack_on_gpu(kind: Kind, tile: str) -> None:
    """One rounding, at odd M, with sizes that fill no tile, into memory full of NaN."""
    device = torch.device("cuda", torch.cuda.current_device())
    reason = gemm_quack.unavailable(device)
    if reason:
        pytest.skip(reason)
    product = gemm_quack.compiled(kind, Tile.parse(tile), torch.bfloat16, device)
    for m, n, k in [*GPU_SHAPES, (77, 48, 40), (1297, 3456, 1176)]:
        operands = problem(kind, m, n, k, torch.bfloat16, "cuda")
        dtype = torch.float32 if kind == "residual" else torch.bfloat16
        width = n // 2 if kind == "swiglu" else n
        out = torch.full((m, width), float("nan"), device=device, dtype=dtype)
        actual = product(*operands, out)
        # tanh.approx and ex2.approx are good to 2^-11, an eighth of bf16's unit roundoff.
        check_on_gpu(kind, actual, operands, roundings=1, slack=2.0**-11)


@pytest.mark.gpu
@pytest.mark.parametrize("split_k", [2, 4])
def test_split_k_on_gpu(split_k: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    reason = gemm_quack.unavailable(device)
    if reason:
        pytest.skip(reason)
    tile = Tile(128, 128, True, 1, 1, split_k)
    product = gemm_quack.compiled("residual", tile, torch.bfloat16, device)
    operands = problem("residual", 1297, 1152, 4304, torch.bfloat16, "cuda")
    first = product(*operands)
    check_on_gpu("residual", first, operands, roundings=1)
    assert torch.equal(product(*operands), first), "the serial order of the splits is fixed"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_captured_in_graphs(kind: Kind) -> None:
    operands = problem(kind, 1296, 4608, 1152, torch.bfloat16, "cuda")
    x, weight, bias, residual = operands
    activation = activation_of(kind)

    def run() -> Tensor:
        return linear(x, weight, bias, activation=activation, residual=residual)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, run())


@pytest.mark.gpu
def test_no_product_waits_for_the_gpu() -> None:
    problems = [(kind, problem(kind, 1296, 4608, 1152, torch.bfloat16, "cuda")) for kind in KINDS]
    for attempt in range(2):
        if attempt:  # the first round compiles
            torch.cuda.set_sync_debug_mode("error")
        try:
            for kind, (x, weight, bias, residual) in problems:
                linear(x, weight, bias, activation=activation_of(kind), residual=residual)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def check_on_gpu(
    kind: Kind,
    actual: Tensor,
    operands: tuple[Tensor, Tensor, Tensor, Tensor | None],
    *,
    roundings: int,
    slack: float = 0.0,
) -> None:
    """`roundings` to the dtype of x; a sum with the residual stays float32."""
    x, _, _, residual = operands
    reference = expected(kind, *operands)
    wide = x.dtype if residual is None else residual.dtype
    assert actual.shape == reference.shape and actual.dtype == wide
    assert relative_error(actual, reference) < tolerance(x.dtype, x.shape[1], roundings) + slack


# --- the tuner's selection ------------------------------------------------------------------------


@pytest.fixture
def selection(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts" / "tune"))
    return importlib.import_module("gemm_selection")


def test_tiles_that_win_too_little_are_dropped(selection: ModuleType) -> None:
    rows = [
        {"mm": 10.0, "quack a": 8.0, "quack b": 7.95, "quack c": 9.0},
        {"mm": 5.0, "quack a": 5.5, "quack b": 6.0, "quack c": 4.96},
    ]
    # a is the best nowhere; c wins 0.8% over mm in one row; without b the first row loses 13%.
    assert selection.keep_few(rows, 0.015) == {"mm", "quack b"}
    assert selection.keep_few(rows, 0.007) == {"mm", "quack b", "quack c"}


def test_the_written_table_reads_back(selection: ModuleType, tmp_path: Path) -> None:
    raw = {
        "device": "NVIDIA H200",
        "capability": [9, 0],
        "products": {
            "bias 3456 1152": {
                "4000": {"addmm": 50.0, "quack 128x192p1x1": 40.0},
                "64": {"addmm": 5.0, "quack 128x192p1x1": 6.0},
            },
            "residual 1152 1152": {"64": {"mm": 5.0}},
        },
    }
    path = tmp_path / "table.json"
    selection.summary(selection.write_table(path, raw, 0.01))
    table = Table.parse(json.loads(path.read_text()))
    assert (table.device, table.capability) == ("NVIDIA H200", (9, 0))
    assert table.choices == {
        Product("bias", 3456, 1152): [
            (64, Choice("addmm")),
            (4000, Choice("quack", SMALL)),
        ],
        Product("residual", 1152, 1152): [(64, Choice("mm"))],
    }
