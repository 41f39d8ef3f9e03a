"""`vitrt compile` fills the folders with what a process on the GPU will ask for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import Vitrt, vitrt
from vitrt.kernels.dispatch import HAVE_TRITON

__all__ = ["vitrt"]  # a fixture

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(not HAVE_TRITON, reason="needs Triton")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "HOME": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        env=environment,
        cwd=ROOT,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-4000:]
    return out


def kept(folder: Path) -> dict[str, int]:
    """Every kernel on disk, by its file, and when it was written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in (folder / "triton").rglob("*.cubin")
    }


@needs_triton
def test_two_at_once_and_a_third_that_finds_all(tiny_qwen2_5_vl: Path, tmp_path: Path):
    arguments = ("vitrt", "compile", str(tiny_qwen2_5_vl), "--arch", "86")
    for process in [start(tmp_path, *arguments) for _ in range(2)]:
        finish(process)
    before = kept(tmp_path)
    names = {Path(file).stem for file in before}
    assert names >= {"_window_kernel", "_flash_kernel", "_rope_kernel", "_norm_kernel"}
    said = finish(start(tmp_path, *arguments))
    assert kept(tmp_path) == before
    assert f": {len(before)} Triton kernels" in said and "sm_86" in said
    if shutil.which("gcc") is None:
        return
    # What Triton has a C compiler make, linked against a driver that this machine need not have.
    made = list((tmp_path / "triton").rglob("*.so"))
    assert "cuda_utils" in {path.name.partition(".")[0] for path in made}
    assert all(b"libcuda.so.1" in path.read_bytes() for path in made)


@needs_triton
def test_a_launch_on_real_tensors_finds_what_was_compiled_on_those_without_memory(tmp_path: Path):
    """Else the first process on a GPU would compile all anew, under other keys."""
    compiled = json.loads(finish(start(tmp_path, "tests.support.launch_kernels", "ahead")))
    before = kept(tmp_path)
    assert len(compiled) == len(before) > 3
    asked_for = json.loads(finish(start(tmp_path, "tests.support.launch_kernels", "real")))
    assert asked_for == compiled and kept(tmp_path) == before


def test_refusals(vitrt: Vitrt, tiny_qwen3_vl: Path):
    done = vitrt("compile", str(tiny_qwen3_vl), "--arch", "sm_75")
    assert done.code == 1 and "sm_75" in done.err and "sm_90a" in done.err
    done = vitrt("compile", "no-such-size")
    assert done.code == 1 and "no-such-size" in done.err
