"""The vision encoders of Qwen's models on their own: images in, visual features out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vitrt.version import __version__

if TYPE_CHECKING:
    from vitrt.checkpoint.extract import extract_tower
    from vitrt.checkpoint.shards import CheckpointError
    from vitrt.config import VisionConfig
    from vitrt.encoder import VisionEncoder
    from vitrt.features import EncoderOutput, ImageFeatures
    from vitrt.images.config import PreprocessorConfig
    from vitrt.images.inputs import ImageError, Pixels
    from vitrt.models.config_file import read_vision_config
    from vitrt.parallel.context import ParallelContext
    from vitrt.store.feature_store import FeatureStore

# Loaded when they are asked for: importing vitrt alone costs nothing.
_HOME = {
    "CheckpointError": "vitrt.checkpoint.shards",
    "EncoderOutput": "vitrt.features",
    "FeatureStore": "vitrt.store.feature_store",
    "ImageError": "vitrt.images.inputs",
    "ImageFeatures": "vitrt.features",
    "ParallelContext": "vitrt.parallel.context",
    "Pixels": "vitrt.images.inputs",
    "PreprocessorConfig": "vitrt.images.config",
    "VisionConfig": "vitrt.config",
    "VisionEncoder": "vitrt.encoder",
    "extract_tower": "vitrt.checkpoint.extract",
    "read_vision_config": "vitrt.models.config_file",
}

__all__ = [
    "CheckpointError",
    "EncoderOutput",
    "FeatureStore",
    "ImageError",
    "ImageFeatures",
    "ParallelContext",
    "Pixels",
    "PreprocessorConfig",
    "VisionConfig",
    "VisionEncoder",
    "__version__",
    "extract_tower",
    "read_vision_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vitrt' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
