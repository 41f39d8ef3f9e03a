"""The parts of a block, each of which owns its sharding and names its weights."""

__all__ = [
    "attention",
    "cache",
    "float8",
    "linear",
    "merger",
    "mlp",
    "norm",
    "patch",
    "rotary",
    "side_stream",
    "weights",
]
