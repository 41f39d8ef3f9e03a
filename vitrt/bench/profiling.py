"""Where the device's time goes in a forward: kernels by group, and the gaps between them."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vitrt.bench.timing import Call, synchronize, warm

# The first that matches a kernel's name. Flash kernels come before products (their names hold
# "cutlass"), products before norms and activations (theirs may name an epilogue).
GROUPS = (
    ("window attention", r"window"),
    ("full attention", r"flash|fmha|attention|attn|varlen_fwd"),
    ("gemm", r"gemm|nvjet|splitk|cublas|linear_kernel|matmul"),
    ("rope", r"rope|rotary"),
    ("norm", r"norm"),
    ("activation", r"gelu|swiglu|silu|bias_act"),
    ("patches", r"patchify|position|pos_embed|taps"),
    ("gemm", r"cutlass|xmma|sm90|sm80|sm100|addmm|aten::mm"),
)
GROUP_NAMES = (*dict.fromkeys(name for name, _ in GROUPS), "other", "idle")
DEVICE_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
_FORWARDS = 3


@dataclass(frozen=True, slots=True)
class KernelTime:
    name: str
    group: str
    ms: float  # of one forward
    calls: float


@dataclass(frozen=True, slots=True)
class Profile:
    """Milliseconds of one forward, averaged over those profiled."""

    total_ms: float  # from the first kernel's start to the last one's end
    groups: dict[str, float]
    kernels: tuple[KernelTime, ...]  # longest first


@dataclass(frozen=True, slots=True)
class Span:
    """One kernel's run, in microseconds."""

    name: str
    start: float
    duration: float
    calls: int = 1  # more where the profiler has summed them


def kernel_group(name: str) -> str:
    lowered = name.lower()
    return next((group for group, pattern in GROUPS if re.search(pattern, lowered)), "other")


def profile_call(call: Call, inputs: Sequence[Tensor], device: torch.device) -> Profile:
    """Profile warm forwards, queued back to back. On a CPU: operators by their own time."""
    warm(call, inputs, device)
    on_device = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_device else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for index in range(_FORWARDS):
            call(inputs[index % len(inputs)])
        synchronize(device)
    if on_device:
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            return summarise(_device_spans(trace), _FORWARDS)
    # Laid end to end: self times of nested operators do not overlap.
    spans, clock = [], 0.0
    for average in profiler.key_averages():
        spans += [Span(average.key, clock, average.self_cpu_time_total, average.count)]
        clock += average.self_cpu_time_total
    return summarise(spans, _FORWARDS)


def _device_spans(trace: Path) -> list[Span]:
    events = json.loads(trace.read_text())["traceEvents"]
    return [
        Span(event["name"], float(event["ts"]), float(event["dur"]))
        for event in events
        if event.get("cat") in DEVICE_CATEGORIES and event.get("ph") == "X"
    ]


def summarise(spans: Iterable[Span], forwards: int) -> Profile:
    """Group the kernels of `forwards` equal forwards. Idle is time that no kernel covers."""
    spans = sorted(spans, key=lambda span: span.start)
    if not spans:
        raise RuntimeError("the profiler recorded no kernel")
    scale = 1e-3 / forwards
    times: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    busy, end = 0.0, spans[0].start
    for span in spans:
        times[span.name] += span.duration
        calls[span.name] += span.calls
        # Kernels of several streams may overlap: count what this one adds.
        finish = span.start + span.duration
        busy += max(0.0, finish - max(end, span.start))
        end = max(end, finish)
    kernels = [
        KernelTime(name, kernel_group(name), duration * scale, calls[name] / forwards)
        for name, duration in times.items()
    ]
    groups = dict.fromkeys(GROUP_NAMES, 0.0)
    for kernel in kernels:
        groups[kernel.group] += kernel.ms
    total = end - spans[0].start
    groups["idle"] = (total - busy) * scale
    kernels.sort(key=lambda kernel: -kernel.ms)
    return Profile(total * scale, groups, tuple(kernels))
