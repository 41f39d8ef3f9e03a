"""What Triton has a C compiler make when a process first uses a GPU, made where there is none.

A module of utilities and, before Triton 3.7, a launcher for each signature of a kernel. They are
linked against the driver's libcuda, in whose place a library with the same names will do.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

logger = logging.getLogger(__name__)

_DRIVER_FUNCTION = re.compile(r"\bcu[A-Z]\w*")


class LauncherBuilder:
    """Fills Triton's folder by Triton's own functions, and loads nothing that it makes."""

    def __init__(self) -> None:
        from triton.backends.nvidia import driver

        self._driver = driver
        self._compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        if self._compiler is None:
            logger.warning("no C compiler: Triton will want one in the first process on a GPU")

    def utilities(self) -> None:
        source = Path(self._driver.dirname, "driver.c").read_text()
        self._build(src=source, name="cuda_utils")

    def launcher(self, source: Any, metadata: Any) -> None:
        """Make the launcher of one kernel, as `CompiledKernel` asks its driver for it."""
        if not hasattr(self._driver, "make_launcher"):
            return  # one of the utilities launches all
        with (
            mock.patch.object(self._driver, "compile_module_from_src", self._build),
            mock.patch.object(self._driver, "library_dirs", return_value=[]),
        ):
            self._driver.CudaLauncher(source, metadata)

    def _build(self, src: str, name: str, **_: Any) -> Any:
        from triton.runtime import build

        module = SimpleNamespace(launch=None)
        if self._compiler is None:
            return module
        try:
            with (
                tempfile.TemporaryDirectory() as folder,
                mock.patch.object(build, "_load_module_from_path", return_value=module),
            ):
                self._link_libcuda(sorted(set(_DRIVER_FUNCTION.findall(src))), folder)
                build.compile_module_from_src(
                    src=src,
                    name=name,
                    library_dirs=[folder],
                    include_dirs=self._driver.include_dirs,
                    libraries=self._driver.libraries,
                )
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            logger.warning("Triton's %s is left to the first process on a GPU: %s", name, error)
        return module

    def _link_libcuda(self, functions: list[str], folder: str) -> None:
        """A library of that name which defines what is called: linkers leave out one that is not
        needed, and the driver would then not be found when the module is loaded.
        """
        source = Path(folder, "libcuda.c")
        source.write_text(
            "".join(f"int {function}(void) {{ return 1; }}\n" for function in functions)
        )
        for library in self._driver.libraries:
            assert self._compiler is not None
            command = [self._compiler, "-shared", "-fPIC", f"-Wl,-soname,{library}", str(source)]
            subprocess.run([*command, "-o", str(Path(folder, library))], check=True)
