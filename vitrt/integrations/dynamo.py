"""NVIDIA Dynamo's custom encoder: a VisionEncoder behind its `VisionEncoderBackend`.

    --custom-encoder-class vitrt.integrations.dynamo.VitrtEncoder
    --enable-multimodal --enable-mm-embeds

Imported by Dynamo alone. For decoders that take `Qwen3VLImageEncoding`: Qwen3-VL and Qwen3.5.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Sequence
from math import prod
from urllib.error import URLError
from urllib.request import urlopen

import torch
from dynamo.vllm.multimodal_utils.custom_encoder.adapter.qwen3_vl import Qwen3VLImageEncoding
from dynamo.vllm.multimodal_utils.custom_encoder.backend import Preprocessed, VisionEncoderBackend

from vitrt.encoder import VisionEncoder
from vitrt.images.inputs import ImageError
from vitrt.images.prepared import Prepared

__all__ = ["VitrtEncoder"]

logger = logging.getLogger(__name__)

_FETCH_SECONDS = 30
_MOST_BYTES = 64 << 20
_NAME = "the image"  # what a client reads: no path, address or identifier of this server


class VitrtEncoder(VisionEncoderBackend[str, Prepared, Qwen3VLImageEncoding]):  # type: ignore[misc]
    """Images by URL in, packed features out. The cost of an image is its patches."""

    max_batch_cost = 16384
    preprocess_concurrency = 4

    def build(self, model_id: str) -> None:
        """Load the tower and record its graphs, in the thread that will run it."""
        self._encoder = VisionEncoder.from_pretrained(model_id)
        self._encoder.warmup()

    def preprocess(self, raw: str) -> Preprocessed[Prepared]:
        """Fetch, decode and resize; in Dynamo's threads, on the CPU.

        ValueError, which the client is told, for an image that cannot be had or used.
        """
        prepared = self._encoder.processor.prepare(image_bytes(raw), _NAME)
        return Preprocessed(item=prepared, cost=prod(prepared.grid_thw))

    def forward_batch(
        self, items: Sequence[Prepared], target_bucket: int | None = None
    ) -> list[Qwen3VLImageEncoding]:
        """Features on the CPU, finished. RuntimeError, since a batch is of several clients."""
        try:
            features = self._encoder.encode_prepared(items)
        except ValueError as error:
            raise RuntimeError("a batch of prepared images was refused") from error
        pinned = self._encoder.device.type == "cuda"
        artifacts = []
        for image in features:
            packed = image.concatenated()
            host = torch.empty(packed.shape, dtype=packed.dtype, device="cpu", pin_memory=pinned)
            host.copy_(packed, non_blocking=True)
            artifacts.append(Qwen3VLImageEncoding(embeddings=host, grid_thw=image.grid_thw))
        if pinned:
            torch.cuda.current_stream(self._encoder.device).synchronize()
        return artifacts

    def close(self) -> None:
        del self._encoder


def image_bytes(url: str) -> bytes:
    """What a `data:` or http(s) URL holds. Paths are refused: they would be this server's.

    ImageError says why not, and names nothing that the client did not send.
    """
    scheme, _, rest = str(url).partition(":")
    if scheme == "data":
        kind, _, text = rest.partition(",")
        if not kind.endswith(";base64"):
            raise ImageError(f"{_NAME}: a data URL must be in base64")
        try:
            return base64.b64decode(text, validate=True)
        except binascii.Error:
            raise ImageError(f"{_NAME}: its data URL is not valid base64") from None
    if scheme not in ("http", "https"):
        raise ImageError(f"{_NAME}: it must be given as a data:, http: or https: URL")
    try:
        with urlopen(url, timeout=_FETCH_SECONDS) as response:
            content: bytes = response.read(_MOST_BYTES + 1)
    except (URLError, OSError) as error:
        logger.warning("an image could not be fetched: %s", error)
        raise ImageError(f"{_NAME}: it could not be fetched") from None
    if len(content) > _MOST_BYTES:
        raise ImageError(f"{_NAME}: it has more than {_MOST_BYTES >> 20} MiB")
    return content
