"""Parts of models as serving engines build them, for tests of the plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

GRIDS = [(1, 10, 6), (2, 4, 8), (1, 2, 2)]


class OwnTower(nn.Module):
    """An engine's own tower."""

    def __init__(
        self,
        vision_config: Any,
        norm_eps: float = 1e-6,
        quant_config: Any = None,
        prefix: str = "",
        use_data_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.layer.quant_method = quant_config


class QuantMethod:
    """What a layer of an engine holds once it is quantised."""


class UnquantizedLinearMethod:
    """And what one holds that the quantisation leaves out."""


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Of the tower, by name in the checkpoint without `model.`."""
    tensors = {
        n: w for file in sorted(folder.glob("*.safetensors")) for n, w in load_file(file).items()
    }
    return {
        name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if name.removeprefix("model.").startswith("visual.")
    }
