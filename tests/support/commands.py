"""Runs the command line inside the test's process, and puts back what it changes globally."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from PIL import Image

from vitrt.cli import main


@dataclass(frozen=True, slots=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


Vitrt = Callable[..., Finished]


@pytest.fixture
def vitrt(capsys: pytest.CaptureFixture[str]) -> Iterator[Vitrt]:
    """`vitrt("encode", model, ...)` -> exit code and output."""
    root = logging.getLogger()
    package = logging.getLogger("vitrt")
    before = root.handlers[:], root.level, package.level, Image.MAX_IMAGE_PIXELS

    def run(*arguments: object) -> Finished:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return Finished(code, captured.out, captured.err)

    with warnings.catch_warnings():
        yield run
    logging.captureWarnings(capture=False)
    root.handlers[:], level, package_level, Image.MAX_IMAGE_PIXELS = before
    root.setLevel(level)
    package.setLevel(package_level)
