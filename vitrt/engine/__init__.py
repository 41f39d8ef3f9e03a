"""Patches and a request in, features out: graphs, batches, the pipeline, loading."""

__all__ = [
    "arguments",
    "batch",
    "batcher",
    "batching",
    "dense",
    "device",
    "eager_runner",
    "engine",
    "loader",
    "per_image",
    "request",
    "sharding",
]
