"""What the documents and the checks around the code refer to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "scripts/results/README.md")
FOLDERS = ("vitrt", "scripts", "tests", "configs", "examples", ".ci")
_PATH = re.compile(rf"(?:\./)?(?:{'|'.join(map(re.escape, FOLDERS))})(?:/[\w.{{}}-]+)*/?")


def paths_in(text: str) -> set[str]:
    """Paths of this repository in backticks; names in capitals stand for any."""
    quoted = " ".join(re.findall(r"`([^`\n]+)`", text)).split()
    whole = {word.rstrip(",;:") for word in quoted}
    return {word for word in whole if _PATH.fullmatch(word) and not re.search("[A-Z]{4}", word)}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_the_documents_exist(document: str) -> None:
    found = paths_in((ROOT / document).read_text())
    assert len(found) >= 3
    assert {path for path in found if not (ROOT / path).exists()} == set()


def test_files_that_the_code_names_exist() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    known = {"/" + path.relative_to(ROOT).as_posix() for path in files}
    gone = {
        (path.name, name)
        for path in files
        if path.is_relative_to(ROOT / "vitrt")
        for name in re.findall(r"\b\w[\w/]*\.py\b", path.read_text())
        if not any(each.endswith(f"/{name}") for each in known)
    }
    assert gone == set()


def test_a_path_that_is_gone_is_seen() -> None:
    text = "`vitrt/config.py` and `scripts/bench/gone.py --json x`, `tests/test_NAME.py`, `.ci/run`"
    assert paths_in(text) == {"vitrt/config.py", "scripts/bench/gone.py", ".ci/run"}


def test_the_architecture_is_the_one_that_the_tests_hold() -> None:
    """The order of imports in CONTRIBUTING.md, against the rooms of tests/test_imports.py."""
    from tests.test_imports import ALLOWED

    text = (ROOT / "CONTRIBUTING.md").read_text()
    order = re.search(r"^    (cli -> .*?)\n\n", text, re.MULTILINE | re.DOTALL)
    assert order is not None
    levels = [re.findall(r"\w+", level) for level in order[1].split("->")]
    rooms = [room for level in levels for room in level]
    named = {word.removesuffix("/") for word in re.findall(r"`(\w+/?)`", text)}
    assert set(ALLOWED) - set(rooms) - named == {"version", "__main__"}
    for index, level in enumerate(levels):
        above = {room for upper in levels[:index] for room in upper}
        for room in level:
            assert not above & set(ALLOWED[room]), f"{room} imports from above"
