"""What the ranks of the distributed tests run under torchrun.

    torchrun --nproc-per-node N tests/support/parallel_program.py OUT DEVICE TP[,TP...] FOLDER...

Rank R leaves OUT/FOLDER-tpTP-R.pt: what `__call__` and `encode` returned.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
import torch

from vitrt import ParallelContext, VisionEncoder
from vitrt.parallel import context as distributed

GRIDS = [(1, 6, 10), (1, 16, 18), (3, 4, 4), (1, 2, 2)]


def pixel_values(width: int) -> torch.Tensor:
    rows = sum(t * h * w for t, h, w in GRIDS)
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1))


def images() -> list[np.ndarray]:
    """Two stills and a clip of an odd number of frames, of different sizes."""
    rng = np.random.default_rng(2)
    shapes = [(90, 130, 3), (7, 64, 100, 3), (200, 60, 3)]
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


def run(encoder: VisionEncoder) -> dict[str, object]:
    values = pixel_values(encoder.config.patch_dim)
    for _ in range(2 if encoder.device.type == "cuda" else 0):
        encoder(values, GRIDS)  # the graph is recorded, then replayed
    called = encoder(values, GRIDS)
    short = encoder(values[:60], GRIDS[:1])
    encoded = encoder.encode(images())
    parts = encoder.encode_share(images()) if encoder.parallel.dp_size > 1 else []
    return {
        "called": [called.embeddings.cpu(), _cpu(called.deepstack)],
        "short": [short.embeddings.cpu(), _cpu(short.deepstack)],
        "encoded": [(f.grid_thw, f.embeddings.cpu(), _cpu(f.deepstack)) for f in encoded],
        "pieces": [(p.piece.index, p.piece.start, p.piece.stop) for p in parts],
        "hits": encoder.stats().hits.total(),
    }


def _cpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cpu()


VARIANTS = {
    "cpu": [("auto", "", 100)],
    # The last one records sums that run beside products.
    "cuda": [("auto", "", 8192), ("nccl", "-nccl", 8192), ("nccl", "-overlap", 100)],
}  # how sums travel, what files are called, from how many rows on blocks overlap


def main() -> None:
    out, device, sizes, *folders = sys.argv[1:]
    joined: list[ParallelContext] = []
    for tp in map(int, sizes.split(",")):
        for method, suffix, distributed.OVERLAP_ROWS in VARIANTS[device]:
            parallel = ParallelContext.from_env(tp, device=device, all_reduce=method)  # type: ignore[arg-type]
            rank = parallel.dp_rank * tp + parallel.tp_rank
            for folder in map(Path, folders):
                encoder = VisionEncoder.from_pretrained(folder, device=device, parallel=parallel)
                torch.save(run(encoder), Path(out) / f"{folder.name}-tp{tp}-{rank}{suffix}.pt")
                del encoder
                if device == "cuda":
                    gc.collect()  # recorded graphs keep a communicator from closing
            print(f"rank {rank}: tp {tp} {method}{suffix} is done", flush=True)
            if device == "cpu":
                parallel.close()  # and join again
            else:
                joined.append(parallel)
    for parallel in joined[:1]:
        torch.cuda.synchronize()
        parallel.close()


if __name__ == "__main__":
    main()
