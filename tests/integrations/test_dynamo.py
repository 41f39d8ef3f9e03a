"""Dynamo's backend contract, as recorded from its sources (custom_encoder/backend/base.py)."""

from __future__ import annotations

import base64
import importlib
import io
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image

from vitrt import VisionEncoder

RawT = TypeVar("RawT")
ItemT = TypeVar("ItemT")
ArtifactT = TypeVar("ArtifactT")


@dataclass(frozen=True)
class Preprocessed(Generic[ItemT]):
    item: ItemT
    cost: int = 1


class VisionEncoderBackend(ABC, Generic[RawT, ItemT, ArtifactT]):
    max_batch_cost: int | None = None
    buckets: Any = None
    preprocess_concurrency: int = 0

    @abstractmethod
    def build(self, model_id: str) -> None: ...

    @abstractmethod
    def forward_batch(self, items: Any, target_bucket: int | None = None) -> Any: ...


@dataclass(frozen=True)
class Qwen3VLImageEncoding:
    embeddings: torch.Tensor
    grid_thw: tuple[int, int, int]


@pytest.fixture
def dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vitrt.integrations.dynamo, over modules of Dynamo's names."""
    root = "dynamo.vllm.multimodal_utils.custom_encoder"
    names = {
        f"{root}.backend": {
            "Preprocessed": Preprocessed,
            "VisionEncoderBackend": VisionEncoderBackend,
        },
        f"{root}.adapter.qwen3_vl": {"Qwen3VLImageEncoding": Qwen3VLImageEncoding},
    }
    parts = root.split(".")
    for package in [".".join(parts[: i + 1]) for i in range(len(parts))] + [f"{root}.adapter"]:
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    for name, members in names.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "vitrt.integrations.dynamo", raising=False)
    yield importlib.import_module("vitrt.integrations.dynamo")
    sys.modules.pop("vitrt.integrations.dynamo", None)


def data_url(height: int, width: int) -> str:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_artifacts_are_what_the_adapter_takes(dynamo: Any, tiny_qwen3_vl: Path) -> None:
    backend = dynamo.VitrtEncoder()
    assert backend.preprocess_concurrency > 0 and backend.max_batch_cost > 0
    backend.build(str(tiny_qwen3_vl))
    urls = [data_url(64, 96), data_url(96, 64)]
    prepared = [backend.preprocess(url) for url in urls]
    artifacts = backend.forward_batch([one.item for one in prepared])
    encoder = VisionEncoder.from_pretrained(tiny_qwen3_vl)
    expected = encoder.encode([dynamo.image_bytes(url) for url in urls])
    for artifact, one, features in zip(artifacts, prepared, expected, strict=True):
        t, h, w = artifact.grid_thw
        assert one.cost == t * h * w
        assert artifact.embeddings.device.type == "cpu"
        assert len(artifact.embeddings) == t * h * w // 4
        assert torch.equal(artifact.embeddings, features.concatenated())
    backend.close()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("/etc/passwd", "data:, http: or https:"),
        ("file:///etc/passwd", "data:, http: or https:"),
        ("data:image/png,abc", "base64"),
        ("data:image/png;base64,a", "not valid base64"),
        ("data:image/png;base64,AAAA", "the image"),
        ("http://127.0.0.1:9/x.png", "could not be fetched"),
    ],
)
def test_a_bad_image_is_the_clients_and_tells_nothing_else(
    url: str, reason: str, dynamo: Any, tiny_qwen3_vl: Path
) -> None:
    backend = dynamo.VitrtEncoder()
    backend.build(str(tiny_qwen3_vl))
    with pytest.raises(ValueError, match=reason) as caught:
        backend.preprocess(url)
    assert str(tiny_qwen3_vl) not in str(caught.value) and "127.0.0.1" not in str(caught.value)


def test_a_refused_batch_is_nobodys_fault(
    dynamo: Any, tiny_qwen3_vl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = dynamo.VitrtEncoder()
    backend.build(str(tiny_qwen3_vl))

    def refuse(items: Any) -> Any:
        raise ValueError("grids")

    monkeypatch.setattr(backend._encoder, "encode_prepared", refuse)
    with pytest.raises(RuntimeError):
        backend.forward_batch([backend.preprocess(data_url(64, 64)).item])
