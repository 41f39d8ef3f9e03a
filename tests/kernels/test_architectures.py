"""Every Triton kernel compiles for GPUs that nobody here has, and fits into what they have.

No GPU is needed to compile: what a tiling takes of shared memory and registers is in the binary.
That the results are right there is shown by nothing here.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitrt.kernels.ahead import CHIPS
from vitrt.kernels.dispatch import HAVE_TRITON

pytestmark = pytest.mark.skipif(not HAVE_TRITON, reason="needs Triton")

ROOT = Path(__file__).resolve().parents[2]
REGISTERS = 64 * 1024  # of a multiprocessor, on all of these
# The window kernel at head size 72, held to 128 registers on Hopper, spills 24 bytes, in the tiling
# that was the fastest of those tried.
MOST_SPILLED = 32

_kernels = Path(ROOT, "vitrt", "kernels").glob("*.py")
KERNELS = {
    node.name
    for path in _kernels
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.FunctionDef) and node.decorator_list and node.name.endswith("_kernel")
}


# Case -> (kernel, warps, bytes of shared memory, registers and spilled bytes of a thread).
Report = dict[str, list[tuple[str, int, int, int, int]]]


def compile_for(archs: tuple[str, ...], which: str, cache: Path) -> dict[str, Report]:
    """In one process: its imports take as long as a third of what one architecture compiles."""
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(cache),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.support.compile_kernels", which, *archs]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    reports: dict[str, Report] = json.loads(done.stdout)
    assert reports.keys() == set(archs)
    return reports


def assert_fits(arch: str, report: Report) -> None:
    chip = CHIPS[arch]
    wrong = [
        f"{case}: {name} takes {shared} bytes of shared memory, {registers} registers in "
        f"{warps} warps, and spills {spilled} bytes"
        for case, kernels in report.items()
        for name, warps, shared, registers, spilled in kernels
        if shared > chip.shared_memory
        or registers * 32 * warps > REGISTERS
        or spilled > MOST_SPILLED
    ]
    assert not wrong, "\n".join([chip.name, *wrong])


@pytest.mark.parametrize("archs", [tuple(CHIPS)[:3], tuple(CHIPS)[3:]], ids=" ".join)
def test_the_tilings_chosen_for_the_released_towers(archs: tuple[str, ...], tmp_path: Path):
    for arch, report in compile_for(archs, "main", tmp_path).items():
        assert_fits(arch, report)
        compiled = {name for kernels in report.values() for name, *_ in kernels}
        has_e4m3 = CHIPS[arch].capability >= (8, 9)
        assert compiled == (KERNELS if has_e4m3 else KERNELS - {"_cast_kernel"}), arch


@pytest.mark.slow
def test_other_head_sizes_and_widths(tmp_path: Path):
    """For the chip with the least shared memory of those that tile alike, and for Hopper."""
    for arch, report in compile_for(("sm_86", "sm_90a"), "rest", tmp_path).items():
        assert_fits(arch, report)


def test_no_gpu_is_looked_for():
    """PyTorch built for CUDA raises where its own fake tensors look for one, as in a container."""
    program = """
import torch
from torch._subclasses import fake_tensor
from vitrt.kernels.ahead import CHIPS, compiling_for

def look(device):
    raise RuntimeError("No CUDA GPUs are available")

fake_tensor.init_gpu_context = look
with compiling_for(CHIPS["sm_90a"]):
    torch.empty(2, device="cuda")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_does_not_fit_is_found():
    """What the tests above hold is not true of every tiling."""
    chip = CHIPS["sm_86"]
    fitting = ["_flash_kernel", 8, chip.shared_memory, 255, MOST_SPILLED]
    assert_fits("sm_86", {"case": [tuple(fitting)]})
    for place, value in ((2, chip.shared_memory + 1), (1, 16), (4, 240)):
        broken = list(fitting)
        broken[place] = value
        with pytest.raises(AssertionError, match="_flash_kernel"):
            assert_fits("sm_86", {"case": [tuple(broken)]})
