"""From the measurements of gemm.py to the table that the package reads, and its summary."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemm_products import LAYERS, SHOWN

from vitrt.kernels.gemm_table import Product

WAYS = ("addmm", "mm", "quack")


def keep_few(rows: list[dict[str, float]], slack: float) -> set[str]:
    """The choices that are needed for every row to stay within `slack` of its best.

    Each tile is a kernel to compile at load, so those that win nothing worth it go, the least
    missed first.
    """
    kept = {choice for row in rows for choice in row}

    def regret(choices: set[str]) -> float:
        return max(
            min((us for choice, us in row.items() if choice in choices), default=math.inf)
            / min(row.values())
            for row in rows
        )

    while True:
        tiles = [choice for choice in kept if choice.startswith("quack")]
        costs = {choice: regret(kept - {choice}) for choice in tiles}
        least = min(costs, key=lambda choice: (costs[choice], choice), default=None)
        if least is None or costs[least] > 1 + slack:
            return kept
        kept.remove(least)


def entries(raw: dict[str, Any], slack: float) -> Iterator[dict[str, Any]]:
    """The table's products: for each number of rows what to use, and each way's microseconds."""
    by_kind: dict[str, list[dict[str, float]]] = {}
    for key, measured in raw["products"].items():
        by_kind.setdefault(key.split()[0], []).extend(measured.values())
    kept = {kind: keep_few(rows, slack) for kind, rows in by_kind.items() if rows}
    for key, measured in raw["products"].items():
        kind, n, k = key.split()
        rows = []
        for m, times in sorted(measured.items(), key=lambda item: int(item[0])):
            allowed = {choice: us for choice, us in times.items() if choice in kept[kind]}
            use = min(allowed, key=allowed.__getitem__)
            row: dict[str, Any] = {"m": int(m), "use": use}
            for way in WAYS:
                ways = [us for choice, us in allowed.items() if choice.split()[0] == way]
                if ways:
                    row[f"{way}_us"] = round(min(ways), 1)
            rows.append(row)
        if rows:
            yield {"kind": kind, "n": int(n), "k": int(k), "rows": rows}


def write_table(path: Path, raw: dict[str, Any], slack: float) -> list[dict[str, Any]]:
    """The table at `path` with the products that `raw` has; returns these.

    Those that it had and `raw` has not stay, e4m3's among them, and so do shares of K, which
    few_rows.py measures, and one_tile.py's tiles. ValueError where it is another device's.
    """
    products = list(entries(raw, slack))
    kept = []
    if path.exists():
        table = json.loads(path.read_text())
        if table["device"] != raw["device"]:
            raise ValueError(
                f"{path} is of {table['device']}, this was measured on {raw['device']}"
            )
        measured = {_product(entry) for entry in products}
        splits = {
            (_product(entry), row["m"]): row["use"]
            for entry in table["products"]
            for row in entry["rows"]
            if row["use"].startswith("split")
        }
        one_tiles = {
            _product(entry): entry["one_tile"] for entry in table["products"] if "one_tile" in entry
        }
        for entry in products:
            if _product(entry) in one_tiles:
                entry["one_tile"] = one_tiles[_product(entry)]
            rows = {row["m"]: row for row in entry["rows"]}
            for (product, m), use in splits.items():
                if product == _product(entry):
                    rows.setdefault(m, {"m": m})["use"] = use
            entry["rows"] = [rows[m] for m in sorted(rows)]
        kept = [entry for entry in table["products"] if _product(entry) not in measured]
    halves = [entry for entry in kept if "operands" not in entry]
    others = [entry for entry in kept if "operands" in entry]
    facts = {key: value for key, value in raw.items() if key != "products"}
    write_products(path, facts, [*products, *halves, *others])
    return products


def _product(entry: dict[str, Any]) -> tuple[Any, ...]:
    return entry["kind"], entry["n"], entry["k"], entry.get("operands")


def write_products(path: Path, facts: dict[str, Any], products: list[dict[str, Any]]) -> None:
    """A table in lines that a difference shows well: one for each product and number of rows."""
    blocks = []
    for entry in products:
        rows = ",\n    ".join(json.dumps(row) for row in entry["rows"])
        head = json.dumps({key: value for key, value in entry.items() if key != "rows"})[:-1]
        blocks.append(f'  {head}, "rows": [\n    {rows}\n  ]}}')
    lines = ",\n ".join(f"{json.dumps(key)}: {json.dumps(facts[key])}" for key in facts)
    joined = ",\n".join(blocks)
    path.write_text(f'{{\n {lines},\n "products": [\n{joined}\n ]\n}}\n')


def summary(products: list[dict[str, Any]]) -> None:
    """TFLOP/s of each way, counted on the product alone."""
    named = {layer.product: layer for layer in LAYERS}
    print(f"{'product':28}{'kind':10}{'M':>7}{'addmm':>8}{'mm':>8}{'quack':>8}  use")
    for entry in products:
        kind, n, k = entry["kind"], entry["n"], entry["k"]
        layer = named[Product(kind, n, k)]
        shown = {patches // layer.merge for patches in SHOWN}
        for row in entry["rows"]:
            if row["m"] not in shown:
                continue
            rates = ""
            for way in WAYS:
                us = row.get(f"{way}_us")
                rates += f"{2e-6 * row['m'] * n * k / us:8.0f}" if us else f"{'-':>8}"
            print(f"{layer.family + ' ' + layer.name:28}{kind:10}{row['m']:7}{rates}  {row['use']}")
    for kind in sorted({entry["kind"] for entry in products}):
        used = {row["use"] for entry in products if entry["kind"] == kind for row in entry["rows"]}
        print(f"{kind}: {', '.join(sorted(used))}")
