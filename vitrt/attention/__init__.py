"""Attention over packed segments: what a backend is, and the registry of those there are."""

from vitrt.attention.auto import AutoBackend
from vitrt.attention.base import (
    AttentionBackend,
    BackendSpec,
    Schedule,
    SchedulingBackend,
    attention_shape,
)
from vitrt.attention.registry import (
    AttentionChoice,
    BatchAttention,
    get_backend,
    label,
    register,
    resolve_attention,
    usable,
)

__all__ = [
    "AttentionBackend",
    "AttentionChoice",
    "AutoBackend",
    "BackendSpec",
    "BatchAttention",
    "Schedule",
    "SchedulingBackend",
    "attention_shape",
    "get_backend",
    "label",
    "register",
    "resolve_attention",
    "usable",
    "window",
]
