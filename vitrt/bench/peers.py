"""The peers by their names on the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from vitrt.bench.contenders import Contender, UnavailableError, Vitrt
from vitrt.bench.options import PEER_NAMES
from vitrt.bench.timm_peer import Timm
from vitrt.bench.transformers_peers import Compiled, Eager, best_attention, load_fa3
from vitrt.bench.vllm_peer import Vllm
from vitrt.checkpoint.opened import Checkpoint
from vitrt.config import RuntimeConfig
from vitrt.encoder import VisionEncoder

COMPILED = "compile"  # compiles for every shape, which may use up the time limit


@dataclass(frozen=True, slots=True)
class Subject:
    """The tower that all contenders run: transformers' own, and the same weights on disk."""

    tower: nn.Module
    checkpoint: Checkpoint
    runtime: RuntimeConfig  # of vitrt


def build_peer(name: str, subject: Subject) -> Contender:
    """Raises UnavailableError for a peer that cannot run, ValueError for an unknown name."""
    tower, config = subject.tower, subject.checkpoint.vision_config()
    if name == "fp8":
        return _fp8(subject)
    if name == "sdpa":
        return Eager(tower, "sdpa")
    if name == "fa3":
        load_fa3()
        return Eager(tower, "flash_attention_3")
    if name == COMPILED:
        return Compiled(tower, best_attention())
    if name == "timm":
        return Timm(tower, config)
    if name == "vllm":
        return Vllm(tower, config)
    raise ValueError(f"peer {name!r} does not exist; there are {', '.join(PEER_NAMES)}")


def _fp8(subject: Subject) -> Vitrt:
    """vitrt in fp8, as a peer of vitrt in the precision asked for."""
    if subject.runtime.precision == "fp8":
        raise UnavailableError("vitrt runs in fp8 already")
    runtime = replace(subject.runtime, precision="fp8")
    try:
        return Vitrt(VisionEncoder.from_checkpoint(subject.checkpoint, runtime), "fp8")
    except ValueError as error:
        raise UnavailableError(str(error)) from error
