"""`vitrt encode`: inputs to an output folder, over one rank or many."""

__all__ = [
    "encode",
    "identity",
    "options",
    "progress",
    "progress_display",
    "ranks",
    "run",
    "stop",
    "to_host",
]
