"""Ranks: how they are arranged, their sums, their memory."""

__all__ = ["context", "shared_work", "watchdog"]
