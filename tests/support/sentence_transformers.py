"""Tiny checkpoints as sentence-transformers saves and loads its multimodal models.

Its import takes some seconds, so only the functions do it; where it is missing they skip the test.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoints import add_tokenizer, tiny_checkpoint


def images_and_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers load Qwen's processors without torchvision, which only their videos need."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    from transformers import Qwen2_5_VLProcessor, Qwen3VLProcessor

    for processor in (Qwen2_5_VLProcessor, Qwen3VLProcessor):
        parts = [name for name in processor.get_attributes() if name != "video_processor"]
        monkeypatch.setattr(processor, "get_attributes", classmethod(lambda _, parts=parts: parts))


def embedding_checkpoint(family: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What Qwen3-VL-Embedding is: the last token of the language model's states, normalised."""
    package: Any = pytest.importorskip("sentence_transformers")
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    images_and_text_alone(monkeypatch)
    plain = tiny_checkpoint(family, folder.with_name(folder.name + "-plain"))
    add_tokenizer(plain)
    transformer = Transformer(str(plain))
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    modules = [transformer, pooling, Normalize()]
    package.SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return folder
