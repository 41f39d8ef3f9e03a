"""The output folder: shards, manifests, recovery, checks, reading."""

__all__ = [
    "check",
    "compaction",
    "content",
    "durable",
    "encoded_index",
    "export",
    "feature_store",
    "lock",
    "manifest",
    "recovery",
    "run_identity",
    "shard_numbers",
    "writer",
]
