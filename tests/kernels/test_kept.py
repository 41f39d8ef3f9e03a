"""Kernels kept in a form that loads without their compilers: what is loaded, and what is not."""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.products import activation_of
from vitrt.kernels import gemm_fp8, gemm_kept, gemm_quack, kept
from vitrt.kernels.gemm import linear
from vitrt.kernels.gemm_table import KINDS, Kind, Tile

pytest.importorskip("fcntl")
COMPILER = shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs gcc")
TILE = Tile(128, 192, True, 2, 1)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for kernels, and stand-ins for both packages, which call by ctypes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tvm_ffi, cutlass = ModuleType("tvm_ffi"), ModuleType("cutlass")
    cute, runtime = ModuleType("cutlass.cute"), ModuleType("cutlass.cute.runtime")
    tvm_ffi.load_module = lambda path: ctypes.CDLL(path)
    runtime.find_runtime_libraries = lambda enable_tvm_ffi: []
    for module in (tvm_ffi, cutlass, cute, runtime):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    kept._folder.cache_clear()
    yield tmp_path
    kept._folder.cache_clear()


@pytest.fixture
def object_file(tmp_path: Path) -> Path:
    source, compiled = tmp_path / "kernel.c", tmp_path / "kernel.o"
    source.write_text("int func(int x) { return 3 * x; }")
    assert COMPILER is not None
    subprocess.run([COMPILER, "-c", "-fPIC", "-o", str(compiled), str(source)], check=True)
    return compiled


@needs_compiler
def test_what_is_kept_is_loaded(home: Path, object_file: Path) -> None:
    assert kept.load("product", "a") is None and not kept.any_of("product")
    kept.keep("product", "a", lambda: (object_file, {"fields": ["bias"]}))
    function, description = kept.load("product", "a")
    assert function(14) == 42 and description == {"fields": ["bias"]}
    assert kept.any_of("product") and not kept.any_of("fa4")
    assert kept.load("product", "b") is None and kept.load("fa4", "a") is None
    (folder,) = (home / "vitrt" / "linked").iterdir()
    assert folder.stat().st_mode & 0o077 == 0 and len(list(folder.iterdir())) == 1


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_file_is_never_loaded_and_made_anew(
    damage: str, home: Path, object_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept.keep("product", "a", lambda: (object_file, {}))
    path = kept._path("product", "a")
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    path.write_bytes({"cut": whole[:-100], "changed": bytes(changed), "empty": b""}[damage])
    assert kept.load("product", "a") is None and "damaged" in caplog.text
    kept.keep("product", "a", lambda: (object_file, {}))
    assert kept.load("product", "a")[0](2) == 6


@needs_compiler
def test_another_release_or_another_text_finds_nothing(
    home: Path, object_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.keep("product", "a", lambda: (object_file, {}))
    kept._folder.cache_clear()
    assert kept.load("product", "a") is not None
    monkeypatch.setattr(kept, "_PACKAGES", ("pytest",))
    kept._folder.cache_clear()
    assert kept.load("product", "a") is None


def test_what_cannot_be_linked_is_not_kept(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="vitrt.kernels.kept")
    kept.keep("product", "a", lambda: (home / "missing.o", {}))
    assert kept.load("product", "a") is None and "not kept" in caplog.text


@needs_compiler
def test_internals_that_moved_cost_a_kept_kernel_and_nothing_else(
    home: Path, object_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="vitrt.kernels.kept")
    for name in ("quack", "quack.gemm_config"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    gemm_kept.keep("bias", TILE, torch.bfloat16, object())  # no SplitKMode, no plan
    assert not gemm_kept.any_kept() and "SplitKMode" in caplog.text
    kept.keep("product", "a", lambda: None)
    assert kept.load("product", "a") is None


# --- the first launch is held against the host ----------------------------------------------------


def right(kind: Kind, **given: Tensor) -> Tensor:
    if "scale" not in given:
        return linear(
            given["x"], given["weight"], given["bias"],
            activation=activation_of(kind), residual=given.get("residual"),
        )  # fmt: skip
    return gemm_fp8.linear_fp8_ref(**given, activation=activation_of(kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_used_if_its_numbers_are_right(
    kind: Kind, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    if dtype == torch.float8_e4m3fn and kind == "gelu":
        pytest.skip("no such product")
    cpu = torch.device("cpu")

    def product(**given: Tensor) -> Tensor:
        return right(kind, **given)

    def without_bias(**given: Tensor) -> Tensor:
        return right(kind, **{**given, "bias": torch.zeros_like(given["bias"])})

    assert gemm_kept.is_right(product, kind, TILE, dtype, cpu) and not caplog.text
    assert not gemm_kept.is_right(without_bias, kind, TILE, dtype, cpu)
    assert "wrong numbers" in caplog.text


def test_a_launch_that_raises_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    def product(**given: Tensor) -> Tensor:
        raise TypeError("Expects 10 parameters")

    cpu = torch.device("cpu")
    assert not gemm_kept.is_right(product, "bias", TILE, torch.bfloat16, cpu)
    assert "Expects 10" in caplog.text


def test_arguments_of_a_launch() -> None:
    calls: list[tuple[Any, ...]] = []
    description = {"fields": ["bias", "split_k_semaphore", "split_k_workspace"],
                   "persistent": True, "swizzle": 8}  # fmt: skip
    tile = TILE._replace(split_k=2)
    launch = gemm_kept._Launch(lambda *args: calls.append(args), description, tile,
                               torch.device("cpu"))  # fmt: skip
    x, weight, out, bias = (
        torch.zeros(shape) for shape in ((300, 8), (200, 8), (300, 200), (200,))
    )
    launch(x, weight, out, None, {"bias": bias, "out": out})
    (given,) = calls
    assert given[:4] == (x, weight, out, None)
    epilogue, scheduler = given[4:6]
    assert epilogue[0] is bias and scheduler == (1, None, 8, None, None, None)
    assert given[6:] == (None, None, None)
    # Three tiles of 128 rows are four in clusters of two, two of 192 columns stay two.
    assert epilogue[1].shape == (4, 2, 1) and not epilogue[1].any()
    assert epilogue[2].shape == (128 * 192, 4, 2, 1) and epilogue[2].stride(0) == 1


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", ["128x128p2x1", "128x192p1x1", "128x128p1x1/2"])
def test_a_kept_product_is_the_same_on_gpu(kind: Kind, dtype: torch.dtype, tile: str) -> None:
    """It is the same machine code: no bit may differ."""
    device = torch.device("cuda", torch.cuda.current_device())
    parsed, e4m3 = Tile.parse(tile), dtype == torch.float8_e4m3fn
    reason = gemm_quack.unavailable(device)
    if reason or (e4m3 and kind == "gelu") or (parsed.split_k > 1 and kind != "residual"):
        pytest.skip(reason or "no such product")
    made = gemm_quack._made(kind, parsed, dtype, device)
    found = gemm_quack._kept(kind, parsed, dtype, device)
    assert found is not None, "not kept, or it computes something else"
    torch.manual_seed(0)
    m, n, k = 1297, 1152, 4304
    given = {
        "x": torch.randn(m, k, device=device).to(dtype),
        "weight": (torch.randn(n, k, device=device) / k**0.5).to(dtype),
        "bias": torch.randn(n, device=device).to(torch.float32 if e4m3 else dtype),
    }
    if kind == "residual":
        given["residual"] = torch.randn(m, n, device=device)
    if e4m3:
        given["scale"] = torch.rand(n, device=device) + 0.5
        if kind in gemm_quack.TO_E4M3:
            given["out_scale"] = torch.rand(n, device=device) + 0.5
    first, second = made(**given), found(**given)
    assert first.dtype == second.dtype and torch.equal(first.float(), second.float())
