"""Pipes that nobody writes to: opening one waits for ever, which a test should not."""

from __future__ import annotations

import builtins
import os
from pathlib import Path
from typing import Any

import pytest


def make_pipe(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe at `path`; whoever opens it fails the test instead."""
    os.mkfifo(path)
    usual = builtins.open

    def guarded(file: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(file, int) and os.fsdecode(file) == str(path):
            pytest.fail(f"{path} was opened")  # no Exception: nobody takes it for a bad image's
        return usual(file, *args, **options)

    monkeypatch.setattr(builtins, "open", guarded)
