"""The candidates in scripts/tune compute what today's forward does: nothing else runs them here."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.interpreter import interpreted
from vitrt.bench.workloads import Workload
from vitrt.kernels.gemm import linear_ref
from vitrt.kernels.segments import Rotary, Segments, tile_list
from vitrt.kernels.window_attention import window_attention_ref

TUNE = Path(__file__).resolve().parents[1] / "scripts" / "tune"
pytestmark = interpreted


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


@pytest.mark.parametrize("model", ["qwen3-vl-8b", "qwen2.5-vl-7b"])
def test_folded_norms_give_the_same_features(tune, model: str):
    folded, turns = tune("folded_norm"), tune("tower_turns")
    with torch.inference_mode():
        config = turns.config_named(model, tiny=True)
        tower = turns.random_tower(config, torch.device("cpu"), torch.float32)
        batch = turns.Batch(tower, Workload("two", ((1, 6, 4), (1, 10, 8))))
        folding = folded.Folding(tower, folded.Kernels(torch.device("cpu")))
        changes = {"today": lambda tower: nullcontext()}
        for way in ("add", "fold"):
            changes[way] = partial(folding.changed, way, way)
        found = turns.take_turns(batch, changes)
        assert found["fold"].off < 5e-6 and found["add"].off < 5e-6
        # What is folded matters: without a norm's own weights all would be another.
        for linear_and_norm, vectors in folding.vectors.items():
            wrong = folded.Vectors(vectors.bias + 1, vectors.columns)
            folding.vectors[linear_and_norm] = wrong
        assert turns.take_turns(batch, changes)["fold"].off > 1e-3


def test_a_small_image_keeps_its_features(tune, monkeypatch: pytest.MonkeyPatch):
    small, turns = tune("small_image"), tune("tower_turns")
    # The interpreter takes its time by programs and steps.
    monkeypatch.setattr(small, "PLAIN", small.few_rows.Shape(64, 256, 256))
    with torch.inference_mode():
        config = turns.config_named("qwen3-vl-8b", tiny=True)
        config = replace(config, depth=1, deepstack_visual_indexes=(0,))
        tower = turns.random_tower(config, torch.device("cpu"), torch.float32)
        batch = turns.Batch(tower, Workload("one", ((1, 4, 6),)), bucket=64)
        on = frozenset({"attention", "residual", "products", "mergers"})
        changes = {
            "today": lambda tower: nullcontext(),
            "all": partial(small.Small(tower, True).changed, on),
        }
        found = turns.take_turns(batch, changes)
        assert found["all"].off < 5e-6 and found["all"].error < 1e-5


@pytest.mark.parametrize("centred", [True, False])
def test_row_scales(tune, centred: bool):
    folded = tune("folded_norm")
    x = torch.randn(70, 96, generator=torch.Generator().manual_seed(0)) + 0.5
    tiles = x.view(70, 3, 32)
    sums, squares = tiles.sum(dim=2), (tiles * tiles).sum(dim=2)
    sums = sums if centred else None
    for function in (folded.row_scale, folded.row_scale_ref):  # interpreted, and plain
        inverse, mean = function(sums, squares, 96)
        variance = x.var(dim=1, correction=0) if centred else (x * x).mean(dim=1)
        expected = torch.rsqrt(variance + 1e-6)
        torch.testing.assert_close(inverse, expected, rtol=1e-5, atol=0)
        if centred:
            torch.testing.assert_close(mean, x.mean(dim=1) * expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", ["bias", "gelu_tanh", "quick_gelu", "gelu", "swiglu", "shares"])
def test_products_of_few_rows(tune, kind: str, turned: bool):
    few = tune("few_rows")
    generator = torch.Generator().manual_seed(0)
    m, n, k = 19, 38, 150
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((m, k), (n, k), (n,)))
    shape = few.Shape(16, 32, 64, 3 if kind == "shares" else 1, turned)
    out = few.product(kind, x, weight, bias, shape)
    if kind == "shares":
        assert out.shape == (3, m, n)
        out, expected = out.sum(dim=0), x @ weight.t()
    else:
        activation: Any = None if kind == "bias" else kind
        expected = linear_ref(x, weight, bias, activation=activation)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("centred", [True, False])
def test_sum_and_norm(tune, centred: bool):
    few = tune("few_rows")
    generator = torch.Generator().manual_seed(0)
    shares, residual = (torch.randn(*s, generator=generator) for s in ((3, 5, 144), (5, 144)))
    bias, weight, shift = torch.randn(3, 144, generator=generator)
    total = residual + shares.sum(dim=0) + bias
    out = few.sum_norm(shares, bias, residual, weight, shift if centred else None, 1e-6)
    if centred:
        expected = torch.nn.functional.layer_norm(total, (144,), weight, shift, 1e-6)
    else:
        expected = torch.nn.functional.rms_norm(total, (144,), weight, 1e-6)
    torch.testing.assert_close(residual, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 72, 80])
@pytest.mark.parametrize("tiled", [True, False])
def test_small_attention(tune, head_dim: int, tiled: bool):
    few = tune("few_rows")
    generator = torch.Generator().manual_seed(0)
    bounds = np.array([0, 5, 75], np.int32)
    qkv = torch.randn(80, 3, 1, head_dim, generator=generator)
    qkv[75:] = float("nan")  # padding
    angles = torch.rand(9, head_dim // 4, generator=generator) * 3
    positions = torch.randint(0, 9, (80, 2), dtype=torch.int32, generator=generator)
    rotary = Rotary(positions, angles.cos(), angles.sin())
    tiles = torch.tensor(tile_list(bounds)) if tiled else None
    count = torch.tensor([2], dtype=torch.int32)
    segments = Segments(torch.tensor(bounds), count, tiles, count if tiled else None, (5, 70), 70)
    expected = window_attention_ref(qkv, segments, rotary, torch.zeros(80, head_dim))[:75]
    out = few.attention(qkv, segments, rotary, keys=32)[:75]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_tables_keep_what_was_not_measured_again(tune, tmp_path: Path):
    selection = tune("gemm_selection")
    path = tmp_path / "table.json"
    shutil.copy(TUNE.parents[1] / "vitrt/kernels/gemm_tables/h200.json", path)
    before = json.loads(path.read_text())
    products = {"quick_gelu 5120 1280": {"64": {"mm": 5.0, "quack 128x128p1x1": 4.0}}}
    products["gelu_tanh 4304 1152"] = {"64": {"addmm": 1.0, "mm": 2.0}}
    facts = {key: value for key, value in before.items() if key != "products"}
    selection.write_table(path, facts | {"products": products}, 0.01)

    def by_product(table: dict[str, Any]) -> dict[tuple[Any, ...], Any]:
        return {selection._product(entry): entry["rows"] for entry in table["products"]}

    was, now = by_product(before), by_product(json.loads(path.read_text()))
    assert [row["use"] for row in now["quick_gelu", 5120, 1280, None]] == ["quack 128x128p1x1"]
    assert len(now["gelu_tanh", 4304, 1152, None]) == 1
    for product in was.keys() - {("gelu_tanh", 4304, 1152, None)}:
        assert now[product] == was[product]
    assert {product[-1] for product in now} == {None, "e4m3"}
    # Nor does a table change that is written with nothing new.
    selection.write_products(path, facts, before["products"])
    assert path.read_text() == (TUNE.parents[1] / "vitrt/kernels/gemm_tables/h200.json").read_text()
    with pytest.raises(ValueError, match=r"of NVIDIA H200, this was measured on NVIDIA H100"):
        selection.write_table(path, facts | {"device": "NVIDIA H100", "products": {}}, 0.01)
