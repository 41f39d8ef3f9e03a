"""Patches and a request in, features out: graphs, batches, the pipeline, loading."""

__all__ = [
    "ahead",
    "batch",
    "batcher",
    "device",
    "eager_runner",
    "engine",
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
