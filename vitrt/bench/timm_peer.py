"""timm's VisionTransformer at a tower's widths: how fast another library runs such blocks."""

from __future__ import annotations

import importlib
from itertools import cycle

import torch
from torch import Tensor, nn

from vitrt.bench.contenders import Forward, UnavailableError
from vitrt.compare.errors import Output
from vitrt.config import Grid, VisionConfig

IMAGE_SETS = 3


class Timm:
    """Plain blocks of the same widths with random weights, on images of one size.

    It rotates no q and k and has no mergers, so it does less than the tower, and its output is
    another one.
    """

    name = "timm"
    label = "timm eager, the same blocks without rotary positions and mergers"
    same_tower = False

    def __init__(self, tower: nn.Module, config: VisionConfig) -> None:
        if config.window_size is not None or not config.hidden_act.startswith("gelu"):
            raise UnavailableError("timm's VisionTransformer has no windows and no gated MLP")
        try:
            importlib.import_module("timm.models.vision_transformer")
        except (ImportError, RuntimeError) as error:
            raise UnavailableError(f"timm cannot be imported: {error}") from error
        weight = next(tower.parameters())
        self.device, self.dtype, self.config = weight.device, weight.dtype, config

    def forward_for(self, grids: tuple[Grid, ...]) -> Forward:
        """Raises UnavailableError for images of several sizes, and for clips."""
        if len(set(grids)) > 1 or grids[0][0] > 1:
            raise UnavailableError("a batch of timm's has images of one size")
        _, rows, columns = grids[0]
        side = self.config.patch_size
        model = self._model((rows * side, columns * side))
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (len(grids), self.config.in_channels, rows * side, columns * side)
        images = cycle(
            [
                torch.randn(shape, generator=generator, device=self.device).to(self.dtype)
                for _ in range(IMAGE_SETS)
            ]
        )

        def forward(pixels: Tensor) -> Output:
            return model(next(images)).flatten(0, 1), ()

        return forward

    def _model(self, size: tuple[int, int]) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        config = self.config
        with torch.device(self.device):
            model = VisionTransformer(
                img_size=size,
                patch_size=config.patch_size,
                in_chans=config.in_channels,
                num_classes=0,
                global_pool="",
                embed_dim=config.hidden_size,
                depth=config.depth,
                num_heads=config.num_heads,
                # Half a feature more: it is rounded down to a width.
                mlp_ratio=(config.intermediate_size + 0.5) / config.hidden_size,
                class_token=False,
                act_layer="gelu_tanh",
                weight_init="skip",
            )
        return model.to(self.dtype).eval().requires_grad_(False)
