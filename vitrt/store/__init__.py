"""The output folder: shards, manifests, recovery, checks, reading."""

__all__ = [
    "check",
    "content",
    "durable",
    "encoded_index",
    "export",
    "lock",
    "manifest",
    "recovery",
    "writer",
]
