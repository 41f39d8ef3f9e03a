"""The longer tests in scripts/, at a size that fits here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_damaged_images(tiny_qwen3_vl: Path, tmp_path: Path) -> None:
    where = ("--checkpoint", tiny_qwen3_vl, "--folder", tmp_path)
    assert "300 damaged images: " in run("mutation_test.py", "--images", 300, *where)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_folder(tmp_path: Path) -> None:
    run("memory_test.py", "--images", 2000, 20_000, "--folder", tmp_path)


def test_end_to_end_rate() -> None:
    out = run("bench_end_to_end.py", "--tiny", "--images", 20, "--size", "90x60", "--workers", 1)
    assert "of the device's" in out
