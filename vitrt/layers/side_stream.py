"""Work of a forward that runs beside the rest of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class SideStream:
    """A stream for work that the current stream needs no sooner than at the end of a `with` block.

    A recorded graph gets a branch by it. On few rows every kernel waits for memory and for the one
    before, so that what runs in a branch costs next to nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._read: list[Tensor] = []

    def run(self, work: Callable[[Tensor], object], x: Tensor) -> None:
        """Start `work(x)` after what the current stream was given so far.

        `x` is kept, and must not be overwritten, until the `with` block ends. What `work` writes is
        memory of its own or lives longer than the block.
        """
        self._read.append(x)
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            work(x)

    def __enter__(self) -> SideStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let the current stream wait for all of it. After an error nobody reads what came out."""
        if self._read and kind is None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        self._read.clear()
