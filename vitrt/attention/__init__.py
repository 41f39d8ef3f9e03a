"""Attention over packed segments: what a backend is, and the registry of those there are."""

from vitrt.attention.base import (
    TILE_ROWS,
    AttentionBackend,
    BackendSpec,
    Rotary,
    Segments,
    attention_shape,
    tile_list,
)
from vitrt.attention.registry import (
    AttentionChoice,
    AutoBackend,
    get_backend,
    register,
    resolve,
    usable,
)

__all__ = [
    "TILE_ROWS",
    "AttentionBackend",
    "AttentionChoice",
    "AutoBackend",
    "BackendSpec",
    "Rotary",
    "Segments",
    "attention_shape",
    "base",
    "get_backend",
    "register",
    "registry",
    "resolve",
    "rests",
    "tile_list",
    "usable",
    "window",
]
