"""What the user chose for a run over a folder. It imports no torch: `--help` reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vitrt.config import check_choices, check_flags, is_number, positive_integer


@dataclass(frozen=True, slots=True)
class EncodeOptions:
    """What the user chose for a run over a folder. The CLI takes its defaults from these fields."""

    workers: int | None = None  # decoding threads; None: as cores permit
    shard_mib: float = 256.0
    pool: Literal["none", "mean"] = "none"
    on_error: Literal["skip", "fail"] = "skip"
    overwrite: bool = False
    layers: tuple[int, ...] = ()  # also keep the hidden states after these
    merged: bool = True  # False: keep nothing else
    warmup: bool = False  # record CUDA graphs of all sizes before the first image

    def __post_init__(self) -> None:
        check_choices(self, {"pool": ("none", "mean"), "on_error": ("skip", "fail")})
        check_flags(self, "overwrite", "merged", "warmup")
        if self.pool == "mean" and self.layers:
            raise ValueError(
                f"pool 'mean' keeps one row an image and no hidden states of layers "
                f"{','.join(map(str, self.layers))}; use pool 'none' or no layers"
            )
        if self.workers is not None:
            positive_integer("workers", self.workers)
        if not is_number(self.shard_mib) or self.shard_mib <= 0:
            raise ValueError(f"shard_mib must be above 0 and finite, got {self.shard_mib!r}")
