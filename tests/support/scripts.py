"""Programs of scripts/ inside the test's process, which has imported what takes them longest."""

from __future__ import annotations

import runpy
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def run_script(script: str, *arguments: object) -> int:
    """The exit code of its `main`."""
    main = runpy.run_path(str(SCRIPTS / script))["main"]
    return int(main(list(map(str, arguments))))
