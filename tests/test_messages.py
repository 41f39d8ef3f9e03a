"""What messages show."""

from __future__ import annotations

import os

import pytest
import torch

from vitrt.features import EncoderOutput, ImageFeatures
from vitrt.messages import counted, reason_of, shorten


def test_counted() -> None:
    assert [counted(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]


def test_long_texts_keep_both_ends() -> None:
    assert shorten("x" * 200) == "x" * 200
    shown = shorten("a" * 150 + "z" * 51)
    assert shown == f"{'a' * 100}...{'z' * 20} (201 characters)"
    assert shorten("x" * 300, 300) == "x" * 300


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError(2, "No such file", "a.png"), "No such file"),
        (OSError("of a library, without a number"), "of a library, without a number"),
        (AssertionError(), "AssertionError"),
        (FileNotFoundError("s3://bucket/a.png"), "No such file or directory"),
        (caused(FileNotFoundError("http://a"), ConnectionRefusedError(111, "Refused")), "Refused"),
        (caused(FileNotFoundError("b"), FileNotFoundError("b")), "No such file or directory"),
    ],
)
def test_reasons(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason


def test_features_are_shown_by_their_shapes() -> None:
    rows = torch.zeros(4, 8)
    features = ImageFeatures(rows, rows[None], (1, 4, 4), times=tuple(map(float, range(500))))
    shown = repr(features)
    assert shown.startswith(
        "ImageFeatures(embeddings=float32 [4, 8], deepstack=float32 [1, 4, 8], "
        "grid_thw=(1, 4, 4), merge_size=2, times=(0.0, 1.0, "
    )
    assert len(shown) < 300
    output = EncoderOutput(rows.bfloat16(), None, torch.tensor([[1, 4, 4]]))
    assert repr(output) == "EncoderOutput(embeddings=bfloat16 [4, 8], grid_thw=int64 [1, 3])"


def test_names_of_any_bytes_are_one_line() -> None:
    name = os.fsdecode(b"a\n\x1b[31mb\t\xff\xc2\x9b\\ \xc3\xa9.png")
    assert shorten(name) == "a\\n\\x1b[31mb\\t\\xff\\x9b\\ é.png"
    assert shorten("\ud800\u2028") == "\\ud800\\u2028"
