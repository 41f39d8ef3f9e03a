"""The rows that `vitrt verify` measures, their bounds, and the table it prints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from vitrt.compare.errors import FLOAT32_BOUND, RATIO_BOUND, Errors
from vitrt.engine.device import dtype_name
from vitrt.messages import counted


@dataclass(frozen=True, slots=True)
class Row:
    """One way to run the tower."""

    dtype: torch.dtype
    name: str  # of an attention backend; "transformers" where `ours` is False
    graphs: bool
    errors: Errors | None  # None: it did not run
    peer: Errors | None = None  # transformers' in the same dtype; None in float32
    note: str = ""
    ours: bool = True
    precision: Literal["auto", "fp8"] = "auto"
    cosines: tuple[float, ...] = ()  # of each image, where fp8 is measured, too

    @property
    def label(self) -> str:
        """What its products run in."""
        return "fp8" if self.precision == "fp8" else dtype_name(self.dtype)

    @property
    def ratio(self) -> float | None:
        """The worst quotient of an error and transformers' own; None without either."""
        return None if self.errors is None or self.peer is None else self.errors.ratio_to(self.peer)

    @property
    def within(self) -> bool:
        """Whether it keeps its bound. transformers' own rows have none, and those in fp8 neither:
        what it costs depends on the weights, so that they only have to be numbers.
        """
        if not self.ours:
            return True
        if self.precision == "fp8":
            return self.errors is not None and math.isfinite(self.errors.worst)
        if self.errors is None:
            return False
        if self.ratio is None:
            return self.errors.worst <= FLOAT32_BOUND
        return self.ratio <= RATIO_BOUND


@dataclass(slots=True)
class Verification:
    """All rows, and what they were measured on."""

    model: str
    device: torch.device
    images: int
    patches: int
    differing: list[str]  # images whose pixel values are not bit-equal to transformers'
    rows: list[Row] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of the images that rows have cosines of
    # (backend, why it cannot run) -> in which dtypes
    unusable: dict[tuple[str, str], list[torch.dtype]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(row.within for row in self.rows)


def table_lines(result: Verification) -> Iterator[str]:
    """The result as lines for people."""
    import transformers

    same = f"{result.images - len(result.differing)} of {result.images}"
    images = counted(result.images, "image")
    yield f"{result.model} on {result.device}, {images}, {result.patches} patches"
    yield f"reference: transformers {transformers.__version__}, its tower in float32"
    yield f"pixel values bit-equal to its image processor's: {same}"
    yield from (f"  not those of {name}" for name in result.differing)
    yield ""
    levels = max((len(r.errors.deepstack) for r in result.rows if r.errors), default=0)
    heads = ["embeddings", *(f"deepstack {level}" for level in range(levels))]
    errors = "".join(f"{head:>13}" for head in heads)
    yield f"{'dtype':10}{'attention':14}{'graphs':7}{errors}{'ratio':>8}  bound"
    for row in result.rows:
        yield _line(row)
    yield ""
    for (name, reason), dtypes in result.unusable.items():
        yield f"not run: {name} in {', '.join(map(dtype_name, dtypes))}: {reason}"
    ours = [row for row in result.rows if row.ours]
    yield from _cosine_lines(result)
    yield f"{sum(row.within for row in ours)} of {len(ours)} ways to run it within their bounds"


def _line(row: Row) -> str:
    graphs = ("on" if row.graphs else "off") if row.ours else ""
    start = f"{row.label:10}{row.name:14}{graphs:7}"
    if row.errors is None:
        return f"{start}{row.note}"
    errors = "".join(f"{error:>13.2e}" for error in row.errors.values)
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    bound = f"{FLOAT32_BOUND:g}" if row.ratio is None else f"x {RATIO_BOUND:g}"
    if row.precision == "fp8":
        verdict = "none" if row.within else "not finite"
    else:
        verdict = f"{bound} {'ok' if row.within else 'OVER'}" if row.ours else ""
    return f"{start}{errors}{ratio:>8}  {verdict}  {row.note}".rstrip()


def _cosine_lines(result: Verification) -> Iterator[str]:
    """The cosine of every image's embeddings with float32's, one column a way to run it."""
    rows = [row for row in result.rows if row.cosines]
    if not rows:
        return
    heads = [f"{row.label} {row.name}{', graphs' * row.graphs}" for row in rows]
    yield "cosine with float32, image by image"
    yield "".join(f"{head:>24}" for head in heads)
    for index, name in enumerate(result.names):
        yield "".join(f"{row.cosines[index]:>24.7f}" for row in rows) + f"  {name}"
    yield "".join(f"{min(row.cosines):>24.7f}" for row in rows) + "  the worst"
    yield ""
