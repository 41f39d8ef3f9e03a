"""The towers: families (`families`) and their configs (`config_file`), plans, the one forward loop,
counted work.
"""

__all__ = ["config_file", "families", "packed_plan", "plan", "tower", "work"]
