"""The longer tests in scripts/, at a size that fits here."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def start(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def run(script: str, *arguments: object) -> str:
    done = start(script, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("folder", ["scripts", "examples"])
def test_what_programs_import_exists(folder: str) -> None:
    """Most of them need a GPU, so nothing else runs them here."""
    programs = sorted((ROOT / folder).rglob("*.py"))
    assert programs
    for program in programs:
        for node in ast.walk(ast.parse(program.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vitrt"):
                try:
                    module = importlib.import_module(str(node.module))
                    for alias in node.names:
                        if not hasattr(module, alias.name):  # then a module of the package
                            importlib.import_module(f"{node.module}.{alias.name}")
                except ModuleNotFoundError as error:  # of extras that tests do without
                    assert error.name in ("ray", "quack"), error


def test_the_demo_needs_no_test_package(tmp_path: Path) -> None:
    """It is installed with the extra `demo`, which brings none of them."""
    blocked = ["pytest", "hypothesis", "sentence_transformers", "ray", "pyarrow", "pandas"]
    for script, arguments in (
        ("make_checkpoint.py", [tmp_path / "checkpoint"]),
        ("demo.py", ["photos", tmp_path / "photos"]),
    ):
        program = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({blocked}))
sys.argv = {[script, *map(str, arguments)]}
runpy.run_path({str(ROOT / "scripts" / script)!r}, run_name="__main__")
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert any((tmp_path / "checkpoint").glob("*.safetensors"))
    assert any((tmp_path / "photos").iterdir())


def test_damaged_images(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    where = ("--checkpoint", tiny_qwen3_vl, "--folder", tmp_path)
    assert "300 damaged images: " in run("stress/damaged_images.py", "--images", 300, *where)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_folder(tmp_path: Path) -> None:
    run("stress/memory.py", "--images", 1000, 10_000, "--folder", tmp_path)


def test_video_rate(tiny_qwen3_vl: Path) -> None:
    size = ("--height", 120, "--width", 160, "--seconds", 2, "--clips", 2, "--rounds", 1)
    out = run("bench/video.py", tiny_qwen3_vl, "--device", "cpu", *size)
    assert "stream reaches" in out


TINY = ("--tiny", "--models", "qwen3-vl-8b", "--workloads", "1x64,mixed16", "--seconds", 0.01)


def test_two_checkouts_take_turns(tmp_path: Path) -> None:
    file = tmp_path / "both.json"
    options = (*TINY, "--pairs", 2, "--rounds", 3, "--json", file)
    out = run("bench/old_new.py", ROOT, *options)
    assert out.count("bit-equal") == 2
    for row in json.loads(file.read_text())["rows"]:
        for side in ("old", "new"):
            assert len(row["figures"][side]["wall_ms"]) == 6
            assert row["outputs"][side]["error"] < 1e-5
        assert row["ratios"]["rate_ms"] > 0


def test_a_checkout_that_cannot_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "vitrt").mkdir()
    (tmp_path / "vitrt" / "__init__.py").write_text("__version__ = '0'\n")
    done = start("bench/old_new.py", tmp_path, *TINY)
    assert done.returncode == 1
    assert "failed: old: AttributeError" in done.stderr and "VisionEncoder" in done.stderr
