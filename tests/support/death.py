"""Dies at each file operation of a run in turn, resumes, and compares: see test_durability.

    python -m tests.support.death FOLDER

Runs in a process of its own, because it forks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.folders import assert_holds, assert_same, encode, expected, photos
from vitrt import FeatureStore
from vitrt.store import durable

CALLS = ("open", "write", "fsync", "replace", "unlink", "ftruncate", "mkdir")


class MortalDisk:
    """Stands in for `os`: the process ends at one of its calls."""

    def __init__(self, call: int, mode: str) -> None:
        self.calls = 0
        self._last = call
        self._mode = mode

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return real if name not in CALLS else lambda *args: self._call(name, real, args)

    def _call(self, name: str, real: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self._mode == "half" and name != "write":
            return real(*args)
        dies = self.calls == self._last
        self.calls += 1
        if dies and self._mode == "before":
            os._exit(9)
        if dies and self._mode == "half":
            args = (args[0], args[1][: len(args[1]) // 2])
        result = real(*args)
        if dies:
            os._exit(9)
        return result


def run_to_death(folder: Path, output: Path, call: int, mode: str) -> bool:
    """Whether the run died; False: it ended before that call."""
    child = os.fork()
    if child == 0:
        durable.os = MortalDisk(call, mode)  # type: ignore[attr-defined]
        encode(folder, output)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), code
    return code == 9


def main(where: Path) -> None:
    torch.set_num_threads(1)
    folder = photos(where / "in", 5)
    wanted = expected(folder)
    for mode in ("before", "after", "half"):
        call = 0
        while run_to_death(folder, output := where / mode / str(call), call, mode):
            if list(output.glob("manifest-*")):
                store = FeatureStore(output)
                for name in store:
                    assert_same(store[name], wanted[name])
            run_to_death(folder, output, call // 2, mode)  # and once more on the way back
            encode(folder, output)
            assert_holds(output, wanted)
            call += 1
        print(f"death {mode} {call} calls survived")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
