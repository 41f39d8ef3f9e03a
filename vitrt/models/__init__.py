"""The towers: what a family is (`families`), plans, the one forward loop, counted work."""

__all__ = ["families", "packed_plan", "plan", "tower", "work"]
