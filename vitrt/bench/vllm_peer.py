"""vLLM's own tower, without an engine around it, in the setting that is its fastest on a workload.

The settings: eager, with the compiler on its encoder blocks (where it marks them for that), and
each of the two replayed from a CUDA graph of exactly this batch's shape. A replay works out the
batch's positions and boundaries anew, as its own graph manager does.
"""

from __future__ import annotations

import importlib
import inspect
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitrt.bench.contenders import Forward, UnavailableError
from vitrt.bench.timing import measure
from vitrt.compare.errors import Output
from vitrt.config import Grid, VisionConfig

CHOOSING_SECONDS = 0.2  # of timing each setting
BUFFERS = ("inv_freq", "rotary_pos_emb")  # of transformers' towers; vLLM makes its own
Run = Callable[[Tensor], Tensor]


class Vllm:
    """The tower of the installed vLLM on the weights of transformers' one."""

    name = "vllm"
    same_tower = True

    def __init__(self, tower: Any, config: VisionConfig) -> None:
        weight = next(tower.parameters())
        self.device, self.dtype, self.config = weight.device, weight.dtype, config
        if self.device.type != "cuda":
            raise UnavailableError("vLLM's towers need a CUDA device")
        self.settings = build_settings(tower, config, self.device, self.dtype)
        self.label = f"vLLM {importlib.import_module('vllm').__version__}, its best setting a row"
        self.chosen: dict[tuple[Grid, ...], str] = {}

    def forward_for(self, grids: tuple[Grid, ...]) -> Forward:
        """The fastest setting's; `chosen` keeps which that was. Raises UnavailableError."""
        patches = sum(t * h * w for t, h, w in grids)
        shape = (patches, self.config.patch_dim)
        pixels = torch.randn(shape, device=self.device).to(self.dtype)
        best: tuple[float, str, Run] | None = None
        reasons = []
        for name, run in runs_of(self.settings, grids, pixels):
            try:
                timing = measure(
                    run, [pixels], self.device, seconds=CHOOSING_SECONDS, latency=len(grids) == 1
                )
            except Exception as error:  # a setting that cannot run leaves the others
                reasons.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
                continue
            took = timing.rate_ms if timing.wall_ms is None else timing.wall_ms
            if best is None or took < best[0]:
                best = took, name, run
        if best is None:
            raise UnavailableError("; ".join(reasons))
        self.chosen[grids] = best[1]
        fastest = best[2]
        return lambda pixels: split_output(fastest(pixels), self.config)


def split_output(output: Tensor, config: VisionConfig) -> Output:
    """vLLM's [M, O * (1 + levels)] into embeddings and deepstack levels."""
    parts = output.split(config.out_hidden_size, dim=1)
    return parts[0], parts[1:]


def runs_of(
    settings: Mapping[str, Any], grids: tuple[Grid, ...], pixels: Tensor
) -> Iterator[tuple[str, Run]]:
    """Every way to run a batch, by its name; each is built when it is asked for."""
    rows = [list(grid) for grid in grids]
    for name, model in settings.items():
        yield name, partial(_run, model, rows)
        if hasattr(model, "prepare_encoder_metadata"):
            yield f"{name}, graph", Recorded(model, rows, pixels)


def _run(model: Any, rows: list[list[int]], pixels: Tensor) -> Tensor:
    return model(pixels, rows)


class Recorded:
    """A CUDA graph, recorded at its first call, so that a failure is that of this setting."""

    def __init__(self, model: Any, rows: list[list[int]], pixels: Tensor) -> None:
        self.arguments = model, rows, pixels
        self.replay: Run | None = None

    def __call__(self, pixels: Tensor) -> Tensor:
        if self.replay is None:
            self.replay = record(*self.arguments)
        return self.replay(pixels)


def record(model: Any, rows: list[list[int]], pixels: Tensor) -> Run:
    """A CUDA graph of one batch's shape."""
    static = pixels.clone()
    metadata = model.prepare_encoder_metadata(rows)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            model(static, None, encoder_metadata=metadata)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(static, None, encoder_metadata=metadata)

    def run(x: Tensor) -> Tensor:
        for name, value in model.prepare_encoder_metadata(rows).items():
            if isinstance(value, Tensor) and value.is_cuda:
                metadata[name].copy_(value, non_blocking=True)
        static.copy_(x)
        graph.replay()
        return output.clone()

    return run


# What is entered here stays so for the rest of the process: vLLM's state is global.
_entered = ExitStack()
_is_set_up = False


def build_settings(
    tower: Any, config: VisionConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, nn.Module]:
    """vLLM's tower by the setting it was built for. Raises UnavailableError."""
    try:
        importlib.import_module("vllm")
        module = importlib.import_module(f"vllm.model_executor.models.{config.model_type}")
    except Exception as error:  # whatever its binary parts raise
        raise UnavailableError(f"vLLM cannot be imported: {error}".splitlines()[0]) from error
    classes = [
        value
        for name, value in vars(module).items()
        if name.endswith("VisionTransformer") and inspect.isclass(value)
    ]
    if len(classes) != 1:
        raise UnavailableError(f"{module.__name__} has {len(classes)} classes that may be towers")
    settings = {"eager": _build(classes[0], tower, device, dtype, compiled=False)}
    compiled = _build(classes[0], tower, device, dtype, compiled=True)
    if not getattr(compiled.blocks[0], "do_not_compile", True):
        settings["compiled"] = compiled
    return settings


def _build(
    tower_class: Any, tower: Any, device: torch.device, dtype: torch.dtype, *, compiled: bool
) -> Any:
    """vLLM's tower with the weights of transformers' one."""
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    runtime = VllmConfig(compilation_config=CompilationConfig(compile_mm_encoder=compiled))
    _set_up_operators(runtime)
    _entered.enter_context(set_current_vllm_config(runtime))
    _set_up_ranks()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = tower_class(tower.config, norm_eps=1e-6, prefix="visual")
    finally:
        torch.set_default_dtype(before)
    weights = {
        name: tensor
        for name, tensor in tower.state_dict().items()
        if not any(buffer in name for buffer in BUFFERS)
    }
    loaded = set(model.load_weights(iter(weights.items())))
    missing = sorted({name for name, _ in model.named_parameters()} - loaded)
    if missing:
        raise UnavailableError(f"vLLM's tower has weights of other names: {', '.join(missing[:5])}")
    return model.eval().requires_grad_(False)


def _set_up_operators(runtime: Any) -> None:
    """Choose operators' implementations, as a worker of vLLM does before it builds a model."""
    try:
        from vllm import ir
    except ImportError:
        return  # an older vLLM
    runtime.kernel_config.ir_op_priority.set_default()
    ir.set_default_torch_wrap(runtime.compilation_config.ir_enable_torch_wrap)


def _set_up_ranks() -> None:
    """Make a group of one rank, which vLLM's layers ask for."""
    global _is_set_up
    if _is_set_up:
        return
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "nccl")
    initialize_model_parallel(1, 1)
    _is_set_up = True
