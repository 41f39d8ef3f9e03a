"""transformers as the reference, and errors against it."""

__all__ = ["errors", "reference", "verify", "verify_table"]
