"""Folders and hub ids: configs, the tensors of the tower, extraction."""

__all__ = ["extract", "fingerprint", "opened", "shards"]
