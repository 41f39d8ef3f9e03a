"""An id and an image in one row of a table, in whatever form tables have them -> a record."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitrt.config import is_integer
from vitrt.images.inputs import BYTES
from vitrt.sources.folder import id_from
from vitrt.sources.record import Record


@dataclass(frozen=True, slots=True)
class _RowImage(Record):
    """An image that a row holds itself."""

    image: Any = None

    def load(self) -> Any:
        return self.image


def row_record(image_id: Any, image: Any) -> Record:
    """The record of an image: a path, a URL of fsspec's, bytes, an array, or datasets' struct.

    Where the id or the image is none, `problem` says so.
    """
    is_id = is_integer(image_id) or (isinstance(image_id, str | np.integer) and image_id != "")
    name = id_from(str(image_id))
    problem = None if is_id else f"its id is {image_id!r}, which is no id"
    if image is None:
        problem = "it has no image (null)"
    if isinstance(image, Mapping) and image.get("bytes") is None and image.get("path"):
        image = image["path"]
    if problem is None and isinstance(image, str):
        return _of_path(name, image)
    content = image.get("bytes") if isinstance(image, Mapping) else image
    size = len(content) if isinstance(content, BYTES) else 0
    if isinstance(content, np.ndarray):
        size = content.nbytes
    return _RowImage(name, f"row {name}", size, problem=problem, image=image)


def _of_path(name: str, path: str) -> Record:
    if "://" in path and not path.startswith("file:"):
        return Record(name, path, place=("url", path))
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # as of a NUL byte; preparing it says what is wrong
        return Record(name, path)
    return Record(name, path, status.st_size, status.st_mtime)
