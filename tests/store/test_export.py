"""Ids and pooled vectors as tables."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tests.support.commands import Vitrt, vitrt
from tests.support.folders import IDENTITY, encode, expected, file_size_limit, photo, photos
from vitrt import FeatureStore
from vitrt.store.check import check_folder
from vitrt.store.durable import OutputError
from vitrt.store.export import TableFormat, export_vectors

__all__ = ["vitrt"]


@pytest.fixture(params=["none", "mean"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    photos(tmp_path / "in", 7)
    identity = replace(IDENTITY, pool=request.param)
    encode(tmp_path / "in", tmp_path / "out", identity=identity, shard_mib=1 / 30_000)
    return tmp_path / "out"


def as_vectors(ids: list[str], rows: list[list[float]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(row) for name, row in zip(ids, rows, strict=True)}


def assert_vectors_of(folder: Path, found: dict[str, torch.Tensor]) -> None:
    wanted = {name: feature.pooled() for name, feature in expected(folder).items()}
    assert found.keys() == wanted.keys()
    for name, row in wanted.items():
        assert torch.equal(found[name], row)


def test_a_store_as_an_arrow_table(output: Path, tmp_path: Path) -> None:
    table = FeatureStore(output).to_arrow()
    assert str(table.schema.field("vector").type) == "fixed_size_list<item: float>[6]"
    assert table.schema.metadata[b"model"] == IDENTITY.model.encode()
    columns = table.to_pydict()
    assert_vectors_of(tmp_path / "in", as_vectors(columns["id"], columns["vector"]))
    assert len(list(FeatureStore(output).arrow_batches())) > 1  # one a shard


def test_images_that_were_replaced_are_there_once(output: Path, tmp_path: Path) -> None:
    photo(tmp_path / "in/000.png", 88)
    pool = FeatureStore(output).to_arrow().schema.metadata[b"pool"].decode()
    encode(tmp_path / "in", output, identity=replace(IDENTITY, pool=pool))
    columns = FeatureStore(output).to_arrow().to_pydict()
    assert len(columns["id"]) == 7
    assert_vectors_of(tmp_path / "in", as_vectors(columns["id"], columns["vector"]))


def test_export_to_parquet(output: Path, tmp_path: Path, vitrt: Vitrt) -> None:
    done = vitrt("export", output, "--to", "parquet")
    assert done.code == 0 and f"7 vectors in {tmp_path}/out.parquet" in done.out
    columns = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert_vectors_of(tmp_path / "in", as_vectors(columns["id"], columns["vector"]))
    again = vitrt("export", output, "--to", "parquet")
    assert again.code == 1 and "out.parquet exists" in again.err
    assert vitrt("export", output, "--to", "parquet", "--overwrite").code == 0
    other = vitrt("export", output, "--to", "parquet", "--output", tmp_path / "other.parquet")
    assert other.code == 0 and pq.read_table(tmp_path / "other.parquet").num_rows == 7


def test_export_to_lance(output: Path, tmp_path: Path, vitrt: Vitrt) -> None:
    lance = pytest.importorskip("lance")
    for more in ([], ["--overwrite"]):
        assert vitrt("export", output, "--to", "lance", *more).code == 0
        columns = lance.dataset(str(tmp_path / "out.lance")).to_table().to_pydict()
        assert_vectors_of(tmp_path / "in", as_vectors(columns["id"], columns["vector"]))


def test_nothing_else_is_replaced(output: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    cases: list[tuple[TableFormat, Path]] = [("lance", tmp_path / "in"), ("parquet", output)]
    for kind, target in cases:
        with pytest.raises(ValueError, match=f"{target} is no {kind} table"):
            export_vectors(output, kind, target, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_export_leaves_what_was_there(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, _ = export_vectors(output, "parquet")
    before = target.read_bytes()
    sorted(output.glob("features-*"))[-1].unlink()
    with pytest.raises(FileNotFoundError):
        export_vectors(output, "parquet", overwrite=True)
    assert target.read_bytes() == before
    assert not list(tmp_path.glob(".*partial"))


def test_a_full_disk_is_told_with_the_name_of_the_table(output: Path, tmp_path: Path) -> None:
    target, _ = export_vectors(output, "parquet")
    before = target.read_bytes()
    with file_size_limit(100), pytest.raises(OutputError, match=r"cannot write .*out\.parquet: "):
        export_vectors(output, "parquet", overwrite=True)
    assert target.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_runs_whose_names_begin_alike_are_exported_side_by_side(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named, pid = os.replace, os.getpid()

    def another_process_first(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", named)
        monkeypatch.setattr(os, "getpid", lambda: pid + 1)
        export_vectors(output, "parquet", tmp_path / "run.2.parquet")
        named(source, target)

    monkeypatch.setattr(os, "replace", another_process_first)
    export_vectors(output, "parquet", tmp_path / "run.1.parquet")
    for number in (1, 2):
        assert pq.read_table(tmp_path / f"run.{number}.parquet").num_rows == 7


def test_a_path_is_no_url(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vitrt: Vitrt
) -> None:
    monkeypatch.chdir(tmp_path)
    done = vitrt("export", output, "--to", "parquet", "--output", "file:x.parquet")
    assert done.code == 0 and pq.read_table(tmp_path / "file:x.parquet").num_rows == 7
    done = vitrt("export", output, "--to", "parquet", "--output", "none/x.parquet")
    assert done.code == 1 and "none/x.parquet lies in a folder that does not exist" in done.err


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="not an output folder"):
        export_vectors(tmp_path, "parquet")
    for read in (FeatureStore, check_folder):
        with pytest.raises(ValueError, match="nowhere: no such folder"):
            read(tmp_path / "nowhere")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest-00000.jsonl").touch()
    with pytest.raises(ValueError, match="out holds no image"):
        export_vectors(tmp_path / "out", "parquet")
    for missing, extra in (("lance", "lance"), ("pyarrow", "data")):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(ValueError, match=rf"pip install 'vitrt\[{extra}\]'"):
            export_vectors(tmp_path / "out", "lance")
