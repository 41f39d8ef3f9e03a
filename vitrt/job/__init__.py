"""`vitrt encode`: inputs to an output folder, over one rank or many."""

__all__ = ["encode", "leader", "options", "pipeline", "progress", "ranks", "watchdog"]
