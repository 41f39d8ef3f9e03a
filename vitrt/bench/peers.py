"""The peers by their names on the command line."""

from __future__ import annotations

from torch import nn

from vitrt.bench.contenders import Contender
from vitrt.bench.options import PEER_NAMES
from vitrt.bench.timm_peer import Timm
from vitrt.bench.transformers_peers import Compiled, Eager, best_attention, load_fa3
from vitrt.bench.vllm_peer import Vllm
from vitrt.config import VisionConfig

COMPILED = "compile"  # for every shape anew, which may use up the time limit


def build_peer(name: str, tower: nn.Module, config: VisionConfig) -> Contender:
    """A peer with the weights of transformers' `tower`.

    Raises UnavailableError where it cannot run, ValueError for an unknown name.
    """
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
