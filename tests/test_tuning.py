"""What scripts/tune write into the tables, and the shapes that they try."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.interpreter import interpreted
from vitrt.kernels.gemm_table import SplitTile

TUNE = Path(__file__).resolve().parents[1] / "scripts" / "tune"


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch):
    """Imports a program of scripts/tune."""
    monkeypatch.syspath_prepend(TUNE)

    def load(name: str) -> ModuleType:
        return __import__(name)

    yield load
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == TUNE:
            del sys.modules[name]


def test_shares_go_into_the_table(tune, tmp_path: Path):
    few = tune("few_rows")
    path = tmp_path / "table.json"
    shutil.copy(TUNE.parents[1] / "vitrt/kernels/gemm_tables/h200.json", path)
    before = json.loads(path.read_text())
    tile = SplitTile.parse("64x32x64/3w4s4")
    found = {
        (1280, 1280, 64): few.Found(10.0, tile, 5.0),
        (1280, 1280, 128): few.Found(10.0, tile, 9.9),  # not worth a kernel
        (1280, 3456, 96): few.Found(10.0, tile, 9.0),  # rows that the table lacks
        (1152, 1152, 64): few.Found(10.0, tile, 9.9),  # shares that it has
        (1280, 1280, 192): few.Found(99.0, tile, 20.0),  # quack is faster
    }
    few.write_shares(path, found)
    after = json.loads(path.read_text())
    changed = {
        (entry["n"], entry["k"], row["m"]): row["use"]
        for entry, old in zip(after["products"], before["products"], strict=True)
        for row in entry["rows"]
        if row not in old["rows"]
    }
    assert changed == {
        (1280, 1280, 64): f"split {tile}",
        (1280, 3456, 96): f"split {tile}",
        (1152, 1152, 64): "mm",
    }
    rows = next(e["rows"] for e in after["products"] if e["k"] == 3456 and e["kind"] == "residual")
    assert [row["m"] for row in rows] == sorted(row["m"] for row in rows)


@interpreted
def test_every_shape_that_is_tried_is_right(tune):
    few = tune("few_rows")
    x, weight = torch.randn(70, 96), torch.randn(40, 96)
    for tile in few.candidates(64, 40, 2)[:4]:
        shares = few.split_product(x, weight, tile)
        torch.testing.assert_close(shares.sum(dim=0), x @ weight.t(), rtol=1e-5, atol=2e-5)


def test_one_tile_is_the_cheapest_over_all_rows(tune):
    one = tune("one_tile")
    few = {"mm": 10.0, "quack 128x96p1x1": 11.0, "quack 128x192p1x1": 14.0}
    many = {"mm": 90.0, "quack 128x96p1x1": 99.0, "quack 128x192p1x1": 80.0}
    few |= {"quack 128x128p1x1/2": 10.0, "quack 64x128p1x1": 10.0}  # in parts; at few rows alone
    many |= {"quack 128x128p1x1/2": 80.0}
    tile, cost = one.cheapest_tile([few, many])
    assert str(tile) == "128x96p1x1" and cost == pytest.approx((11 / 10 + 99 / 80) / 2)


def test_tables_keep_what_was_not_measured_again(tune, tmp_path: Path):
    selection = tune("gemm_selection")
    path = tmp_path / "table.json"
    shutil.copy(TUNE.parents[1] / "vitrt/kernels/gemm_tables/h200.json", path)
    before = json.loads(path.read_text())
    facts = {key: value for key, value in before.items() if key != "products"}
    products = {"quick_gelu 5120 1280": {"64": {"mm": 5.0, "quack 128x128p1x1": 4.0}}}
    products["gelu_tanh 4304 1152"] = {"64": {"addmm": 1.0, "mm": 2.0}}
    products["residual 1152 1152"] = {"64": {"mm": 1.0}, "128": {"mm": 1.0}}
    products["residual 1024 1024"] = {"128": {"mm": 1.0}, "256": {"mm": 1.0}}  # 192 has shares
    selection.write_table(path, facts | {"products": products}, 0.01)

    def by_product(table: dict[str, Any]) -> dict[tuple[Any, ...], Any]:
        return {selection._product(entry): entry["rows"] for entry in table["products"]}

    after = json.loads(path.read_text())
    one_tiles = [
        {selection._product(e): e["one_tile"] for e in table["products"] if "one_tile" in e}
        for table in (before, after)
    ]
    assert one_tiles[0] == one_tiles[1] and one_tiles[1]["gelu_tanh", 4304, 1152, None]
    was, now = by_product(before), by_product(after)
    assert [row["use"] for row in now["quick_gelu", 5120, 1280, None]] == ["quack 128x128p1x1"]
    assert len(now["gelu_tanh", 4304, 1152, None]) == 1
    uses = [row["use"] for row in now["residual", 1152, 1152, None]]
    assert uses == [was["residual", 1152, 1152, None][0]["use"], "mm"], "shares of K stay"
    rows = {row["m"]: row["use"] for row in now["residual", 1024, 1024, None]}
    assert list(rows) == [64, 128, 192, 256] and rows[192] == "split 64x64x128/2w4s3"
    again = {("residual", 1152, 1152, None), ("residual", 1024, 1024, None)}
    again.add(("gelu_tanh", 4304, 1152, None))
    for product in was.keys() - again:
        assert now[product] == was[product]
    assert {product[-1] for product in now} == {None, "e4m3"}
    # Nor does a table change that is written with nothing new.
    selection.write_products(path, facts, before["products"])
    assert path.read_text() == (TUNE.parents[1] / "vitrt/kernels/gemm_tables/h200.json").read_text()
    with pytest.raises(ValueError, match=r"of NVIDIA H200, this was measured on NVIDIA H100"):
        selection.write_table(path, facts | {"device": "NVIDIA H100", "products": {}}, 0.01)
