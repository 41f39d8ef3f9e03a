"""A plugin of SGLang's for these checks: each rank says which tower it has, and times it if asked.

An encoder on its own says it, too.

`TOWER_REPORT` is the folder that it writes into; with `TOWER_TIMES` it times a forward, too.
"""

from __future__ import annotations

import json
import os
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tower_times import module_of_tower, time_tower


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.srt.model_executor.model_runner.ModelRunner.initialize"
    HookRegistry.register(target, initialize, HookType.AROUND)
    if "--encoder-only" in sys.argv:
        HookRegistry.register(f"{_encoder()}.__init__", initialize, HookType.AROUND)


def _encoder() -> str:
    """Where this version has it."""
    for module in ("encoder.server", "encode_server"):
        target = f"sglang.srt.disaggregation.{module}.MMEncoder"
        try:
            pkgutil.resolve_name(target)
        except (ImportError, AttributeError):
            continue
        return target
    raise ImportError("this SGLang has no MMEncoder where it is known to be")


def initialize(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the last step of an engine's start."""
    result = original(runner, *args, **kwargs)
    model = runner.model
    found: dict[str, Any] = {"tower": module_of_tower(model)}
    if "TOWER_TIMES" in os.environ:
        patches = 14 if "Qwen2" in type(model).__name__ else 16
        found["tower_ms"] = time_tower(model.visual, patches, lists=False)
    Path(os.environ["TOWER_REPORT"], f"{os.getpid()}.json").write_text(json.dumps(found))
    return result
