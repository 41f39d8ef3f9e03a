"""`vitrt encode`: inputs to an output folder, over one rank or many."""

__all__ = ["encode", "leader", "pipeline", "progress", "ranks", "watchdog"]
