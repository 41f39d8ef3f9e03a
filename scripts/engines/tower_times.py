"""What a tower inside an engine's process is, its times there, and those of a first token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import cases
import torch
from PIL import Image

CUDA = torch.cuda.is_available()
# The workloads of the tower, as the side of each image in merged tokens; "mixed": 16 images.
TOWER_LOADS = {
    "1 of 560x560": None,
    "32 of 560x560": None,
    "mixed": [(1, 2 * (8 + i), 2 * (20 - i)) for i in range(16)],
}


def module_of_tower(model: Any) -> str:
    """Here, where an engine's other processes find the function."""
    return type(model.visual).__module__


@torch.inference_mode()
def time_tower(visual: Any, patches: int, lists: bool) -> dict[str, float]:
    """Median wall milliseconds of a forward; grids go in as lists, or as a tensor."""
    width = 3 * 2 * patches**2
    side = -(-560 // (2 * patches)) * 2
    found = {}
    for name, grids in TOWER_LOADS.items():
        count = int(name.split()[0]) if grids is None else 0
        grids = [list(g) for g in grids or [(1, side, side)] * count]
        x = torch.randn(sum(h * w for _, h, w in grids), width, device=visual.device)
        x = x.to(visual.dtype)
        grid_thw: Any = grids if lists else torch.tensor(grids)
        runs = []
        for _ in range(15 if CUDA else 1):
            begin = time.perf_counter()
            visual(x, grid_thw=grid_thw)
            if CUDA:
                torch.cuda.synchronize()
            runs.append((time.perf_counter() - begin) * 1e3)
        found[name] = statistics.median(runs[5:] or runs)
    return found


def time_first_token(ask: Callable[[Image.Image], object]) -> float:
    """Median milliseconds from a prompt with a new 560x560 image to its first token."""
    runs = []
    for seed in range(15 if CUDA else 2):
        image = Image.fromarray(cases.random_image(560, 560, 1000 + seed))
        begin = time.perf_counter()
        ask(image)
        runs.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(runs[len(runs) // 3 :])
