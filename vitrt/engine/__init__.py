"""Patches and a request in, features out: graphs, batches, the pipeline, loading."""

__all__ = [
    "ahead",
    "batch",
    "batcher",
    "device",
    "eager_runner",
    "engine",
    "feature_stream",
    "group",
    "loader",
    "memory",
    "outside_compiler",
    "per_image",
    "pipeline",
    "request",
    "shares",
    "stages",
    "window",
    "workers",
]
