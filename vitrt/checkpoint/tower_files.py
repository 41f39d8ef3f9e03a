"""Which files of a checkpoint hold the vision tower, and under which names.

Other models hold the same towers under other names (`visual.`, `model.visual.`, `thinker.visual.`,
`vlm.model.visual.`, none in an extracted tower), so what stands before a tower's own names is found
out, not known.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitrt.checkpoint.scaled import check_storage
from vitrt.checkpoint.shards import CheckpointError, TensorInfo, read_header
from vitrt.messages import counted, reason_of

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"  # of a PEFT adapter, which is no checkpoint by itself

ShardNames = dict[str, dict[str, str]]  # file -> name in the tower -> name in the file


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError names the file that is missing or no such thing."""
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {reason_of(error)}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: must hold a JSON object")
    return data


def taken_for(folder: Path) -> str:
    """What a folder without a config seems to be, and what to give instead; for a message."""
    if (folder / ADAPTER_CONFIG).is_file():
        base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        return (
            f"; it is an adapter ({ADAPTER_CONFIG}) over the checkpoint {base!r}: give that as the "
            "model, and this as the adapter"
        )
    if snapshots := sorted(folder.glob(f"snapshots/*/{CONFIG}")):
        repo = folder.name.removeprefix("models--").replace("--", "/")
        return (
            f"; it is the hub's cache of one repository: give its id, {repo}, or one of its "
            f"snapshots, {snapshots[-1].parent}"
        )
    cached = sorted([*folder.glob("models--*"), *folder.glob("hub/models--*")])
    if cached:
        repos = [path.name.removeprefix("models--").replace("--", "/") for path in cached[:5]]
        return f"; it is the hub's cache: give the id of a repository in it, as {', '.join(repos)}"
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    return f"; there is one in {', '.join(inside[:5])}" if inside else ""


def prefixes(names: Iterable[str], own: Iterable[str]) -> dict[str, list[str]]:
    """Prefix -> those of a tower's `own` names that `names` have after it."""
    wanted = set(own)
    parts = {f".{name.split('.')[0]}." for name in wanted}
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if not any(part in f".{name}" for part in parts):  # most of 100,000 names
            continue
        at = 0
        while name[at:] not in wanted and (at := name.find(".", at) + 1):
            pass
        if at or name in wanted:
            found[name[:at]].append(name[at:])
    return dict(found)


@dataclass(frozen=True, slots=True)
class TowerSearch:
    """A tower to look for among the tensors of a checkpoint."""

    where: str  # for messages: the folder or the repository
    shapes: Mapping[str, tuple[int, ...]]  # of the tower's tensors, by their own names
    quantization: Mapping[str, Any] = field(default_factory=dict)  # config.json's own word on it

    def in_folder(self, folder: Path) -> dict[str, TensorInfo]:
        """The vision tensors of a folder by name in the tower; none where it has no weights at all.

        `model.safetensors` comes before an index, as in transformers; without either, every
        `*.safetensors` is looked into.
        """
        if (folder / SINGLE).is_file():
            return self.in_files([folder / SINGLE])
        if (folder / INDEX).is_file():
            return self.in_shards(folder, self.shards_of_index(read_json(folder / INDEX)))
        files = sorted(folder.glob("*.safetensors"))
        if files := [file for file in files if not file.name.startswith("adapter_")]:
            return self.in_files(files)
        others = sorted(
            file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind)
        )
        if others:
            raise CheckpointError(
                f"{folder}: holds {', '.join(others)} but no safetensors; only safetensors are "
                "read (transformers' save_pretrained writes them)"
            )
        return {}

    def shards_of_index(self, index: Mapping[str, Any]) -> ShardNames:
        """The shards with vision tensors, from model.safetensors.index.json."""
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise CheckpointError(f"{self.where}: {INDEX} holds no weight_map")
        for shard in weight_map.values():
            plain = isinstance(shard, str) and shard and Path(shard).name == shard
            if not plain or "\\" in shard:
                raise CheckpointError(
                    f"{self.where}: {INDEX} names {shard!r}, which is no file of its folder"
                )
        return self.by_shard(weight_map.items())

    def by_shard(self, names: Iterable[tuple[str, str]]) -> ShardNames:
        """(tensor, shard) pairs -> the tower's tensors of each shard that has any."""
        pairs = list(names)
        prefix = self._prefix([full_name for full_name, _ in pairs])
        parts = {name.split(".")[0] for name in self.shapes}
        shards: ShardNames = defaultdict(dict)
        twice = []
        seen = set()
        for full_name, shard in pairs:
            name = full_name.removeprefix(prefix)
            # A tower without a prefix may share its file with others.
            if full_name.startswith(prefix) and (prefix or name.split(".")[0] in parts):
                shards[shard][name] = full_name
                if name in seen:
                    twice.append(full_name)
                seen.add(name)
        if twice:
            raise CheckpointError(f"{self.where}: given more than once: {', '.join(sorted(twice))}")
        return dict(shards)

    def _prefix(self, names: list[str]) -> str:
        """The one prefix under which most of the tower is there."""
        found = prefixes(names, self.shapes)
        if not found:
            raise CheckpointError(f"{self.where}: no vision tensors: {self._closest(names)}")
        most = max(len(own) for own in found.values())
        # Parts of another network may bear a few of a tower's names, say blocks.0.norm1.weight.
        rivals = sorted(prefix for prefix, own in found.items() if 2 * len(own) > most)
        if len(rivals) > 1:
            raise CheckpointError(
                f"{self.where}: holds more than one such tower, under "
                + " and ".join(
                    f"{prefix!r} ({counted(len(found[prefix]), 'tensor')})" for prefix in rivals
                )
            )
        return rivals[0]

    def _closest(self, names: list[str]) -> str:
        """What the names look like, for a message that they are not a tower's."""
        ours = ", ".join(list(self.shapes)[:3])
        starts = sorted({name.split(".")[0] for name in names})
        text = f"no name ends in one of its tower's ({ours}, ...); names start with "
        text += ", ".join(starts[:20])
        if near := sorted(name for name in names if "vis" in name or "patch_embed" in name):
            text += f", and the closest are {', '.join(near[:3])}"
        return text

    def in_files(self, files: Iterable[Path]) -> dict[str, TensorInfo]:
        """The vision tensors of files that no index describes."""
        headers = {file.name: read_header(file) for file in files}
        pairs = [(name, file) for file, header in headers.items() for name in header]
        return self.collect(self.by_shard(pairs), headers)

    def in_shards(self, folder: Path, shards: ShardNames) -> dict[str, TensorInfo]:
        """The vision tensors an index promises, found in the headers of their shards."""
        if missing := sorted(file for file in shards if not (folder / file).is_file()):
            raise CheckpointError(f"{folder}: {INDEX} names missing shards: {', '.join(missing)}")
        return self.collect(shards, {file: read_header(folder / file) for file in sorted(shards)})

    def collect(
        self, shards: ShardNames, headers: Mapping[str, Mapping[str, TensorInfo]]
    ) -> dict[str, TensorInfo]:
        """The tensors that `shards` names, by name in the tower, out of the headers of those files.

        Raises CheckpointError where one is not there, or stored in a way that cannot be read.
        """
        absent = [
            f"{full_name} in {file}"
            for file, names in shards.items()
            for full_name in names.values()
            if full_name not in headers[file]
        ]
        if absent:
            raise CheckpointError(
                f"{self.where}: {INDEX} names tensors not there: {', '.join(absent)}"
            )
        tensors = {
            name: headers[file][full_name]
            for file, names in shards.items()
            for name, full_name in names.items()
        }
        check_storage(tensors, self.quantization, self.where)
        return tensors
