"""The workloads that every figure refers to, as grids (frames, rows, columns) in patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vitrt.config import Grid

MERGE = 2  # merged token side of both families, in patches


@dataclass(frozen=True, slots=True)
class Workload:
    """One batch, the same for every contender."""

    name: str
    grids: tuple[Grid, ...]

    @property
    def patches(self) -> int:
        return sum(map(math.prod, self.grids))

    @property
    def single(self) -> bool:
        """One image: its latency is reported beside its rate."""
        return len(self.grids) == 1


def _photo(height: int, width: int, patch_size: int) -> Grid:
    """The grid of a photo whose size needs no limit: sides rounded to whole merged tokens."""
    factor = MERGE * patch_size
    return 1, MERGE * round(height / factor), MERGE * round(width / factor)


def _all(patch_size: int) -> dict[str, tuple[Grid, ...]]:
    square, wide = _photo(560, 560, patch_size), _photo(700, 1120, patch_size)
    return {
        "1x560": (square,),
        "1x1120x700": (wide,),
        "32x560": (square,) * 32,
        "16x1120x700": (wide,) * 16,
        "1x4k": ((1, 128, 256),),
        "mixed16": tuple((1, 2 * (8 + i), 2 * (20 - i)) for i in range(16)),
        "1x224": (_photo(224, 224, patch_size),),
        "1x64": (_photo(64, 64, patch_size),),
    }


WORKLOAD_NAMES = tuple(_all(16))


def build_workloads(
    patch_size: int, names: tuple[str, ...] = WORKLOAD_NAMES, *, tiny: bool = False
) -> list[Workload]:
    """The named workloads for towers of `patch_size`; `tiny` ones fit a CPU.

    Raises ValueError for a name that does not exist.
    """
    known = _all(patch_size)
    for name in names:
        if name not in known:
            raise ValueError(f"workload {name!r} does not exist; there are {', '.join(known)}")
    chosen = [Workload(name, known[name]) for name in names]
    return [Workload(w.name, _shrunk(w.grids)) for w in chosen] if tiny else chosen


def _shrunk(grids: tuple[Grid, ...]) -> tuple[Grid, ...]:
    return tuple((t, MERGE * -(-h // 8), MERGE * -(-w // 8)) for t, h, w in grids[:4])
