"""What scripts/tune write into the tables, and the shapes that they try."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.attention_cases import dense_reference
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


def test_variants_of_the_flash_kernel_say_what_they_are(tune):
    variants = tune("fa4_variants")
    parsed = variants.Variant.parse("192x112rn/3+free+lazy+poly4+pers+narrow")
    assert parsed == variants.Variant(192, 112, True, False, 3, False, True, 4, True, True)
    assert variants.Variant.parse(variants.DEFAULT) == variants.Variant(192, 144, False, True)
    for head_dim in (72, 80):
        for name in variants.variants_of(head_dim):
            variant = variants.Variant.parse(name)
            assert variant.shared_memory(head_dim) <= 226 * 1024, name
            assert variant.rows % 64 == 0 and variant.keys % 16 == 0, name
    for wrong in ("192x112", "192x112r+poly4", "192x112r+pers+lazy"):
        with pytest.raises(ValueError, match=re.escape(wrong)):
            variants.Variant.parse(wrong)


def test_variants_are_checked_against_float32(tune, monkeypatch, capsys):
    runs = tune("fa4_runs")
    monkeypatch.setattr(runs, "CHECK", [17, 3, 1, 2, 40])
    monkeypatch.setattr(runs, "SHAPES", ())

    def loaded(folder: Path, name: str):
        def attend(qkv, bounds, longest, out) -> None:
            out.copy_(dense_reference(qkv, bounds.diff().tolist()).view(out.shape))
            if name.endswith("wrong"):
                out[5] += 1

        return attend

    monkeypatch.setattr(runs, "loaded", loaded)
    runs.measure(Path(), ["80:right", "80:wrong"], {"80:known"}, 9.0)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    errors = {line["checked"]: line["relative"] for line in said if "checked" in line}
    assert errors["80:right"] < 0.004 < 0.1 < errors["80:wrong"]


_CHILD = """
import json, sys, time
for name in sys.argv[1].split(","):
    print(json.dumps({"begin": name}), flush=True)
    if name == "80:hangs": time.sleep(60)
    if name == "80:faults": sys.exit("illegal address")
    print(json.dumps({"checked": name, "relative": 0.002, "largest": 0.01}), flush=True)
print(json.dumps({"timed": "80:1x1296", "us": {"80:fine": 100.0, "product": 2000.0}}), flush=True)
"""


def test_a_variant_that_hangs_or_faults_costs_itself_alone(tune, monkeypatch):
    tiles = tune("fa4_tiles")
    monkeypatch.setattr(tiles, "_SILENT", 1.0)
    asked = []

    def child(what: str, names: list[str], folder: Path, checked: str, limit: str):
        asked.append((names, checked))
        return subprocess.Popen(
            [sys.executable, "-c", _CHILD, ",".join(names)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    monkeypatch.setattr(tiles, "child", child)
    names = ["80:fine", "80:hangs", "80:faults"]
    found = tiles.run_all(Path(), names, time.monotonic() + 60)
    assert asked == [
        (["80:fine", "80:hangs", "80:faults"], ""),
        (["80:fine", "80:faults"], "80:fine"),
        (["80:fine"], "80:fine"),
    ]
    assert found["failed"] == {"80:hangs": "hangs", "80:faults": "illegal address"}
    table = tiles.table({"80:fine": {"spilled": 8}}, found, 80, ["fine", "hangs"])
    assert table.splitlines()[1].split() == ["fine", "86.0", "0.0020", "0.0100", "8", "-"]
    assert table.splitlines()[2].split() == ["hangs", "-", "-", "-", "hangs"]
    assert table.splitlines()[3].split() == ["product", "549.8", "-", "-"]
