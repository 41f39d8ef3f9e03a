"""`vitrt bench` and the timer that every timing program uses."""

__all__ = ["options", "runs", "tables", "timing", "workloads"]
