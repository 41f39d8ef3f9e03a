"""`vitrt bench` and the timer that every timing program uses."""

__all__ = ["as_json", "options", "runs", "tables", "timing", "workloads"]
