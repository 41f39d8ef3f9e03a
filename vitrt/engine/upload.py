"""uint8 pixels of a batch to the device, on a stream of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vitrt.engine.memory import page_locked


class PixelUploader:
    """Joins a batch in page-locked memory and copies it beside the work on the batch before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def upload(self, images: Sequence[np.ndarray]) -> Tensor:
        """All images' bytes, one after the other, uint8 [bytes] on the device."""
        size = sum(image.nbytes for image in images)
        if self._stream is None:
            host = torch.empty(size, dtype=torch.uint8, device="cpu")
        else:
            host = page_locked((size,), torch.uint8)
        joined = host.numpy()
        first = 0
        for image in images:
            joined[first : first + image.nbytes] = image.reshape(-1)
            first += image.nbytes
        if self._stream is None:
            return host.to(self.device)
        with torch.cuda.stream(self._stream):
            pixels = host.to(self.device, non_blocking=True)
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(self._stream)
        pixels.record_stream(compute)  # allocated on the copy stream, read on this one
        return pixels
