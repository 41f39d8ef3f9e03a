"""A path on this machine or a URL that fsspec knows: opened, described, listed, read in parts."""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from hashlib import blake2b
from math import isfinite
from typing import Any, BinaryIO
from urllib.parse import urlsplit
from urllib.request import url2pathname

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TIMES = (
    "mtime",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "last-modified",
    "updated",
    "modified",
    "modify",
    "timeModified",
)
_TAGS = ("ETag", "etag", "version_id", "blob_id", "md5Hash", "content_md5", "sha", "checksum")
_STREAM_BYTES = 8 << 20  # of one request, while a file is read from end to end


def is_url(text: str) -> bool:
    return _URL.match(text) is not None


def local_path(argument: str) -> str:
    """The path that a file:// URL names; anything else as it is."""
    return url2pathname(urlsplit(argument).path) if argument.startswith("file://") else argument


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    ValueError for a protocol that fsspec does not know, ImportError where its package is missing.
    """
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    return system, path


def open_location(location: str) -> BinaryIO:
    """The file, opened to be read from end to end."""
    if not is_url(location):
        return open(location, "rb")
    system, path = filesystem(location)
    file: BinaryIO = system.open(path, "rb", block_size=_STREAM_BYTES, cache_type="readahead")
    return file


def read_part(location: str, start: int, size: int) -> bytes:
    """`size` bytes from `start`; OSError where there are fewer."""
    data = AHEAD.take(location, start)
    if data is not None:
        return data
    if is_url(location):
        system, path = filesystem(location)
        data = bytes(system.cat_file(path, start=start, end=start + size))
    else:
        with open(location, "rb", buffering=0) as file:
            data = _read_at(file.fileno(), start, size)
    if len(data) != size:
        raise OSError(f"{location} ends {size - len(data)} bytes too early: it has changed")
    return data


def _read_at(handle: int, start: int, size: int) -> bytes:
    parts = []
    while size and (part := os.pread(handle, min(size, 1 << 30), start)):
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_whole(url: str) -> bytes:
    system, path = filesystem(url)
    data: bytes = system.cat_file(path)
    return data


def state_of(location: str) -> tuple[int, float]:
    """Size in bytes and mtime in seconds of a file."""
    if is_url(location):
        system, path = filesystem(location)
        return remote_state(system.info(path))
    status = os.stat(location)
    return status.st_size, status.st_mtime


def remote_state(info: Mapping[str, Any]) -> tuple[int, float]:
    """Size and mtime out of a file system's description of a file, whatever names it uses.

    Where it gives no time, the mtime is a number that changes with its tag of the content.
    """
    size = int(info.get("size") or 0)
    times = (_seconds(info.get(key)) for key in _TIMES)
    if (changed := next((time for time in times if time is not None), None)) is not None:
        return size, changed
    for key in _TAGS:
        if info.get(key):
            tag = blake2b(str(info[key]).encode(), digest_size=6)
            return size, float(int.from_bytes(tag.digest(), "little"))
    return size, _seconds(info.get("created")) or 0.0  # changes where files are written as a whole


def _seconds(value: Any) -> float | None:
    """A time as ISO 8601, RFC 1123 or a number say it, or a datetime; None where it is none.

    Where no zone is given it is UTC, so that every host finds the same.
    """
    if isinstance(value, str):
        value = _parse_time(value.strip())
    if isinstance(value, datetime):
        zone = value.tzinfo or timezone.utc
        return value.replace(tzinfo=zone).timestamp()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and isfinite(value) else None


def _parse_time(text: str) -> float | datetime | None:
    with suppress(ValueError):
        return float(text)
    with suppress(ValueError):
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    with suppress(ValueError, TypeError):  # older Pythons raise a TypeError
        return parsedate_to_datetime(text)
    return None


def walk_remote(
    url: str, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Name below `url`, URL and fsspec's description of every file: sorted, files before folders.

    Hidden files and folders are left out. OSError where a folder cannot be listed.
    """
    system, root = filesystem(url)
    system.invalidate_cache()
    folders = [("", root.rstrip("/"))]
    while folders and not should_stop():
        prefix, folder = folders.pop()
        inner = []
        for info in sorted(system.ls(folder, detail=True), key=lambda info: info["name"]):
            path = str(info["name"]).rstrip("/")
            name = path.rpartition("/")[2]
            if path == folder or name.startswith("."):  # object stores may list the folder itself
                continue
            if info["type"] == "directory":
                inner.append((f"{prefix}{name}/", path))
            else:
                yield prefix + name, system.unstrip_protocol(path), info
        folders += reversed(inner)


class ReadAhead:
    """Parts of files that a listing has passed, kept until somebody loads them or room runs out."""

    def __init__(self, most_bytes: int = 256 << 20) -> None:
        self._most = most_bytes
        self._parts: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, location: str, start: int, data: bytes) -> None:
        with self._lock:
            self._remove((location, start))
            self._parts[location, start] = data
            self._bytes += len(data)
            while self._bytes > self._most:
                self._remove(next(iter(self._parts)))

    def take(self, location: str, start: int) -> bytes | None:
        with self._lock:
            return self._remove((location, start))

    def _remove(self, key: tuple[str, int]) -> bytes | None:
        data = self._parts.pop(key, None)
        self._bytes -= len(data or b"")
        return data


AHEAD = ReadAhead()  # of remote archives, which are read from end to end to be listed
