"""Images and clips -> upright RGB pixels of the size that a tower takes."""

__all__ = ["config", "decode", "inputs", "levels", "prepared", "processor"]
