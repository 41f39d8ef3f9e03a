"""How messages show things: numbers with what they count, long texts cut, errors in one line."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping, Sequence

_LONGEST_SHOWN = 200
# What ends a line, moves a terminal's cursor or is half a character: names of files may hold them.
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def counted(number: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def one_line(text: str) -> str:
    """The text, its control characters and lone surrogates as escapes.

    A byte that is no UTF-8, of which Python makes a surrogate, is written as \\xNN.
    """
    return _NO_TEXT.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ascii(found[0])[1:-1]


def shorten(text: str, longest: int = _LONGEST_SHOWN) -> str:
    """The text in one line; one of more than `longest` characters by its start and its end."""
    text = one_line(text)
    if len(text) <= longest:
        return text
    return f"{text[:100]}...{text[-20:]} ({len(text)} characters)"


def listed(found: Mapping[str, Sequence[str]]) -> str:
    """A line for each kind of which there are any: "\\n  missing (2): one, other"."""
    return "".join(
        f"\n  {kind} ({len(names)}): {', '.join(names)}" for kind, names in found.items() if names
    )


def reason_of(error: Exception) -> str:
    """Why something could not be had: what the system says, or the error's own text."""
    if isinstance(error, FileNotFoundError) and error.errno is None:
        # fsspec's, which names a path and no reason; for a server without an answer it has a cause.
        cause = error.__cause__
        return reason_of(cause) if isinstance(cause, Exception) else os.strerror(errno.ENOENT)
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
