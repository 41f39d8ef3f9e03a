"""Where images come from: records listed while the first ones are encoded."""

__all__ = ["folder", "inputs", "options", "record"]
