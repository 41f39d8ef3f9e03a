"""`vitrt check` finds each thing that can be wrong with an output folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tests.support.folders import IDENTITY, assert_holds, encode, expected, photo, photos
from vitrt import FeatureStore
from vitrt.store import feature_shard
from vitrt.store.check import check_folder
from vitrt.store.lock import FolderLock

SHARD = "features-00000-00000.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    encode(photos(tmp_path / "in", 6), tmp_path / "out", shard_mib=1)
    return tmp_path / "out"


def rewrite(output: Path, change: Callable[[Tensors], object], **metadata: str) -> None:
    with safe_open(output / SHARD, framework="pt") as shard:
        tensors = {name: shard.get_tensor(name).clone() for name in shard.keys()}  # noqa: SIM118
        found = shard.metadata() | metadata
    change(tensors)
    save_file(tensors, output / SHARD, metadata=found)
    relist(output, lambda lines: [line.pop("crc32", None) for line in lines])


def relist(output: Path, change: Callable[[list[dict[str, object]]], object]) -> None:
    path = output / "manifest-00000.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def only_problem(output: Path) -> str:
    (problem,) = check_folder(output).problems
    return problem


def test_clean_folder(output: Path) -> None:
    result = check_folder(output)
    assert result.problems == [] and result.images == 6 and result.shards == 1
    assert result.tokens > 6 and result.bytes == (output / SHARD).stat().st_size
    assert list(result.lines())[-1].endswith("no problem")


def test_safetensors_own_files_pass(output: Path) -> None:
    rewrite(output, lambda tensors: None)  # tensors in another order than ours
    assert check_folder(output).problems == []


@pytest.mark.parametrize("place", [0.9, 0.98])
def test_a_flipped_bit_that_leaves_a_finite_value(output: Path, place: float) -> None:
    shard = bytearray((output / SHARD).read_bytes())
    shard[int(len(shard) * place) // 4 * 4] ^= 1  # the last bit of a float32's fraction
    (output / SHARD).write_bytes(shard)
    assert f"{SHARD}: its bytes have the CRC-32" in only_problem(output)
    relist(output, lambda lines: lines[0].pop("crc32"))  # any line that says it will do
    assert f"{SHARD}: its bytes have the CRC-32" in only_problem(output)
    relist(output, lambda lines: [line.pop("crc32", None) for line in lines])
    result = check_folder(output)
    assert result.problems == [] and result.unsummed == 1
    assert "1 shard without a checksum" in next(result.lines())


def test_what_check_says_to_do_mends_a_damaged_shard(output: Path, tmp_path: Path) -> None:
    shard = bytearray((output / SHARD).read_bytes())
    shard[-1] ^= 1
    (output / SHARD).write_bytes(shard)
    assert "remove it, and the same vitrt encode encodes its images again" in only_problem(output)
    (output / SHARD).unlink()
    encode(tmp_path / "in", output)
    assert_holds(output, expected(tmp_path / "in"))


def test_checksums_outlive_compaction(output: Path, tmp_path: Path) -> None:
    photo(tmp_path / "in/001.png", 99)
    encode(tmp_path / "in", output, shard_mib=1)
    assert not (output / SHARD).exists()  # copied without what was replaced
    result = check_folder(output)
    assert result.problems == [] and result.unsummed == 0 and result.shards == 2


def test_a_folder_without_checksums_is_carried_on(output: Path, tmp_path: Path) -> None:
    relist(output, lambda lines: [line.pop("crc32") for line in lines])
    photo(tmp_path / "in/new.png", 99)
    photo(tmp_path / "in/001.png", 99)
    encode(tmp_path / "in", output, shard_mib=1)
    assert_holds(output, expected(tmp_path / "in"))
    assert check_folder(output).unsummed == 0  # its shard was copied


def test_no_output_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="manifest"):
        check_folder(tmp_path)


def test_missing_tensor(output: Path) -> None:
    rewrite(output, lambda tensors: tensors.pop("000.png/embeddings"))
    assert "'000.png/embeddings'" in only_problem(output)


def test_orphan_tensor(output: Path) -> None:
    rewrite(output, lambda tensors: tensors.update({"other/embeddings": torch.zeros(1, 6)}))
    assert "no manifest line for tensor 'other/embeddings'" in only_problem(output)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(output: Path, value: float) -> None:
    rewrite(output, lambda tensors: tensors["001.png/deepstack"][0, 0].fill_(value))
    assert "001.png/deepstack: 6 of" in only_problem(output)


def test_shapes(output: Path) -> None:
    def cut(tensors: Tensors) -> None:
        tensors["001.png/embeddings"] = tensors["001.png/embeddings"][1:].clone()

    rewrite(output, cut)
    assert "001.png: shape" in only_problem(output)


def test_deepstack_beside_other_embeddings(output: Path) -> None:
    def cut(tensors: Tensors) -> None:
        tensors["001.png/deepstack"] = tensors["001.png/deepstack"][:, 1:].clone()

    rewrite(output, cut)
    assert "001.png: deepstack of shape" in only_problem(output)


def test_an_image_without_its_deepstack(output: Path) -> None:
    rewrite(output, lambda tensors: tensors.pop("001.png/deepstack"))
    assert "0 deepstack levels" in only_problem(output)


def test_dtype(output: Path) -> None:
    def halve(tensors: Tensors) -> None:
        tensors["001.png/embeddings"] = tensors["001.png/embeddings"].half()

    rewrite(output, halve)
    assert "its dtype is F16, its shard says F32" in only_problem(output)


def test_grids(output: Path) -> None:
    rewrite(output, lambda tensors: tensors["001.png/grid_thw"].fill_(8))
    assert "001.png/grid_thw: [8, 8, 8], the manifest says" in only_problem(output)
    relist(output, lambda lines: lines[0].update(tokens=999))
    assert any("999 tokens do not fit" in text for text in check_folder(output).problems)


def test_listed_twice(output: Path) -> None:
    relist(output, lambda lines: lines.append(lines[0]))
    problems = check_folder(output).problems
    assert any("000.png: listed 2 times" in text for text in problems)


def test_not_listed(output: Path) -> None:
    relist(output, lambda lines: lines.pop(0))
    assert len(check_folder(output).problems) == 3  # its three tensors


def test_shards(output: Path) -> None:
    (output / "features-00003-00002.safetensors").write_bytes((output / SHARD).read_bytes())
    assert "features-00003-00002.safetensors: no manifest names it" in only_problem(output)
    (output / "features-00003-00002.safetensors").unlink()
    (output / ".features-00000-00001.tmp").write_bytes(b"")
    assert "leftover" in only_problem(output)
    (output / ".features-00000-00001.tmp").unlink()
    (output / SHARD).write_bytes((output / SHARD).read_bytes()[:-1])
    assert "6 images of features" in only_problem(output)
    (output / SHARD).unlink()
    assert "No such file" in only_problem(output)


def test_two_runs_in_one_folder(output: Path, tmp_path: Path) -> None:
    other = replace(IDENTITY, max_pixels=2048)
    encode(tmp_path / "in", tmp_path / "other", identity=other, rank=1, shard_mib=1)
    for path in (tmp_path / "other").glob("*-00001*"):
        path.rename(output / path.name)
    problems = check_folder(output).problems
    assert any("max_pixels is 2048, in other shards 65536" in text for text in problems)
    assert any("000.png: listed 2 times" in text for text in problems)


def test_pooled(tmp_path: Path) -> None:
    identity = replace(IDENTITY, pool="mean")
    encode(photos(tmp_path / "in", 6), tmp_path / "out", identity=identity, shard_mib=1)
    assert check_folder(tmp_path / "out").problems == []
    rewrite(tmp_path / "out", lambda tensors: tensors["000.png/pooled"].fill_(float("nan")))
    assert "000.png/pooled: 6 of 6" in only_problem(tmp_path / "out")


@pytest.mark.parametrize("metadata", [{"merge_size": "0"}, {"layers": "nonf"}])
def test_impossible_metadata(output: Path, metadata: dict[str, str]) -> None:
    rewrite(output, lambda tensors: None, **metadata)
    (value,) = metadata.values()
    assert "6 images" in only_problem(output) and repr(value) in only_problem(output)


def test_a_shard_that_safetensors_refuses(
    output: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    photo(tmp_path / "more/x.png", 5)
    encode(tmp_path / "more", output, rank=1)

    def refuse(path: Path, framework: str) -> object:
        if path.name == SHARD:
            raise SafetensorError("InvalidOffset")
        return safe_open(path, framework=framework)

    monkeypatch.setattr(feature_shard, "safe_open", refuse)
    result = check_folder(output)
    problem = f"{output / SHARD}: not as vitrt wrote it: InvalidOffset"
    assert result.problems == [f"6 images of {SHARD} are lost: {problem}"]
    assert result.images == 7 and result.shards == 1


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": None},
        {"tokens": True},
        {"grid_thw": [1, 2, "x"]},
        {"grid_thw": [1, 2]},
        {"grid_thw": 3},
        {"replaces": "x"},
        {"replaces": 3},
        {"size": "7"},
        {"mtime": []},
        {"id": 3},
        {"id": "\ud800"},
        {"shard": None},
    ],
)
def test_lines_of_another_type_are_no_entries(output: Path, change: dict[str, object]) -> None:
    relist(output, lambda lines: lines[1].update(change))
    problems = check_folder(output).problems
    assert "manifest-00000.jsonl: 1 line amid its entries, and no entry" in problems
    assert len(problems) == 4  # and its three tensors
    assert len(FeatureStore(output)) == 5


def test_what_a_running_job_has_begun_is_no_problem(output: Path) -> None:
    (output / "features-00000-00001.safetensors").write_bytes(b"not listed yet")
    (output / ".features-00000-00002.tmp").write_bytes(b"")
    manifest = output / "manifest-00000.jsonl"
    manifest.write_bytes(manifest.read_bytes() + b'{"id": "half')
    assert len(check_folder(output).problems) == 3
    with FolderLock(output):
        result = check_folder(output)
        assert result.problems == [] and result.running is not None
        assert f"process {os.getpid()}" in next(result.lines())
        (output / SHARD).unlink()
        assert "No such file" in only_problem(output)  # that is no job's doing
    assert len(check_folder(output).problems) == 4
