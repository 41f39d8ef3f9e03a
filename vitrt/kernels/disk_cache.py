"""Where flash-attn-4 and quack keep the kernels that they compile: a folder of this user's own."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def keep_kernels() -> None:
    """Set both packages' environment variables, those that are not set yet.

    They are read at import, so call it before importing either. Left alone, flash-attn-4 keeps
    nothing and compiles for seconds in every process, and quack keeps its objects under a name in
    the system's temporary folder that another user may have taken: they are loaded as code.
    """
    folder = private_folder()
    if folder is None:
        return
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder / "flash-attn-4"))
    os.environ.setdefault("QUACK_CACHE_DIR", str(folder / "quack" / _epilogues()))


def _epilogues() -> str:
    """A hash of our epilogues' text, since quack's keys hold only their names.

    Both packages' keys hold their own version, CUTLASS's, Python's and the GPU's architecture; what
    they keep is machine code, which does not depend on the driver.
    """
    source = Path(__file__).with_name("gemm_epilogues.py").read_bytes()
    return hashlib.sha256(source).hexdigest()[:16]


def private_folder() -> Path | None:
    """The first place that only this user can write and that can be locked; None without one."""
    import fcntl  # POSIX alone, as both packages are; this module is imported everywhere

    for folder in _places():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = folder.stat()
            owners = {found.st_uid, folder.lstat().st_uid}  # whoever owns a link may turn it
            if owners != {os.getuid()} or stat.S_IMODE(found.st_mode) & 0o022:
                continue
            # Both packages lock files there, and give up a forward where that fails.
            with tempfile.TemporaryFile(dir=folder) as probe:
                fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        return folder
    return None


def _places() -> Iterator[Path]:
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(caches):  # the XDG specification ignores a relative one
        yield Path(caches) / "vitrt"
    else:
        home = os.path.expanduser("~")
        if os.path.isabs(home):  # "~" itself where the user has none, as in some containers
            yield Path(home) / ".cache" / "vitrt"
    with suppress(OSError):  # a system that can be written nowhere
        yield Path(tempfile.gettempdir()) / f"vitrt-{os.getuid()}"
