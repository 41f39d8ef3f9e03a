"""The Triton interpreter where there is no GPU, and the small checkpoints most tests use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported: set it before any test module imports a kernel.
    os.environ["TRITON_INTERPRET"] = "1"

from tests.support.checkpoints import tiny_checkpoint

# The longest first, since one that starts last runs alone. Ray's before all others: xdist leaves
# what is first to one worker, so that one Ray runs at a time.
FIRST = ("test_ray.py", "test_ray_serve.py", "test_architectures.py", "test_compile.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_qwen2_5_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL checkpoint of three shards, language model included. Do not write into it."""
    return tiny_checkpoint("qwen2_5_vl", tmp_path_factory.mktemp("tiny") / "qwen2_5_vl")


@pytest.fixture(scope="session")
def tiny_qwen3_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL checkpoint of three shards, language model included. Do not write into it."""
    return tiny_checkpoint("qwen3_vl", tmp_path_factory.mktemp("tiny") / "qwen3_vl")


@pytest.fixture(scope="session")
def tiny_qwen3_vl_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL mixture-of-experts checkpoint, language model included. Do not write into it."""
    return tiny_checkpoint("qwen3_vl_moe", tmp_path_factory.mktemp("tiny") / "qwen3_vl_moe")
