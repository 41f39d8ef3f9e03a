"""Compiled CuTe kernels that a process loads without importing the compiler that made them.

Importing quack, flash-attn-4 and CUTLASS takes 8 seconds, and only they can find what they keep on
disk. Here their object files are kept once more, linked, each with a description of how to launch
it: `import tvm_ffi`, a tenth of a second, is enough to call one.

A file is a shared library, its description as JSON, the length of that, and the SHA-256 of all
before. Files of other releases lie in other folders; a file that is cut short or was changed is
never loaded; files appear under their names whole. Where anything is missing, or does not compute
what it should (`proven`), the packages themselves are imported, which always works.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from vitrt.kernels.disk_cache import private_folder

logger = logging.getLogger(__name__)

_PACKAGES = ("quack-kernels", "flash-attn-4", "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base",
             "apache-tvm-ffi")  # fmt: skip
_SOURCES = ("kept.py", "gemm_epilogues.py", "gemm_quack.py", "gemm_kept.py", "gemm_table.py",
            "fa4_hopper.py", "../attention/fa4.py", "../attention/fa4_kept.py")  # fmt: skip
_DIGEST, _LENGTH = 32, 8  # bytes
_SYMBOL = "func"  # as both packages export

Description = dict[str, Any]
Function = Callable[..., Any]


@lru_cache(maxsize=1)
def _folder() -> Path | None:
    """Where the files of these packages and of this text of ours lie; None: nowhere."""
    private = private_folder()
    if private is None:
        return None
    digest = hashlib.sha256()
    for package in _PACKAGES:
        try:
            found = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            digest.update(f"no {package}".encode())
            continue
        digest.update(f"{package} {found.version}".encode())
        digest.update((found.read_text("RECORD") or "").encode())  # the hash of every file in it
    for source in _SOURCES:
        digest.update(Path(__file__).parent.joinpath(source).read_bytes())
    return private / "linked" / digest.hexdigest()[:32]


def _path(family: str, key: str) -> Path | None:
    folder = _folder()
    name = f"{family}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    return None if folder is None else folder / name


def any_of(family: str) -> bool:
    """Whether a kernel of this family was kept, so that the packages work here."""
    folder = _folder()
    return folder is not None and any(folder.glob(f"{family}-*.so"))


def load(family: str, key: str) -> tuple[Function, Description] | None:
    """The kernel that was kept under this name and its description; None where it is missing."""
    path = _path(family, key)
    if path is None:
        return None
    try:
        description = _description(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("kernel %s is damaged (%s): made anew", path, error)
        return None
    try:
        import tvm_ffi

        return tvm_ffi.load_module(str(path))[_SYMBOL], description
    except Exception as error:  # whatever a loader of machine code raises
        logger.warning("kernel %s cannot be loaded (%s): made anew", path, error)
        return None


def _description(content: bytes) -> Description:
    """The description in a file, after the library; ValueError for a file that is not whole."""
    body, digest = content[:-_DIGEST], content[-_DIGEST:]
    if len(body) < _LENGTH or hashlib.sha256(body).digest() != digest:
        raise ValueError(f"{len(content)} bytes that do not match their checksum")
    length = int.from_bytes(body[-_LENGTH:], "little")
    description: Description = json.loads(body[-_LENGTH - length : -_LENGTH])
    return description


def proven(family: str, key: str, launch: Callable[[], bool]) -> bool:
    """Whether `launch`, which runs a loaded kernel on known numbers, says they came out right."""
    try:
        right = launch()
        problem = "wrong numbers"
    except Exception as error:  # a signature of another release, say: its own launch knows it
        right, problem = False, f"{type(error).__name__}: {error}"
    if not right:
        logger.warning("kept kernel %s %s is not used: %s", family, key, problem)
    return right


def keep(family: str, key: str, find: Callable[[], tuple[Path, Description] | None]) -> None:
    """Link the object file that `find` knows and keep it with its description.

    Where `find` has none, or that fails, the next process imports the package.
    """
    path = _path(family, key)
    try:
        if path is None or _is_whole(path) or (found := find()) is None:
            return
        object_file, description = found
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            library = Path(folder, path.name)
            _link(object_file, library)
            text = json.dumps(description).encode()
            body = library.read_bytes() + text + len(text).to_bytes(_LENGTH, "little")
            library.write_bytes(body + hashlib.sha256(body).digest())
            os.replace(library, path)  # two processes at once: one of two equal files stays
    except Exception as error:  # no linker, no space, internals that moved
        logger.info("kernel %s %s is not kept: %s: %s", family, key, type(error).__name__, error)


def _is_whole(path: Path) -> bool:
    try:
        _description(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _link(object_file: Path, library: Path) -> None:
    """Against CuTe's runtime, found again where it lies now, and tvm_ffi, which is loaded."""
    from cutlass.cute.runtime import find_runtime_libraries

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "cc"
    needed = [Path(each) for each in find_runtime_libraries(enable_tvm_ffi=True)]
    command = [compiler, "-shared", "-o", str(library), str(object_file)]
    # -l:name, not a path: a library that states no name would be looked for at this very path.
    command += [part for each in needed for part in (f"-L{each.parent}", f"-l:{each.name}")]
    command += [f"-Wl,-rpath,{each.parent}" for each in needed]
    command += ["-Wl,--no-undefined", "-Wl,-Bsymbolic"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{compiler} ended with {done.returncode}: {done.stderr[-500:]}")
