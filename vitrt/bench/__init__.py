"""`vitrt bench` and the timer that every timing program uses."""

__all__ = ["cli", "peers"]
