"""The module tree of a SentenceTransformer around a Qwen-VL embedding model, and its `encode`.

The package itself asks for more than a test should: its modules are a Transformer, which holds the
model, a Pooling that takes the last token, and a Normalize.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.checkpoints import reference_model
from vitrt.features import ImageFeatures
from vitrt.images.processor import PreparedImage, patches_reference
from vitrt.integrations.transformers import placeholder_inputs


class Transformer(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.model(**features).last_hidden_state


class LastToken(nn.Module):
    def forward(self, states: Tensor) -> Tensor:
        return states[:, -1]


class Normalize(nn.Module):
    def forward(self, embeddings: Tensor) -> Tensor:
        return nn.functional.normalize(embeddings, dim=-1)


class SentenceTransformer(nn.Sequential):
    """As far as examples and tests use it."""

    def __init__(self, folder: str) -> None:
        from vitrt import VisionEncoder

        model = reference_model(Path(folder))
        super().__init__(
            OrderedDict({"0": Transformer(model.model), "1": LastToken(), "2": Normalize()})
        )
        encoder = VisionEncoder.from_pretrained(folder, device="cpu")
        self.prepare, self.table = encoder.processor.prepare, encoder.table.numpy()
        self.config, self.sizes = model.config, (encoder.config.patch_size, 2, 2)

    @torch.inference_mode()
    def encode(self, images: list[Any], **_: Any) -> Tensor:
        return torch.cat([self(self._inputs(self.prepare(image))) for image in images])

    def _inputs(self, image: PreparedImage) -> dict[str, Tensor]:
        patches = torch.from_numpy(patches_reference(image, self.table, *self.sizes))
        tokens = ImageFeatures(patches.new_zeros(len(patches) // 4, 1), None, image.grid_thw)
        ids = [7, 507, self.config.image_token_id, 508, 9]
        return placeholder_inputs(self.config, ids, [tokens]) | {
            "pixel_values": patches,
            "image_grid_thw": torch.tensor([image.grid_thw]),
        }
