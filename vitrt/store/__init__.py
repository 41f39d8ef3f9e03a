"""The output folder: shards, manifests, recovery, checks, reading."""

__all__ = ["check", "durable", "encoded_index", "export", "lock", "manifest", "recovery", "writer"]
