"""`vitrt encode`: inputs to an output folder, over one rank or many."""

__all__ = ["encode", "options", "progress", "ranks", "run", "stop", "to_host"]
