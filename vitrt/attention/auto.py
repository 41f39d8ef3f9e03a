"""What "auto" is: rules by the segments of a batch, which backend takes it, and their table.

Shapes: T patches, H heads, Dh head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitrt.attention.base import AttentionBackend
from vitrt.attention.probe import HALF_PRECISION, cuda_capability
from vitrt.kernels.rope import rope_
from vitrt.kernels.segments import Rotary, Segments


@dataclass(frozen=True, slots=True)
class Rule:
    """A backend's name, and the batches that "auto" takes it for: by patches of the longest segment
    and of the whole batch.
    """

    name: str
    from_longest: int = 0
    below_longest: float = math.inf
    most: float = math.inf

    def takes(self, lengths: Sequence[int]) -> bool:
        longest = max(lengths)
        return self.from_longest <= longest < self.below_longest and sum(lengths) <= self.most

    @property
    def takes_all(self) -> bool:
        return self == Rule(self.name)

    def __str__(self) -> str:
        words = [self.name]
        if self.most < math.inf:
            words.append(f"up to {self.most}")
        elif self.from_longest:
            words.append(f"from {self.from_longest}")
        return " ".join(words)


class AutoBackend:
    """The fastest backend for each batch, by a table of rules: the first one that takes it."""

    name = "auto"
    applies_rotary = True  # before those backends that do not

    def __init__(self, table: Sequence[tuple[Rule, AttentionBackend]]) -> None:
        """`table`: its last rule takes every batch."""
        assert table and table[-1][0].takes_all
        self._table = tuple(table)
        self.capturable = all(backend.capturable for _, backend in table)

    def select(self, lengths: Sequence[int]) -> AttentionBackend:
        """The one backend for a batch with segments of these lengths."""
        return next(backend for rule, backend in self._table if rule.takes(lengths))

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        backend = self.select(segments.lengths or (segments.max_seqlen,))
        if not backend.applies_rotary:
            rope_(qkv, rotary)
        return backend(qkv, segments, rotary, out)

    def __repr__(self) -> str:
        return f"auto({', '.join(str(rule) for rule, _ in self._table)})"


@dataclass(frozen=True, slots=True)
class _Preference:
    """What "auto" takes for full attention on NVIDIA GPUs of at least `capability`, in order."""

    capability: tuple[int, int]
    most_head_dim: int
    rules: tuple[Rule, ...]


# The first row that applies. Measured on an H200 at 16 heads of 72 and 80 in bf16.
#   Large batches, kernels alone, in TFLOP/s: FA4 leads FA3 from about 1000 patches a segment (1 x
# 1296: 307 and 317 against 246 and 266; 16 x 3080: 423 and 514 against 411 and 464; 1 x 16384: 479
# and 533 against 441 and 492; only at 32 x 1296 it is 2% behind), they are level at 480 to 784, and
# FA3 leads below (162 x 256: 134 and 157 against 93 and 112).
#   Small ones wait for launches. In microseconds inside a graph, the mean of both head sizes, with
# RoPE and FA3's planning: FA3, our flash kernel and our short one (scripts/tune/few_rows.py). 1 x
# 16: 12.0, 5.3 and 3.5; 1 x 64: 12.2, 5.8 and 5.3; 1 x 196: 16.0, 9.6 and 11.8; 1 x 576: 20.6, 16.3
# and 34; 8 x 256: 31, 19.5 and 34. At 1 x 768 FA4 takes 21.4, our flash kernel 20.3.
#   Rows for other GPUs follow from what the packages are made for, not from measurements.
_SHORT = Rule("short", most=64)
_REST = (Rule("triton"), Rule("fa2"), Rule("sdpa"))
_HOPPER = (
    _SHORT,
    Rule("fa4", from_longest=768),
    Rule("triton", below_longest=768, most=2048),
    Rule("fa3"),
    *_REST,
)
_PREFERENCES = (
    _Preference((10, 0), 128, (_SHORT, Rule("fa4", from_longest=256), *_REST)),
    _Preference((9, 0), 128, _HOPPER),
    _Preference((9, 0), 256, (Rule("fa3"), Rule("fa2"), Rule("sdpa"))),
    _Preference((8, 0), 128, (_SHORT, *_REST)),
)


def auto_rules(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Rule, ...]:
    if dtype not in HALF_PRECISION:
        # Without tensor cores PyTorch's kernels are the faster.
        return (Rule("sdpa"),)
    capability = cuda_capability(device)
    if capability is None:
        triton = device.type in ("cuda", "xpu")
        return (Rule("triton"), Rule("sdpa")) if triton else (Rule("sdpa"),)
    for row in _PREFERENCES:
        if capability >= row.capability and head_dim <= row.most_head_dim:
            return row.rules
    return (Rule("sdpa"),)
