"""The longer tests in scripts/, at a size that fits here."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.scripts import run_script

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *arguments: object) -> str:
    """As a user runs it: what it prints."""
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
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
    commands = [
        ("make_checkpoint.py", str(tmp_path / "checkpoint")),
        ("demo.py", "photos", str(tmp_path / "photos")),
    ]
    program = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({blocked}))
for name, *arguments in {commands}:
    sys.argv = [name, *arguments]
    runpy.run_path({str(ROOT / "scripts")!r} + "/" + name, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "checkpoint").glob("*.safetensors"))
    assert any((tmp_path / "photos").iterdir())


def test_damaged_images(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    where = ("--checkpoint", tiny_qwen3_vl, "--folder", tmp_path)
    assert "300 damaged images: " in run("stress/damaged_images.py", "--images", 300, *where)


def test_memory_does_not_grow_with_the_folder(tmp_path: Path) -> None:
    assert run_script("stress/memory.py", "--images", 1000, 10_000, "--folder", tmp_path) == 0


def test_video_rate(tiny_qwen3_vl: Path) -> None:
    size = ("--height", 120, "--width", 160, "--seconds", 2, "--clips", 2, "--rounds", 1)
    out = run("bench/video.py", tiny_qwen3_vl, "--device", "cpu", *size)
    assert "stream reaches" in out


TINY = ("--tiny", "--models", "qwen3-vl-8b", "--workloads", "1x64,mixed16", "--seconds", 0.01)


def test_two_checkouts_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "both.json"
    options = (*TINY, "--pairs", 2, "--rounds", 3, "--json", file)
    assert run_script("bench/old_new.py", ROOT, *options) == 0
    assert capsys.readouterr().out.count("bit-equal") == 2
    for row in json.loads(file.read_text())["rows"]:
        for side in ("old", "new"):
            assert len(row["figures"][side]["wall_ms"]) == 6
            assert row["outputs"][side]["error"] < 1e-5
        assert row["ratios"]["rate_ms"] > 0


def test_a_checkout_that_cannot_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "vitrt").mkdir()
    (tmp_path / "vitrt" / "__init__.py").write_text("__version__ = '0'\n")
    assert run_script("bench/old_new.py", tmp_path, *TINY) == 1
    said = capsys.readouterr().err
    assert "failed: old: AttributeError" in said and "VisionEncoder" in said
