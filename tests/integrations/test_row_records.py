"""What tables hold as images, as records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.folders import photo
from vitrt.images.processor import ImageProcessor
from vitrt.integrations.row_records import row_record
from vitrt.job.run import prepare_with

PROCESSOR = ImageProcessor(16, 2, 2, min_pixels=32 * 32, max_pixels=1 << 16)


def test_every_kind_of_image_is_the_same_image(tmp_path: Path) -> None:
    path = photo(tmp_path / "a.png", 1)
    pixels = np.asarray(PROCESSOR.prepare(path).pixels[0])
    content = path.read_bytes()
    kinds: list[Any] = [
        str(path),
        path.as_uri(),
        content,
        {"bytes": content, "path": None},
        {"bytes": None, "path": str(path)},
    ]
    for kind in kinds:
        record = row_record("a", kind)
        assert (record.id, record.problem) == ("a", None)
        prepared = prepare_with(PROCESSOR.prepare)(record)
        np.testing.assert_array_equal(prepared.pixels[0], pixels)
    array = row_record(7, pixels)
    assert (array.id, array.size) == ("7", pixels.nbytes)
    prepared = prepare_with(PROCESSOR.prepare)(array)
    np.testing.assert_array_equal(prepared.pixels[0], pixels)


def test_the_state_of_a_path_is_the_files(tmp_path: Path) -> None:
    path = photo(tmp_path / "a.png", 1)
    record, status = row_record("a", str(path)), path.stat()
    assert (record.size, record.mtime) == (status.st_size, status.st_mtime)
    assert row_record("a", b"12345").size == 5
    assert row_record("a", "memory://b/c.png").place == ("url", "memory://b/c.png")


@pytest.mark.parametrize(
    ("image_id", "image", "words"),
    [
        ("", b"x", "its id is ''"),
        (None, b"x", "its id is None"),
        (1.5, b"x", "its id is 1.5"),
        (True, b"x", "its id is True"),
        ("a", None, "no image"),
        ("a", math.nan, "a: expected a path"),  # a table's missing value
        ("a", {"bytes": None, "path": 5}, "a: expected a path"),
        ("a", {"bytes": 7, "path": None}, "bytes is a int"),
        ("a", "/no/such/file", "/no/such/file|No such file"),
        ("a", "x\0.png", "a: cannot be read as an image: embedded null byte"),
        (
            "a",
            {"bytes": None, "path": "\ud800.png"},
            "a: cannot be read as an image: 'utf",
        ),
    ],
)
def test_what_is_no_image_has_an_error(image_id: Any, image: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prepare_with(PROCESSOR.prepare)(row_record(image_id, image))
