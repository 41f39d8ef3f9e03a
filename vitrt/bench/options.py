"""What a benchmark run is asked for. It imports no torch: `--help` reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vitrt.bench.workloads import WORKLOAD_NAMES
from vitrt.config import RuntimeConfig

PEER_NAMES = ("fp8", "sdpa", "fa3", "compile", "timm", "vllm")


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """The choices of one run; the command line takes its defaults from here."""

    models: tuple[str, ...] = ("qwen3-vl-8b", "qwen2.5-vl-7b")
    workloads: tuple[str, ...] = WORKLOAD_NAMES
    peers: tuple[str, ...] | None = None  # None: all on a GPU, sdpa on a CPU
    runtime: RuntimeConfig = RuntimeConfig()  # noqa: RUF009 (frozen, too)
    scale: Literal["auto", "full", "tiny"] = "auto"  # "auto": scaled down on a CPU
    check: bool = True
    profile: bool = False
    ablate: bool = False
    memory: bool = False
    seconds: float = 1.0  # of timing for each contender on each workload, in all its turns
    time_limit: float = 480.0  # no further shape is compiled after so many seconds

    def __post_init__(self) -> None:
        for peer in self.peers or ():
            if peer not in PEER_NAMES:
                raise ValueError(f"peer {peer!r} does not exist; there are {', '.join(PEER_NAMES)}")
        if not self.models or not self.workloads:
            raise ValueError("a benchmark needs at least one model and one workload")
        for name in ("seconds", "time_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
