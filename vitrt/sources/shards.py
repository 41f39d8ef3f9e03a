"""INPUTs whose images have no files of their own on this machine: shards and URLs.

A shard is a tar, a Parquet file or an Arrow file of a Hugging Face dataset on disk. A folder stands
for the shards in it and below where its own files are such and none is an image; the folder of a
dataset stands for the files that it names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vitrt.messages import reason_of
from vitrt.sources.folder import FileFilter, id_from, is_image_name, shown
from vitrt.sources.location import filesystem, is_url, open_location, walk_remote
from vitrt.sources.options import SourceOptions
from vitrt.sources.record import InputError, Record, remote_record
from vitrt.sources.rows import image_column, row_records
from vitrt.sources.tar import check_tar, tar_records

SUFFIXES = (".tar", ".parquet", ".arrow")
_TAR, _PARQUET, _ARROW = SUFFIXES
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

Shard = tuple[str, str]  # what its ids begin with, and its path or URL


class Shards:
    """Shards, one after the other."""

    def __init__(
        self, path: str, shards: Sequence[Shard], options: SourceOptions, file_filter: FileFilter
    ) -> None:
        """InputError where the first of them cannot be used."""
        self.path = path
        self.shards = shards
        self._options = options
        self._file_filter = file_filter
        self._locations = dict(shards)
        location = shards[0][1]
        try:
            if _suffix(location) == _TAR:
                check_tar(location)
            else:
                image_column(location, options)
        except Exception as error:  # of many kinds: a server's, pyarrow's
            raise InputError(
                f"INPUT {shown(location)} cannot be used: {reason_of(error)}"
            ) from error

    @property
    def has_rows(self) -> bool:
        return any(_suffix(location) != _TAR for _, location in self.shards)

    def records(self, should_stop: Callable[[], bool]) -> Iterator[Record]:
        """Their images; a shard that cannot be read on gives a record that says so."""
        for prefix, location in self.shards:
            if should_stop():
                return
            try:
                if _suffix(location) == _TAR:
                    yield from tar_records(location, prefix, self._file_filter, should_stop)
                else:
                    yield from row_records(location, prefix, self._options, should_stop)
            except Exception as error:
                problem = f"the file cannot be read: {reason_of(error)}"
                yield Record(id_from(prefix), location, problem=problem)

    def path_of(self, image_id: str) -> str | None:
        """The shard whose images have ids like this one."""
        prefix = image_id
        while "/" in prefix:
            prefix = prefix.rpartition("/")[0]
            if prefix in self._locations and self._options.id_column is None:
                return self._locations[prefix]
        return None


class RemoteFolder:
    """The images below a URL."""

    def __init__(self, url: str, file_filter: FileFilter) -> None:
        self.path = url
        self._file_filter = file_filter
        self._ids: set[int] | None = None

    def keep_ids(self) -> None:
        """Remember what is listed, for `path_of`: asking the server for each would take hours."""
        self._ids = set()

    def records(self, should_stop: Callable[[], bool]) -> Iterator[Record]:
        try:
            for name, url, info in walk_remote(self.path, should_stop):
                if self._file_filter.takes(name):
                    record = remote_record(id_from(name), url, info)
                    if self._ids is not None:
                        self._ids.add(hash(record.id))
                    yield record
        except Exception as error:
            yield Record(".", self.path, problem=f"a folder cannot be listed: {reason_of(error)}")

    def path_of(self, image_id: str) -> str | None:
        return f"{self.path}/{image_id}" if hash(image_id) in (self._ids or ()) else None


class RemoteFile:
    """An image at a URL."""

    def __init__(self, url: str, info: dict[str, Any]) -> None:
        self.path = url
        self.id = id_from(url.rpartition("/")[2])
        self._info = info

    def record(self) -> Record:
        return remote_record(self.id, self.path, self._info)


def remote_part(
    url: str, options: SourceOptions, file_filter: FileFilter
) -> Shards | RemoteFolder | RemoteFile:
    """What a URL stands for; InputError where nothing is there, or it cannot be reached."""
    try:
        if "*" in url or "[" in url:  # a question mark begins a query
            shards = _matching(url)
        else:
            system, path = filesystem(url)
            info = system.info(path)
            if info["type"] != "directory" and not url.lower().endswith((*SUFFIXES, *_COMPRESSED)):
                return RemoteFile(url, info)
            shards = find_shards(url, is_folder=info["type"] == "directory")
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError) and _is_absent(error):
            raise InputError(f"INPUT {shown(url)} does not exist") from error
        raise InputError(f"INPUT {shown(url)} cannot be opened: {reason_of(error)}") from error
    return Shards(url, shards, options, file_filter) if shards else RemoteFolder(url, file_filter)


def _is_absent(error: FileNotFoundError) -> bool:
    """Whether a server said so: fsspec calls one that gave no answer by the same name."""
    cause = error.__cause__
    answer = getattr(cause, "response", cause)
    status = getattr(answer, "status", None) or getattr(answer, "status_code", None)
    return cause is None or status in (404, 410)


def find_shards(argument: str, *, is_folder: bool) -> list[Shard]:
    """The shards that a path or URL stands for; none where it is something else."""
    argument = argument.rstrip("/") or argument
    name = os.path.basename(argument)
    if not is_folder:
        if name.lower().endswith(_COMPRESSED):
            raise InputError(
                f"INPUT {shown(argument)} is a compressed tar: unpack it to .tar, whose "
                "members can be read one by one"
            )
        return [(name, argument)] if is_shard_name(name) else []
    own = set()
    for name in _own_names(argument):
        if is_image_name(name):
            return []
        if _suffix(name) in (_TAR, _PARQUET, ".json"):
            own.add(name)
    if "dataset_dict.json" in own:
        splits = json.loads(_read(f"{argument}/dataset_dict.json"))["splits"]
        return [
            (f"{split}/{name}", location)
            for split in splits
            for name, location in _dataset_files(f"{argument}/{split}")
        ]
    if {"state.json", "dataset_info.json"} <= own:
        return _dataset_files(argument)
    if not any(_suffix(name) in (_TAR, _PARQUET) for name in own):
        return []
    shards = []
    for name, location in _files_below(argument):
        if is_image_name(name) or name.lower().endswith(_COMPRESSED):
            raise InputError(
                f"INPUT {shown(argument)} is a folder of shards, and {shown(name)} in it is none: "
                "give the shards and what else is to be encoded as INPUTs of their own"
            )
        if _suffix(name) in (_TAR, _PARQUET):
            shards.append((name, location))
    return shards


def is_shard_name(name: str) -> bool:
    return _suffix(name) in SUFFIXES


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _dataset_files(folder: str) -> list[Shard]:
    """The data files of a dataset on disk, as its state.json lists them."""
    state = json.loads(_read(f"{folder}/state.json"))
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise InputError(
            f"INPUT {shown(folder)} holds a selection of another dataset's rows: save it with "
            "flatten_indices()"
        )
    names = [file["filename"] for file in state["_data_files"]]
    return [(name, f"{folder}/{name}") for name in names]


def _matching(url: str) -> list[Shard]:
    system, path = filesystem(url)
    found = map(system.unstrip_protocol, sorted(system.glob(path)))
    shards = [shard for match in found for shard in find_shards(match, is_folder=False)]
    if not shards:
        raise InputError(f"INPUT {shown(url)} matches no .tar or .parquet file")
    return shards


def _own_names(folder: str) -> Iterator[str]:
    """The names of what lies in a folder itself; none where that cannot be listed."""
    if is_url(folder):
        system, path = filesystem(folder)
        for name in system.ls(path, detail=False):
            yield str(name).rstrip("/").rpartition("/")[2]
        return
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries if not entry.name.startswith("."))
    except OSError:
        return  # walking the folder reports it


def _files_below(folder: str) -> Iterator[Shard]:
    if is_url(folder):
        yield from ((name, url) for name, url, _ in walk_remote(folder))
        return
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            location = os.path.join(path, name)
            if not name.startswith("."):
                yield id_from(os.path.relpath(location, folder)), location


def _read(location: str) -> bytes:
    with open_location(location) as file:
        return file.read()
