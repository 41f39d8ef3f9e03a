"""Ranks: how they are arranged, their sums, their memory."""

__all__ = ["context", "shared_parts", "shared_work", "watchdog"]
