"""The tower as a module of a serving engine: vLLM's and SGLang's plugins put it where theirs was.

Shapes: T patches, P values of one patch, M merged tokens, O output width, L deepstack levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from vitrt.config import RuntimeConfig, VisionConfig
from vitrt.engine.batch import PixelValues
from vitrt.engine.batcher import pack
from vitrt.engine.device import dtype_name
from vitrt.engine.engine import Engine
from vitrt.engine.loader import TowerFilling
from vitrt.models.families import build_tower
from vitrt.models.tower import TowerOutput

# An engine gives what is free to its key-value cache, so what a tower may take is fixed beforehand.
MAX_PATCHES = 32768
GRAPH_MEMORY_MIB = 1024.0


class EngineTower(nn.Module):
    """A tower whose weights arrive through an engine's loader, in any order and number of calls.

    Built empty; `finish_loading` makes it run, or says what never came. Afterwards `load_weights`
    replaces single tensors in place.
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        attention: str = "auto",
        cuda_graphs: Literal["auto"] | bool = "auto",
        max_patches: int = MAX_PATCHES,
        graph_memory_mib: float = GRAPH_MEMORY_MIB,
    ) -> None:
        """Args:
        attention, cuda_graphs, graph_memory_mib: as in `VisionEncoder.from_pretrained`.
        max_patches: of one forward; a larger batch is split between its images.

        ValueError for a choice that cannot be had on this device.
        """
        super().__init__()
        self.runtime = RuntimeConfig(
            device=str(device),
            dtype=dtype_name(dtype),
            attention=attention,
            cuda_graphs=cuda_graphs,
            max_batch_tokens=max_patches,
            graph_memory_mib=graph_memory_mib,
        )
        self.config = config
        self.hidden_size = config.hidden_size
        self.spatial_merge_size = config.spatial_merge_size
        self.deepstack_visual_indexes = list(config.deepstack_visual_indexes)
        self.out_hidden_size = config.out_hidden_size * (1 + len(config.deepstack_visual_indexes))
        self.dtype = dtype
        self.device = device
        with _own_defaults():
            with torch.device("meta"):
                self.tower = build_tower(config)
            # Zeros: of a padded width nothing but the true columns is ever written.
            self.tower.allocate(lambda meta: torch.zeros(meta.shape, dtype=dtype, device=device))
        self._filling = TowerFilling(self.tower)
        self._engine: Engine | None = None

    # Weights

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Store tensors by their names in the checkpoint, without the tower's prefix.

        Returns the names of the parameters that are complete: none before `finish_loading`.
        Afterwards any tensors are taken, each once a call, and ValueError names what was wrong.
        """
        if self._engine is not None:
            self._filling = TowerFilling(self.tower)
        for name, tensor in weights:
            self._filling.store(name, tensor)
        if self._engine is None:
            return set()
        self._filling.finish(whole=False)
        return self._parameter_names()

    def finish_loading(self) -> set[str]:
        """Every tensor is there: compile kernels and record graphs. The names of all parameters.

        ValueError names the tensors that never came, those that came twice, and those that are
        not the tower's or have another shape. An engine that starts with dummy weights need not
        call this: the first forward then takes the parameters as they are.
        """
        if self._engine is None:
            self._filling.finish()
            self._start()
        return self._parameter_names()

    def _start(self) -> Engine:
        self.tower.eval().requires_grad_(False)
        with _own_defaults():
            self.tower.compile_kernels()
            engine = Engine(self.tower, self.runtime)
            if self.device.type == "cuda":
                # Now, where the engine counts this memory as the model's; later it is given away.
                engine.load_kernels()
                engine.warmup()
        self._engine = engine
        return engine

    def _parameter_names(self) -> set[str]:
        return {name for name, _ in self.named_parameters()}

    # Forward

    def forward(self, x: Tensor, grid_thw: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """[M, O * (1 + L)], main first, for `pixel_values` [T, P] and the grids of all images."""
        engine = self._engine or self._start()
        grids = grid_thw.tolist() if isinstance(grid_thw, Tensor) else grid_thw
        parts = []
        first = 0
        for group in pack(grids, engine.max_batch_patches, prod):
            patches = sum(prod(grid) for grid in group)
            batch = PixelValues(x[first : first + patches], group)
            parts.append(packed(engine.run(batch)))
            first += patches
        if first != len(x):
            raise ValueError(f"pixel_values has {len(x)} patches, its grids have {first}")
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextmanager
def _own_defaults() -> Iterator[None]:
    """PyTorch's own default dtype and device: while an engine loads a model, they are its own."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def packed(output: TowerOutput) -> Tensor:
    """[M, O * (1 + L)]: main, then the levels, as engines take them."""
    if output.deepstack is None:
        return output.embeddings
    return torch.cat([output.embeddings, *output.deepstack.unbind(0)], dim=-1)
