"""accelerate on models that hold a tower deep inside: retrieval models give the same embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.support.checkpoints import (
    add_tokenizer,
    reference_model,
    tiny_checkpoint,
    visual_of,
)
from tests.support.sentence_transformers import embedding_checkpoint
from vitrt import VisionEncoder
from vitrt.features import ImageFeatures
from vitrt.integrations.transformers import accelerate, placeholder_inputs, restore

GRID = (1, 10, 6)


def inputs(config: Any) -> dict[str, Tensor]:
    """One image and a few words."""
    tokens = ImageFeatures(torch.zeros(15, 1), None, GRID)
    text = placeholder_inputs(config, [7, 507, config.image_token_id, 508, 9], [tokens])
    vision = config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(60, width, generator=torch.Generator().manual_seed(3))
    return text | {"pixel_values": pixels, "image_grid_thw": torch.tensor([GRID])}


def assert_same_embeddings(model: nn.Module, embed: Callable[[], Tensor]) -> None:
    before = embed()
    accelerate(model)
    try:
        after, used = embed(), visual_of(model).engine.stats()
    finally:
        restore(model)
    assert sum(used.eager.values()) > 0, "vitrt's tower did not run"
    assert float((after - before).norm() / before.norm()) <= 1e-5
    assert torch.equal(embed(), before)


def colqwen2(tmp_path: Path) -> Any:
    """transformers' own retrieval model around Qwen2-VL, random weights."""
    from transformers import ColQwen2Config, ColQwen2ForRetrieval

    inner = reference_model(tiny_checkpoint("qwen2_vl", tmp_path / "qwen2_vl"))
    config = ColQwen2Config(vlm_config=inner.config.to_dict(), embedding_dim=32)
    model = ColQwen2ForRetrieval(config).eval().requires_grad_(False)
    model.vlm.load_state_dict(inner.model.state_dict())
    return model


def test_colqwen2(tmp_path: Path) -> None:
    model = colqwen2(tmp_path)
    batch = inputs(model.config.vlm_config)
    batch["pixel_values"] = batch["pixel_values"][None]  # padded over the images there
    batch.pop("mm_token_type_ids")
    with torch.inference_mode():
        assert_same_embeddings(model, lambda: model(**batch).embeddings)


def test_the_tower_of_a_colqwen2_checkpoint(tmp_path: Path) -> None:
    """Its config is vlm_config.vision_config, its weights stand under another prefix."""
    model = colqwen2(tmp_path)
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    preprocessor = tmp_path / "qwen2_vl" / "preprocessor_config.json"
    (folder / preprocessor.name).write_bytes(preprocessor.read_bytes())
    assert json.loads((folder / "config.json").read_text())["model_type"] == "colqwen2"
    batch = inputs(model.config.vlm_config)
    ours = VisionEncoder.from_pretrained(folder, device="cpu")(batch["pixel_values"], [GRID])
    with torch.inference_mode():
        theirs = model.vlm.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
    error = (ours.embeddings - theirs.pooler_output).norm() / theirs.pooler_output.norm()
    assert float(error) <= 1e-5


IMAGES = [Image.effect_noise((90 + 30 * index, 70), 60).convert("RGB") for index in range(3)]
QUERIES = ["word40", "word41 word42 word43"]


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_sentence_transformers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package itself, as it loads Qwen3-VL-Embedding: images, text, and both in one input."""
    folder = embedding_checkpoint(family, tmp_path / family, monkeypatch)
    model = pytest.importorskip("sentence_transformers").SentenceTransformer(
        str(folder), device="cpu"
    )
    inputs = [*IMAGES, *QUERIES, {"image": IMAGES[0], "text": QUERIES[0]}]
    assert_same_embeddings(model, lambda: model.encode(inputs, convert_to_tensor=True))


def test_multi_vector_encoder(tmp_path: Path) -> None:
    """The package's encoder for ColQwen2: a vector for every token of a page and of a query."""
    package = pytest.importorskip("sentence_transformers")
    colqwen2(tmp_path).save_pretrained(folder := tmp_path / "saved")
    add_tokenizer(plain := tmp_path / "qwen2_vl")
    from transformers import AutoTokenizer, ColQwen2Processor, Qwen2VLImageProcessorPil

    processor = ColQwen2Processor(
        Qwen2VLImageProcessorPil.from_pretrained(plain), AutoTokenizer.from_pretrained(plain)
    )
    processor.save_pretrained(folder)
    model = package.MultiVectorEncoder(str(folder), device="cpu")

    def embed() -> Tensor:
        return torch.cat(
            [
                torch.as_tensor(found)
                for found in [*model.encode_document(IMAGES), *model.encode_query(QUERIES)]
            ]
        )

    assert_same_embeddings(model, embed)


def test_two_towers_are_named(tmp_path: Path) -> None:
    model = reference_model(tiny_checkpoint("qwen3_5", tmp_path / "qwen3_5"))
    both = nn.ModuleDict({"first": model, "second": nn.Sequential(deepcopy(visual_of(model)))})
    with pytest.raises(ValueError, match=r"more than one visual tower: first\..*, second\.0"):
        accelerate(both)
