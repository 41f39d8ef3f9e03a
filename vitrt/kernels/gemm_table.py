"""Which implementation runs a matrix product: tables of measurements, one a device.

A table is a JSON file in gemm_tables/, written by scripts/tune on the device that it names: by
gemm.py, by few_rows.py for shares of K, and by e4m3_tiles.py for products of e4m3.
At run time nothing is measured: a product that is no entry takes the choice of the nearest one.

Shapes: M rows (patches or merged tokens), K input and N output features.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from math import log
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

# All add a bias first.
Kind: TypeAlias = Literal["bias", "gelu", "gelu_tanh", "quick_gelu", "swiglu", "residual"]
Implementation: TypeAlias = Literal["addmm", "mm", "quack", "split"]

KINDS: tuple[Kind, ...] = get_args(Kind)
IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)

_MANY_ROWS = 8192
_TILE = re.compile(r"(\d+)x(\d+)([pc])(\d+)x(\d+)(?:/(\d+))?")
_SPLIT_TILE = re.compile(r"(\d+)x(\d+)x(\d+)(t?)/(\d+)w(\d+)s(\d+)")


class Tile(NamedTuple):
    """A tile of quack's kernels, written 128x192p1x2 or, with K split in two, 128x192p1x2/2."""

    m: int
    n: int
    pingpong: bool  # p: two warpgroups alternate tiles; c: they share one
    cluster_m: int
    cluster_n: int
    split_k: int = 1

    @classmethod
    def parse(cls, text: str) -> Tile:
        match = _TILE.fullmatch(text)
        if match is None:
            raise ValueError(f"tile {text!r}: expected the form 128x192p1x2 or 128x192c2x1/2")
        m, n, schedule, cluster_m, cluster_n, split_k = match.groups(default="1")
        return cls(int(m), int(n), schedule == "p", int(cluster_m), int(cluster_n), int(split_k))

    def __str__(self) -> str:
        schedule = "p" if self.pingpong else "c"
        split = f"/{self.split_k}" if self.split_k > 1 else ""
        return f"{self.m}x{self.n}{schedule}{self.cluster_m}x{self.cluster_n}{split}"


class SplitTile(NamedTuple):
    """A tile of split_product.py, written 64x64x128t/8w4s3."""

    m: int
    n: int
    k: int
    transposed: bool  # t: the weight is the left operand
    shares: int  # of K
    warps: int
    stages: int

    @classmethod
    def parse(cls, text: str) -> SplitTile:
        match = _SPLIT_TILE.fullmatch(text)
        if match is None:
            raise ValueError(
                f"tile {text!r}: expected the form 64x64x128/8w4s3 or 64x64x128t/8w4s3"
            )
        m, n, k, transposed, shares, warps, stages = match.groups()
        return cls(int(m), int(n), int(k), bool(transposed), int(shares), int(warps), int(stages))

    def __str__(self) -> str:
        transposed = "t" if self.transposed else ""
        tiles = f"{self.m}x{self.n}x{self.k}{transposed}"
        return f"{tiles}/{self.shares}w{self.warps}s{self.stages}"


class Choice(NamedTuple):
    """How a product is run.

    `addmm`: cuBLAS with bias (and GELU) in its epilogue. `mm`: the bare product, then one kernel
    (for `residual`, the caller's fused add and norm). `quack`: all in the epilogue, by `tile`.
    `split`: for `residual` alone, shares of K by `split_tile`, which the caller's norm adds up.
    """

    implementation: Implementation
    tile: Tile | None = None
    split_tile: SplitTile | None = None

    @classmethod
    def parse(cls, text: str) -> Choice:
        """`addmm`, `mm`, `quack TILE` or `split TILE`."""
        implementation, _, tile = text.partition(" ")
        tiled = implementation in ("quack", "split")
        if implementation not in IMPLEMENTATIONS or tiled != bool(tile):
            raise ValueError(
                f"choice {text!r}: expected 'addmm', 'mm', 'quack TILE' or 'split TILE'"
            )
        if implementation == "split":
            return cls(implementation, None, SplitTile.parse(tile))
        return cls(implementation, Tile.parse(tile) if tile else None)

    def __str__(self) -> str:
        tile = self.tile or self.split_tile
        return f"{self.implementation} {tile}" if tile else self.implementation


class Product(NamedTuple):
    kind: Kind
    n: int
    k: int
    operands: Literal["half", "e4m3"] = "half"  # both; half: bfloat16 or float16


@dataclass(frozen=True)
class Table:
    """The measured choices of one device: for each product, (M, choice) in the order of M."""

    device: str
    capability: tuple[int, int]
    choices: dict[Product, list[tuple[int, Choice]]] = field(default_factory=dict)
    one_tiles: dict[Product, Tile] = field(default_factory=dict)  # as scripts/tune/one_tile.py says

    @classmethod
    def parse(cls, content: dict[str, Any]) -> Table:
        """From the JSON that scripts/tune/gemm.py writes."""
        choices, one_tiles = {}, {}
        for entry in content["products"]:
            product = Product(entry["kind"], entry["n"], entry["k"], entry.get("operands", "half"))
            choices[product] = sorted((row["m"], Choice.parse(row["use"])) for row in entry["rows"])
            if "one_tile" in entry:
                one_tiles[product] = Tile.parse(entry["one_tile"])
        major, minor = content["capability"]
        return cls(content["device"], (major, minor), choices, one_tiles)

    def choice(self, product: Product, m: int) -> Choice | None:
        """The measured choice nearest in M; None where nothing of this kind was measured."""
        rows = self._nearest(product)
        if not rows:
            return None
        return min(rows, key=lambda row: abs(log(row[0] / max(m, 1))))[1]

    def tiles(self, product: Product) -> list[Tile]:
        """Every tile that `choice` can name for this product, whatever M is."""
        used = (choice.tile for _, choice in self._nearest(product))
        return sorted({tile for tile in used if tile is not None})

    def split_tiles(self, product: Product) -> list[SplitTile]:
        """Every tile for shares of K that `choice` can name for this product."""
        used = (choice.split_tile for _, choice in self._nearest(product))
        return sorted({tile for tile in used if tile is not None})

    def one_tile(self, product: Product) -> Tile | None:
        """The tile for every M, each sum in one piece: the one measured to suit all, else that of
        many rows. None without one.
        """
        if product in self.one_tiles:
            return self.one_tiles[product]
        rows = [
            (m, choice.tile)
            for m, choice in self._nearest(product)
            if choice.tile is not None and choice.tile.split_k == 1
        ]
        if not rows:
            return None
        return min(rows, key=lambda row: abs(log(row[0] / _MANY_ROWS)))[1]

    def _nearest(self, product: Product) -> list[tuple[int, Choice]]:
        """The rows of this product or, if it was not measured, of the one nearest in N and K.

        What decides is how the output divides into tiles and how long each one runs, so a
        tensor-parallel share or another tower's width behaves much like its neighbour.
        """
        exact = self.choices.get(product)
        if exact is not None:
            return exact
        same_kind = [
            other
            for other in self.choices
            if (other.kind, other.operands) == (product.kind, product.operands)
        ]
        if not same_kind:
            return []

        def distance(other: Product) -> float:
            return abs(log(other.n / product.n)) + abs(log(other.k / product.k))

        return self.choices[min(same_kind, key=distance)]


def _files() -> Iterator[dict[str, Any]]:
    for entry in sorted(
        (resources.files("vitrt.kernels") / "gemm_tables").iterdir(), key=lambda entry: entry.name
    ):
        if entry.name.endswith(".json"):
            yield json.loads(entry.read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def tables() -> tuple[Table, ...]:
    """All tables of the package."""
    return tuple(Table.parse(content) for content in _files())


@lru_cache(maxsize=16)
def table_for(device: str, capability: tuple[int, int]) -> Table | None:
    """The table of `device` (its name as CUDA gives it), else of its capability, else None."""
    same = [table for table in tables() if table.capability == capability]
    return next((table for table in same if table.device == device), same[0] if same else None)
