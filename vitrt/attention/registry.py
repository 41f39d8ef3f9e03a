"""Which attention backends there are, which of them can run here, and which one to take.

A backend that was named runs or is refused with the reason; only "auto" falls back to another.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from vitrt.attention import fa2, fa3, fa4, sdpa, short, triton, window
from vitrt.attention.auto import AutoBackend, Rule, auto_rules
from vitrt.attention.base import AttentionBackend, BackendSpec, Schedule, SchedulingBackend
from vitrt.attention.probe import HALF_PRECISION, cuda_capability

logger = logging.getLogger(__name__)

_SPECS: dict[str, BackendSpec] = {}


def register(spec: BackendSpec) -> None:
    """Add a backend under `spec.name`. ValueError if the name is taken or is "auto"."""
    if spec.name == "auto" or spec.name in _SPECS:
        raise ValueError(f"attention backend name {spec.name!r} is taken; choose another")
    _SPECS[spec.name] = spec


for _spec in (sdpa.SPEC, triton.SPEC, fa2.SPEC, fa3.SPEC, fa4.SPEC, short.SPEC, window.SPEC):
    register(_spec)


def usable(
    device: torch.device | str, dtype: torch.dtype, head_dim: int, window_patches: int = 0
) -> list[tuple[str, str | None]]:
    """Every registered name with None where it can run a tower whose windows have up to so many
    patches (0: it has none), or the reason why it cannot.
    """
    device = torch.device(device)
    return [
        (name, spec.unavailable(device, dtype, head_dim) or spec.window_limit(window_patches))
        for name, spec in _SPECS.items()
    ]


def get_backend(
    name: str, *, device: torch.device | str, dtype: torch.dtype, head_dim: int
) -> AttentionBackend:
    """The backend of that name; ValueError, naming those that can run, where it cannot."""
    device = torch.device(device)
    spec = _SPECS.get(name)
    reason = (
        f"there is no such backend; known are auto, {', '.join(_SPECS)}"
        if spec is None
        else spec.unavailable(device, dtype, head_dim)
    )
    if spec is None or reason is not None:
        names = [n for n, why in usable(device, dtype, head_dim) if why is None]
        raise ValueError(
            f"attention backend {name!r} cannot run on {device} with {dtype} and "
            f"head size {head_dim}: {reason}. Usable here: auto, {', '.join(names)}"
        )
    try:
        return spec.load(device, dtype, head_dim)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # Built for another torch, most often: found by name, and broken when it is imported.
        raise ValueError(
            f"attention backend {name!r} is installed but does not load: {error}"
        ) from error


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The backends of a tower's full-attention and window-attention layers."""

    full: AttentionBackend
    window: AttentionBackend
    scheduled: bool = True  # whether backends may plan their work for each batch

    def for_batch(self, lengths: Sequence[int], heads: int) -> BatchAttention:
        """What a batch with full segments of these lengths runs; `heads` are those of this rank."""
        full = self.full
        if isinstance(full, AutoBackend):
            full = full.select(lengths)
        schedule = None
        # Asking whether it is a SchedulingBackend takes as long as all else here.
        if self.scheduled and hasattr(full, "schedule"):
            schedule = cast(SchedulingBackend, full).schedule(lengths, heads)
        return BatchAttention(AttentionChoice(full, self.window), schedule)


@dataclass(frozen=True, slots=True)
class BatchAttention:
    """The backends of one batch, "auto" settled, and the schedule of the full one."""

    choice: AttentionChoice
    schedule: Schedule | None

    @property
    def key(self) -> Hashable:
        """Batches of one shape class with equal keys share a CUDA graph."""
        return self.choice.full.name, None if self.schedule is None else self.schedule.key


def _auto_full(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    reasons = dict(usable(device, dtype, head_dim))
    table: list[tuple[Rule, AttentionBackend]] = []
    for rule in auto_rules(device, dtype, head_dim):
        if reasons[rule.name] is not None:
            continue
        try:
            backend = get_backend(rule.name, device=device, dtype=dtype, head_dim=head_dim)
        except ValueError as error:
            logger.warning("%s", error)
            continue
        table.append((rule, backend))
        if rule.takes_all:
            break
    while len(table) > 1 and table[-2][1].name == table[-1][1].name:
        del table[-2]  # the rule after it takes those batches, too
    return AutoBackend(table) if len(table) > 1 else table[0][1]


def _invariant(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> AttentionBackend:
    """The named backend, or the first that can run, of those whose work on a segment does not
    depend on the other segments: our own, and FA4 on Hopper, which elsewhere chooses its blocks by
    the longest one. ValueError for any other.
    """
    known = ["fa4", "triton"] if cuda_capability(device) in ((9, 0),) else ["triton"]
    if name not in ("auto", *known):
        raise ValueError(
            f"attention {name!r} is not known to be batch-invariant on {device}; "
            f"use auto, {', '.join(known)}"
        )
    if name == "auto":
        reasons = dict(usable(device, dtype, head_dim))
        name = next((each for each in known if reasons[each] is None), known[-1])
    return get_backend(name, device=device, dtype=dtype, head_dim=head_dim)


def _auto_window(
    full: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    window_patches: int,
) -> AttentionBackend:
    own = window.SPEC
    if (
        dtype in HALF_PRECISION
        and own.window_limit(window_patches) is None
        and own.unavailable(device, dtype, head_dim) is None
    ):
        return own.load(device, dtype, head_dim)
    # As if a batch had many of them; one backend, whatever a batch has.
    many = [window_patches] * 1024
    chosen = full.select(many) if window_patches and isinstance(full, AutoBackend) else full
    if not window_patches or _SPECS[chosen.name].window_limit(window_patches) is None:
        return chosen
    return get_backend("sdpa", device=device, dtype=dtype, head_dim=head_dim)


def resolve_attention(
    name: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    window_patches: int = 0,
    batch_invariant: bool = False,
) -> AttentionChoice:
    """The backends to run a tower with; `window_patches` bounds its windows, 0 where it has none.

    An explicit name serves full and window layers alike, or is a ValueError. "auto" takes the
    fastest that can run, and the window kernel for window layers where Triton compiles for the
    device. With `batch_invariant` full layers have one backend, whose work on a segment is the same
    whatever is beside it.
    """
    device = torch.device(device)
    if batch_invariant:
        full = _invariant(name, device, dtype, head_dim)
        short = _auto_window(full, device, dtype, head_dim, window_patches)
        if window_patches and short.name == "sdpa":
            raise ValueError(
                f"no batch-invariant attention runs windows of {window_patches} patches here"
            )
        choice = AttentionChoice(full, short, scheduled=False)
    elif name == "auto":
        full = _auto_full(device, dtype, head_dim)
        short = _auto_window(full, device, dtype, head_dim, window_patches)
        choice = AttentionChoice(full, short)
    else:
        spec = _SPECS.get(name)
        if spec is not None and spec.windows_only:
            names = [n for n, s in _SPECS.items() if not s.windows_only]
            raise ValueError(
                f"attention backend {name!r} runs window layers only and is part of 'auto'; "
                f"name one of auto, {', '.join(names)}"
            )
        backend = get_backend(name, device=device, dtype=dtype, head_dim=head_dim)
        if spec is not None and (limit := spec.window_limit(window_patches)) is not None:
            raise ValueError(f"attention backend {name!r} {limit}; use auto or sdpa")
        choice = AttentionChoice(backend, backend)
    windows = f" in full layers, {label(choice.window)} in window layers" if window_patches else ""
    logger.info("attention: %s%s", label(choice.full), windows)
    return choice


def label(backend: AttentionBackend) -> str:
    """A backend's name for logs and tables; of "auto" with what it chooses from."""
    return repr(backend) if isinstance(backend, AutoBackend) else backend.name
