"""What messages show."""

from __future__ import annotations

import pytest

from vitrt.messages import counted, reason_of, shorten


def test_counted() -> None:
    assert [counted(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]


def test_long_texts_keep_both_ends() -> None:
    assert shorten("x" * 200) == "x" * 200
    shown = shorten("a" * 150 + "z" * 51)
    assert shown == f"{'a' * 100}...{'z' * 20} (201 characters)"
    assert shorten("x" * 300, 300) == "x" * 300


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError(2, "No such file", "a.png"), "No such file"),
        (OSError("of a library, without a number"), "of a library, without a number"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_reasons(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason
