"""Products that quack compiles in its worker processes, by a stand-in for quack."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vitrt.kernels import ahead_products, gemm_quack
from vitrt.kernels.ahead_products import has_quack, products_in_processes
from vitrt.kernels.gemm_table import Tile

TILES = [Tile.parse(text) for text in ("128x192p1x2", "192x128p1x1", "128x128p1x1")]


class Pending(BaseException):
    """As quack's: no `except Exception` is to hold it up."""


@pytest.fixture
def quack(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: dict[str, dict[str, Any]] = {
        "quack": {},
        "quack.cache": {"CompilePending": Pending, "pool_scope": nullcontext},
        "quack.gemm_runtime": {},
        "quack.gemm_runtime.host": {"run_gemm_epi_plan": lambda *args: None},
    }
    for name, members in parts.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


def test_all_are_there_at_the_end_and_none_is_waited_for(
    quack: None, monkeypatch: pytest.MonkeyPatch
):
    asked: dict[Tile, int] = {}

    def compiled(kind: str, tile: Tile, dtype: torch.dtype, device: torch.device) -> str:
        asked[tile] = asked.get(tile, 0) + 1
        if asked[tile] < 3:
            raise Pending
        return "compiled"

    monkeypatch.setattr(gemm_quack, "compiled", compiled)
    x, weight, bias = torch.ones(8, 16), torch.ones(32, 16), torch.ones(32)
    with products_in_processes():
        for tile in TILES:
            product = gemm_quack.compiled("gelu", tile, torch.float32, torch.device("cpu"))
            assert product(x, weight, bias).shape == (8, 32)
        assert asked == dict.fromkeys(TILES, 1)
    assert asked == dict.fromkeys(TILES, 3)
    assert gemm_quack.compiled is compiled


def test_one_that_does_not_compile_is_said(quack: None, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def compiled(*product: Any) -> None:
        asked.append(product)
        if len(asked) == 1:
            raise Pending
        raise ValueError("no such tile")

    monkeypatch.setattr(gemm_quack, "compiled", compiled)
    with pytest.raises(ValueError, match="no such tile"), products_in_processes():
        gemm_quack.compiled("gelu", TILES[0], torch.float32, torch.device("cpu"))


def test_a_folder_of_its_name_is_not_quack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`python -m vitrt compile` looks for packages in the current folder first."""
    before = has_quack()
    folder = tmp_path / "quack"
    folder.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert has_quack() == before
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)  # which forgets what was found
    assert has_quack()


def test_processes_that_compile_nothing_are_not_waited_for(
    quack: None, monkeypatch: pytest.MonkeyPatch
):
    inside, here = [True], []

    def compiled(*product: Any) -> str:
        if inside[0]:
            raise Pending
        here.append(product[1])
        return "compiled"

    class Pool(nullcontext[None]):
        def __exit__(self, *error: object) -> None:
            inside[0] = False

    monkeypatch.setattr(sys.modules["quack.cache"], "pool_scope", Pool)
    monkeypatch.setattr(gemm_quack, "compiled", compiled)
    monkeypatch.setattr(ahead_products, "_PATIENCE", 0.3)
    with products_in_processes():
        for tile in TILES:
            gemm_quack.compiled("gelu", tile, torch.float32, torch.device("cpu"))
    assert here == TILES
