"""What is wanted of a forward, as one value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vitrt.config import integer


@dataclass(frozen=True, slots=True)
class Request:
    """What is wanted of each image: its merged tokens, hidden states of layers, or both."""

    layers: tuple[int, ...] = ()  # whose hidden states to give, counted from 0, in this order
    merged: bool = True  # False: they are all that is given, and no later layer runs
    pool: bool = False  # the mean over an image's tokens in their place, float32

    def __post_init__(self) -> None:
        if not self.layers and not self.merged:
            raise ValueError(
                "merged=False without layers asks for nothing; name the layers whose hidden states "
                "are wanted, as in layers=[-1]"
            )
        if self.pool and (self.layers or not self.merged):
            raise ValueError(
                "pooled features have one row an image and no hidden states: ask for no layers"
            )

    @classmethod
    def of(cls, layers: Iterable[int] = (), *, merged: bool = True, depth: int) -> Request:
        """A request to a tower of `depth` layers, negative ones counted from the last, -1.

        ValueError names an index that the tower does not have or that comes twice, and a request
        that asks for nothing: no layers and not `merged`.
        """
        if not isinstance(layers, Iterable):
            raise ValueError(f"layers is {layers!r}; it must be a list, as in layers=[-1]")
        found: list[int] = []
        for layer in layers:
            try:
                place = integer(layer)
            except TypeError:
                raise ValueError(f"layers holds {layer!r}; it must hold integers only") from None
            if not -depth <= place < depth:
                raise ValueError(
                    f"layers holds {place}; the tower has {depth} layers: 0 to {depth - 1}, or "
                    f"{-depth} to -1 from the last"
                )
            if place % depth in found:
                raise ValueError(
                    f"layers holds layer {place % depth} twice, the second time as {place}"
                )
            found.append(place % depth)
        return cls(tuple(found), merged) if found or not merged else TOKENS


TOKENS = Request()
