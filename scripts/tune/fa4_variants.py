"""Which ways to compile FlashAttention-4's Hopper kernel are tried, and what they are called."""

from __future__ import annotations

import re
from dataclasses import dataclass

DEFAULT = "192x144s"  # the package's own for heads of 65 to 96
# Of 112 keys at most p fits into registers where a warpgroup's softmax overlaps with its p v: of
# more, threads spill and the products wait for one another.
_TILES = (
    *("192x96r", "192x112r", "192x112r/3", "192x112r+free", "192x128s", "192x160s"),
    *("192x112rn", "192x128rn", "192x144rn", "192x160rn", "192x144rn+turns"),
    *("128x128r", "128x160r", "128x176r", "128x192r", "128x208r", "128x224r"),
)
_PARTS = (
    *("192x144s+pers", "192x144s+lazy", "192x144s+lazy+pers", "192x144s+lazy+poly4"),
    *("192x112r+pers", "192x112r+lazy", "192x112r+lazy+poly4", "192x112r+lazy+poly8"),
    *("192x112r+lazy+pers", "192x112r+lazy+poly8+pers", "192x96r+lazy+pers"),
    *("192x144rn+lazy", "192x144rn+lazy+pers", "192x160rn+lazy+pers"),
    *("128x176r+lazy+pers", "128x208r+lazy+poly4+pers"),
)
_NARROW = (
    *("192x144s+narrow", "192x112r+narrow", "192x144rn+narrow", "192x128r+lazy+narrow"),
    *("192x112r+lazy+pers+narrow", "192x128r+lazy+pers+narrow", "192x144rn+lazy+pers+narrow"),
)
_NAME = re.compile(
    r"(?P<rows>\d+)x(?P<keys>\d+)(?P<p>[rs])(?P<serial>n?)(?:/(?P<stages>\d))?"
    r"(?P<order>\+turns|\+free)?(?P<lazy>\+lazy)?(?:\+poly(?P<poly>\d+))?(?P<persistent>\+pers)?(?P<narrow>\+narrow)?"
)


def variants_of(head_dim: int) -> list[str]:
    return [DEFAULT, *_TILES, *_PARTS, *(_NARROW if head_dim % 16 else ())]


@dataclass(frozen=True)
class Variant:
    """One way to compile the kernel; what follows the tile is in fa4_parts.py."""

    rows: int  # query rows of a block, 64 a warpgroup
    keys: int  # of an iteration
    p_in_registers: bool
    overlap: bool  # of a warpgroup's softmax with its own p v of the iteration before
    stages: int = 2  # of K and of V in shared memory
    turns: bool | None = None  # warpgroups issue products in turns; None: as the package thinks
    lazy: bool = False
    poly: int = 0  # one of so many exponentials is a polynomial; 0: none
    persistent: bool = False
    narrow: bool = False

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Of "192x112rn/3+free+lazy+poly4+pers+narrow": r(egisters) or s(hared memory) hold p,
        n(o) overlap, 3 stages; ValueError for what does not look like it.
        """
        found = _NAME.fullmatch(text)
        if found is None or (found["poly"] and not found["lazy"]):
            raise ValueError(f"variant {text!r}: should be like 192x112r/3+lazy+poly4+pers+narrow")
        return cls(
            int(found["rows"]),
            int(found["keys"]),
            found["p"] == "r",
            not found["serial"],
            int(found["stages"] or 2),
            found["order"] and found["order"] == "+turns",
            found["lazy"] is not None,
            int(found["poly"] or 0),
            found["persistent"] is not None,
            found["narrow"] is not None,
        )

    def shared_memory(self, head_dim: int) -> int:
        """Bytes of a block, but for some barriers."""
        width = -(-head_dim // 16) * 16
        p = 0 if self.p_in_registers else self.rows * self.keys
        return 2 * (self.rows * width + 2 * self.stages * self.keys * width + p)
