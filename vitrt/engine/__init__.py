"""Patches and a request in, features out: graphs, batches, the pipeline, loading."""

__all__ = [
    "arguments",
    "batch",
    "batcher",
    "batching",
    "device",
    "eager_runner",
    "graph_runner",
    "loader",
    "request",
    "sharding",
    "upload",
]
