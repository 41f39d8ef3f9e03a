"""What a reader of damaged features is told, and features under names that are no text."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.store.test_recovery import edit_header
from tests.support.folders import IDENTITY, assert_holds, encode, expected, photos
from vitrt import FeatureStore
from vitrt.store.content import from_bytes
from vitrt.store.export import export_vectors
from vitrt.tensor_file import TensorFileError

SHARD = "features-00000-00000.safetensors"
FIRST = "000.png"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _rename_tensors(path: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header["other/embeddings"] = header.pop(f"{FIRST}/embeddings")

    edit_header(path, change)


@pytest.mark.parametrize("damage", [_cut, _lengthen, _empty, _rename_tensors])
def test_a_damaged_shard_is_named_to_who_reads_it(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    encode(photos(tmp_path / "in", 9), output)
    damage(output / SHARD)
    store = FeatureStore(output)
    with pytest.raises(TensorFileError, match=SHARD):
        store[FIRST]
    last = next(reversed(list(store)))
    assert torch.equal(store[last].embeddings, expected(tmp_path / "in")[last].embeddings)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x89PNG" * 10, save({"grid_thw": torch.tensor([1, 2, 2])}), save({})],
    ids=["empty", "an image", "no features", "nothing"],
)
def test_what_is_no_features_is_told_so(content: bytes) -> None:
    with pytest.raises(TensorFileError, match="features"):
        from_bytes(content)


@pytest.mark.parametrize("pool", ["none", "mean"])
def test_a_folder_whose_name_is_not_utf8(pool: str, tmp_path: Path) -> None:
    output = tmp_path / os.fsdecode(b"out\xff")
    folder = photos(tmp_path / "in", 9)
    identity = replace(IDENTITY, pool=pool)
    encode(folder, output, identity=identity)
    photos(folder, 4)  # changed: their shards are compacted
    for index in range(4):
        os.utime(next(folder.rglob(f"{index:03}.png")), (1, 1))
    encode(folder, output, identity=identity)
    if pool == "none":
        assert_holds(output, expected(folder))
        return
    tables = dict(
        pair
        for ids, table in FeatureStore(output).pooled_tables()
        for pair in zip(ids, table, strict=True)
    )
    assert set(tables) == set(expected(folder))
    path, rows = export_vectors(output, "parquet")
    assert rows == 9 and path.is_file()
