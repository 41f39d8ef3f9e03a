"""Recording a forward as one CUDA graph, or as several with attention calls between them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vitrt.attention import AttentionBackend, AttentionChoice, attention_shape
from vitrt.kernels.segments import Rotary, Segments
from vitrt.models.packed_plan import DevicePlan
from vitrt.models.tower import TowerOutput

_TYPESTR = {2: "<i2", 4: "<i4", 8: "<i8"}


def borrowed(tensor: Tensor) -> Tensor:
    """A view of `tensor`'s memory that does not keep it alive.

    The allocator may then give memory of a graph's pool to the graphs recorded next: replays follow
    each other and every result is copied out before the next one starts, so the sharing is safe and
    the pool stays small.
    """
    memory = SimpleNamespace(
        __cuda_array_interface__={
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * tensor.element_size() for stride in tensor.stride()),
            "typestr": _TYPESTR[tensor.element_size()],
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }
    )
    return torch.as_tensor(memory, device=tensor.device).view(tensor.dtype)


@dataclass(slots=True)
class _Split:
    """An attention call between two graphs, on memory that the recording fixed."""

    backend: AttentionBackend
    windowed: bool
    qkv: Tensor
    rotary: Rotary
    out: Tensor

    def __call__(self, plan: DevicePlan) -> None:
        segments = plan.window if self.windowed else plan.full
        assert segments is not None
        self.backend(self.qkv, segments, self.rotary, self.out)


@dataclass(slots=True)
class Pieces:
    """Graphs in order, with a split after each but the last."""

    graphs: list[torch.cuda.CUDAGraph]
    splits: list[_Split]
    output: TowerOutput  # borrowed memory: valid from a replay to the next

    def replay(self, plan: DevicePlan | None) -> TowerOutput:
        """Run all of it. `plan` is the batch's own and needed where there are splits."""
        for graph, split in zip(self.graphs, self.splits, strict=False):
            graph.replay()
            assert plan is not None
            split(plan)
        self.graphs[-1].replay()
        return self.output


class _Recorder:
    """Begins and ends the graphs of one forward on a side stream."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.splits: list[_Split] = []
        self.outs: dict[torch.Size, Tensor] = {}

    def begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate page-locked memory meanwhile: only this thread's calls are held
        # to the rules.
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        self.graphs.append(graph)

    def end(self) -> None:
        self.graphs[-1].capture_end()

    def out_for(self, qkv: Tensor) -> Tensor:
        """Where splits write, zeroed once: backends do not write padding, which must be finite."""
        shape = attention_shape(qkv)
        if shape not in self.outs:
            with torch.inference_mode(False):  # replays outside of it write there too
                self.outs[shape] = torch.zeros(shape, dtype=qkv.dtype, device=qkv.device)
        return self.outs[shape]


class _SplittingBackend:
    """Stands in for a backend that cannot be recorded, ending one graph and beginning the next."""

    capturable = True

    def __init__(self, backend: AttentionBackend, recorder: _Recorder, *, windowed: bool) -> None:
        self.name = backend.name
        self.applies_rotary = backend.applies_rotary
        self.backend = backend
        self.recorder = recorder
        self.windowed = windowed

    def __call__(
        self, qkv: Tensor, segments: Segments, rotary: Rotary, out: Tensor | None = None
    ) -> Tensor:
        self.recorder.end()
        out = self.recorder.out_for(qkv)
        self.recorder.splits.append(_Split(self.backend, self.windowed, borrowed(qkv), rotary, out))
        self.recorder.begin()
        return out


def record_pieces(
    forward: Callable[[AttentionChoice], TowerOutput],
    attention: AttentionChoice,
    pool: Any,
    stream: torch.cuda.Stream,
) -> Pieces:
    """Record `forward` with `attention` on `stream`, split at backends that are not capturable.

    It must have run once before: a recording may not compile kernels or create library handles.
    """
    stream.wait_stream(torch.cuda.current_stream())
    recorder = _Recorder(pool)
    full, window = attention.full, attention.window
    if not full.capturable:
        full = _SplittingBackend(full, recorder, windowed=False)
    if not window.capturable:
        window = _SplittingBackend(window, recorder, windowed=True)
    collecting = gc.isenabled()
    gc.disable()  # a collector that frees another graph in the middle would break this one
    try:
        with torch.cuda.stream(stream):
            recorder.begin()
            try:
                output = forward(replace(attention, full=full, window=window))
            except BaseException:
                with suppress(RuntimeError):  # which says less than what went wrong
                    recorder.end()
                raise
            recorder.end()
    finally:
        if collecting:
            gc.enable()
    torch.cuda.current_stream().wait_stream(stream)
    deepstack = output.deepstack
    output = TowerOutput(
        borrowed(output.embeddings),
        None if deepstack is None else borrowed(deepstack),
        tuple(map(borrowed, output.hidden)),
    )
    return Pieces(recorder.graphs, recorder.splits, output)
