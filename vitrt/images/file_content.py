"""The content of an image's file, by its path or URL.

A `file:` URL names a file of this machine; a `data:` URL holds the content itself. Anything else
with a scheme is not fetched: whoever wants that opens it, with fsspec for example, and hands over
the open file.
"""

from __future__ import annotations

import base64
import io
import os
import re
import stat
from urllib.parse import unquote, unquote_to_bytes

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # one letter alone is a drive of Windows


def content_of(image: str | os.PathLike[str] | bytes) -> str | io.BytesIO:
    """The path of an image's file, or its content, as Pillow opens it.

    Raises:
        ValueError: an empty file, a URL that nothing is read from, one with broken content.
        OSError: there is no such file, or it is not a regular one.
    """
    if isinstance(image, bytes):
        content = image
    else:
        path = os.fsdecode(image)
        scheme = _SCHEME.match(path) if isinstance(image, str) else None
        kind = scheme[1].lower() if scheme else ""
        if kind == "data":
            content = _data(path[len("data:") :])
        else:
            if kind == "file":
                path = _local_path(path[len("file:") :])
            if kind in ("", "file") or os.path.exists(path):
                if _file_length(path) == 0:
                    raise ValueError("empty (0 bytes)")
                return path
            raise ValueError(
                f"No such file, and a {kind}: URL is not fetched: download it, or pass the open "
                "file, as in fsspec.open(url)"
            )
    if not content:
        raise ValueError("empty (0 bytes)")
    return io.BytesIO(content)


def first_bytes(content: str | io.BytesIO) -> bytes:
    """The start of a file, or of its content: enough to tell formats apart."""
    if isinstance(content, io.BytesIO):
        return content.getvalue()[:16]
    with open(content, "rb") as file:
        return file.read(16)


def _data(text: str) -> bytes:
    """The content of a `data:` URL, after the scheme: [type][;parameter]*[;base64],content."""
    head, comma, body = text.partition(",")
    if not comma:
        raise ValueError("a data: URL has a comma before its content")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        # Percent signs and line breaks are allowed in it, and neither is base64.
        return base64.b64decode(re.sub(rb"\s", b"", unquote_to_bytes(body)), validate=True)
    except ValueError as error:
        raise ValueError(f"its base64 content is broken: {error}") from error


def _local_path(text: str) -> str:
    """The path of a `file:` URL, after the scheme: /path, //localhost/path or ///path."""
    host, path = "", text
    if text.startswith("//"):
        host, slash, rest = text[2:].partition("/")
        path = slash + rest
    if host.lower() not in ("", "localhost"):
        raise ValueError(f"a file: URL of another machine, {host!r}, is not read")
    return unquote(path, errors="surrogateescape")


def _file_length(path: str) -> int:
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError("it is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is not a regular file")  # opening a pipe would wait for ever
    return status.st_size
