"""Which files of a checkpoint hold the vision tower, and under which names.

A name's prefix is `visual.` (Qwen2.5-VL), `model.visual.` (Qwen3-VL), or none (an extracted tower).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vitrt.checkpoint.shards import FLOAT_DTYPES, CheckpointError, TensorInfo, read_header

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"  # newer transformers nest the image processor in it
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_PREFIXES = ("model.visual.", "visual.")
_PARTS = ("patch_embed.", "pos_embed.", "blocks.", "merger.", "deepstack_merger_list.")

ShardNames = dict[str, dict[str, str]]  # file -> name in the tower -> name in the file


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError names the file that is missing or no such thing."""
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: must hold a JSON object")
    return data


def tower_name(name: str) -> str | None:
    """A tensor's name without the tower's prefix; None for a tensor of anything else."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name if name.startswith(_PARTS) else None


def shards_of_index(index: Mapping[str, Any], where: str) -> ShardNames:
    """The shards with vision tensors, from model.safetensors.index.json."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{where}: {INDEX} holds no weight_map")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard or "\\" in shard:
            raise CheckpointError(
                f"{where}: {INDEX} names {shard!r}, which is no file of its folder"
            )
    return group_by_shard(weight_map.items(), where)


def group_by_shard(names: Iterable[tuple[str, str]], where: str) -> ShardNames:
    """(tensor, shard) pairs -> the vision tensors of each shard that has any."""
    pairs = list(names)
    shards: ShardNames = defaultdict(dict)
    times: Counter[str] = Counter()
    for full_name, shard in pairs:
        if (name := tower_name(full_name)) is not None:
            shards[shard][name] = full_name
            times[name] += 1
    if not shards:
        seen = sorted({full_name.split(".")[0] for full_name, _ in pairs})
        raise CheckpointError(
            f"{where}: no vision tensors: names start with {', '.join(seen[:20])}; "
            "a tower's start with visual., model.visual. or patch_embed."
        )
    if twice := sorted(name for name, count in times.items() if count > 1):
        raise CheckpointError(f"{where}: given more than once: {', '.join(twice)}")
    return dict(shards)


def find_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The vision tensors of a folder by name in the tower; none where it has no weights at all.

    `model.safetensors` comes before an index, as in transformers; without either, every
    `*.safetensors` is looked into.
    """
    if (folder / SINGLE).is_file():
        return tensors_of_files([folder / SINGLE], str(folder))
    if (folder / INDEX).is_file():
        shards = shards_of_index(read_json(folder / INDEX), str(folder))
        return tensors_of_shards(folder, shards)
    if files := sorted(folder.glob("*.safetensors")):
        return tensors_of_files(files, str(folder))
    others = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind))
    if others:
        raise CheckpointError(
            f"{folder}: holds {', '.join(others)} but no safetensors; only safetensors are read "
            "(transformers' save_pretrained writes them)"
        )
    return {}


def tensors_of_files(files: Iterable[Path], where: str) -> dict[str, TensorInfo]:
    """The vision tensors of files that no index describes."""
    headers = {file.name: read_header(file) for file in files}
    pairs = [(name, file) for file, header in headers.items() for name in header]
    shards = group_by_shard(pairs, where)
    return collect(shards, headers, where)


def tensors_of_shards(folder: Path, shards: ShardNames) -> dict[str, TensorInfo]:
    """The vision tensors an index promises, found in the headers of their shards."""
    if missing := sorted(file for file in shards if not (folder / file).is_file()):
        raise CheckpointError(f"{folder}: {INDEX} names missing shards: {', '.join(missing)}")
    headers = {file: read_header(folder / file) for file in sorted(shards)}
    return collect(shards, headers, str(folder))


def collect(
    shards: ShardNames, headers: Mapping[str, Mapping[str, TensorInfo]], where: str
) -> dict[str, TensorInfo]:
    """The tensors that `shards` names, by name in the tower, out of the headers of those files."""
    absent = [
        f"{full_name} in {file}"
        for file, names in shards.items()
        for full_name in names.values()
        if full_name not in headers[file]
    ]
    if absent:
        raise CheckpointError(f"{where}: {INDEX} names tensors not there: {', '.join(absent)}")
    tensors = {
        name: headers[file][full_name]
        for file, names in shards.items()
        for name, full_name in names.items()
    }
    check_dtypes(tensors, where)
    return tensors


def check_dtypes(tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Refuse a tower that is not stored in floating point, naming every such tensor."""
    wrong = [
        f"{info.full_name} ({info.dtype})"
        for info in tensors.values()
        if info.dtype not in FLOAT_DTYPES
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: the tower must be {', '.join(FLOAT_DTYPES)}, not quantised or integer: "
            + ", ".join(wrong)
        )
