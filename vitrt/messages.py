"""How messages show things: numbers with what they count, long texts cut, errors in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_LONGEST_SHOWN = 200


def counted(number: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shorten(text: str, longest: int = _LONGEST_SHOWN) -> str:
    """The text; one of more than `longest` characters by its start and its end."""
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
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
