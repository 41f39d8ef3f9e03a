"""How many cores are this process's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vitrt import cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of 64 cores, whose control groups are files here."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(cores, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_LIMITS", tmp_path / "limits")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_all_of_them_where_nothing_limits(machine: Path) -> None:
    assert cores.usable_cores() == 64
    write(machine / "cgroup", "0::/\n")
    write(machine / "limits/cpu.max", "max 100000\n")
    assert cores.usable_cores() == 64


@pytest.mark.parametrize(
    ("quota", "expected"), [(400000, 4), (150000, 2), (1000, 1), (9999999, 64)]
)
def test_a_container_may_keep_some_busy(machine: Path, quota: int, expected: int) -> None:
    write(machine / "cgroup", "0::/\n")
    write(machine / "limits/cpu.max", f"{quota} 100000\n")
    assert cores.usable_cores() == expected


def test_the_tightest_group_above_this_process_counts(machine: Path) -> None:
    write(machine / "cgroup", "0::/slice/unit\n")
    write(machine / "limits/slice/cpu.max", "300000 100000\n")
    write(machine / "limits/slice/unit/cpu.max", "max 100000\n")
    assert cores.usable_cores() == 3


def test_version_1_and_files_that_say_nothing(machine: Path) -> None:
    write(machine / "cgroup", "4:cpu,cpuacct:/docker/abc\nnonsense\n")
    write(machine / "limits/cpu/cpu.cfs_quota_us", "-1\n")
    write(machine / "limits/cpu/cpu.cfs_period_us", "100000\n")
    write(machine / "limits/cpu.max", "what\n")
    assert cores.usable_cores() == 64
    write(machine / "limits/cpu/cpu.cfs_quota_us", "250000\n")
    assert cores.usable_cores() == 3


def test_ranks_of_a_host_share_them(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cores.usable_cores() == 8
    with cores.shared_by(2):  # only so many of them decode
        assert cores.usable_cores() == 32
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert cores.usable_cores() == 1
