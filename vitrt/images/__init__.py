"""Images and clips -> upright RGB pixels of the size that a tower takes."""

__all__ = ["config", "decode", "file_content", "inputs", "levels", "prepared", "processor"]
