"""Compiled kernels are kept in a folder that only this user can write."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from vitrt.kernels.disk_cache import keep_kernels, private_folder

fcntl = pytest.importorskip("fcntl")

VARIABLES = (
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR",
    "QUACK_CACHE_DIR",
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (*VARIABLES, "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # so that what the test sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "home"


def test_by_default_under_the_home_folder(home: Path):
    folder = private_folder()
    assert folder == home / ".cache" / "vitrt"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.iterdir()) == []  # what probed it is gone


def test_where_xdg_says(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert private_folder() == tmp_path / "xdg" / "vitrt"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert private_folder() == home / ".cache" / "vitrt"


def test_a_folder_that_others_may_write_is_not_taken(home: Path, tmp_path: Path):
    shared = home / ".cache" / "vitrt"
    shared.mkdir(parents=True)
    shared.chmod(0o777)
    temporary = tmp_path / f"vitrt-{os.getuid()}"
    assert private_folder() == temporary
    temporary.chmod(0o770)
    assert private_folder() is None


def test_a_folder_of_another_user_is_not_taken(home: Path, monkeypatch: pytest.MonkeyPatch):
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    assert private_folder() is None


def test_a_link_of_another_user_is_not_taken(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It leads to a folder of ours now, and to one of theirs when kernels are read."""
    (tmp_path / "ours").mkdir(mode=0o700)
    (home / ".cache").mkdir(parents=True)
    (home / ".cache" / "vitrt").symlink_to(tmp_path / "ours")
    assert private_folder() == home / ".cache" / "vitrt"  # of ours, it may lead to a larger disk
    whole = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        found = whole(path)
        if not stat.S_ISLNK(found.st_mode):
            return found
        return os.stat_result([*found[:4], os.getuid() + 1, *found[5:]])

    monkeypatch.setattr(Path, "lstat", lstat)
    assert private_folder() == tmp_path / f"vitrt-{os.getuid()}"


def test_no_folder_for_temporary_files_at_all(home: Path, monkeypatch: pytest.MonkeyPatch):
    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory")

    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    assert private_folder() is None


@pytest.mark.parametrize("call", ["fcntl.flock", "tempfile.TemporaryFile"])
def test_a_folder_without_locks_or_space_is_not_taken(
    call: str, home: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(call, fail)
    assert private_folder() is None
    keep_kernels()
    assert not set(VARIABLES) & set(os.environ)


def test_a_user_without_a_home(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert private_folder() == tmp_path / f"vitrt-{os.getuid()}"


def test_the_packages_are_told_unless_the_user_was_first(
    home: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("QUACK_CACHE_DIR", "/elsewhere")
    keep_kernels()
    enabled, flash, quack = (os.environ[name] for name in VARIABLES)
    assert (enabled, quack) == ("1", "/elsewhere")
    assert flash == str(home / ".cache" / "vitrt" / "flash-attn-4")


def test_a_changed_epilogue_finds_no_old_kernel(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def told() -> str:
        os.environ.pop("QUACK_CACHE_DIR", None)
        keep_kernels()
        return os.environ["QUACK_CACHE_DIR"]

    before = told()
    assert before == told() and Path(before).parent == home / ".cache" / "vitrt" / "quack"
    (tmp_path / "gemm_epilogues.py").write_text("# another product\n")
    monkeypatch.setattr("vitrt.kernels.disk_cache.__file__", str(tmp_path / "disk_cache.py"))
    assert told() != before
