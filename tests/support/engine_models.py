"""Parts of models as serving engines build them, for tests of the plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.checkpoints import reference_model, tiny_checkpoint

GRIDS = [(1, 10, 6), (2, 4, 8), (1, 2, 2)]
ARCHITECTURE = {
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}


@pytest.fixture(params=ARCHITECTURE)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    return tiny_checkpoint(family, tmp_path / family)


def constructor_keywords(model: dict[str, Any]) -> set[str]:
    """What an engine makes its tower with, as read from its sources; the first by position."""
    return {"vision_config" if name == "0" else name for name in model["keywords"]}


def pixels_of(model: Any) -> Tensor:
    """Patches of GRIDS."""
    patches = sum(t * h * w for t, h, w in GRIDS)
    width = model.visual.config.patch_dim
    return torch.randn(patches, width, generator=torch.Generator().manual_seed(3))


def features_of(folder: Path, pixels: Tensor) -> Tensor:
    """What transformers makes of patches of GRIDS, as engines take it: main, then the levels."""
    output = reference_model(folder).model.visual(pixels, grid_thw=torch.tensor(GRIDS))
    levels = getattr(output, "deepstack_features", None) or []
    return torch.cat([output.pooler_output, *levels], dim=1)


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
