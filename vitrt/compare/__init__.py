"""transformers as the reference, and errors against it."""

__all__ = ["errors", "reference", "sample_images", "verify", "verify_table"]
