"""Ray Serve: features over HTTP. An image's bytes in, a safetensors file out.

    serve.run(EncoderService.options(num_replicas=4, ray_actor_options={"num_gpus": 1}).bind(model))
    curl --data-binary @cat.jpg 'http://127.0.0.1:8000/?name=cat.jpg' -o cat.safetensors

Serve routes, queues, batches by patches, and replaces replicas; a replica is one encoder. Imported
by whoever serves, and by nothing else here.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from torch import Tensor

from vitrt.config import RuntimeConfig
from vitrt.cores import default_workers
from vitrt.encoder import VisionEncoder
from vitrt.engine.feature_stream import stream_features
from vitrt.features import ImageFeatures
from vitrt.images.inputs import ImageError
from vitrt.images.prepared import Prepared
from vitrt.integrations.ray_actor import limit_memory, open_run_model
from vitrt.messages import counted
from vitrt.store.content import to_bytes

__all__ = ["EncoderService"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
_MOST_BYTES = 64 << 20
_WAIT_SECONDS = 0.005  # for a batch to fill
_LONGEST_NAME = 200
_POOLS = ("none", "mean")


@dataclass(frozen=True, slots=True, eq=False)
class _Queued:
    """An image that waits for a batch."""

    image: Prepared
    cost: int  # its patches; the whole budget of a batch where it has more


def _cost(queued: Sequence[_Queued]) -> int:
    return sum(each.cost for each in queued)


class _RefusedError(ValueError):
    """A request that is wrong, with its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@serve.deployment(max_ongoing_requests=256, max_queued_requests=1024)
class EncoderService:
    """A replica: one encoder behind HTTP.

    POST an image file's bytes, with `?name=` for messages and `?pool=mean` for the mean over the
    tokens alone. 200 has what `vitrt.store.content.to_bytes` writes; 400 names an image that cannot
    be used, 413 one that is too large, both as {"error": ...}. 503 says that too many requests wait
    (`max_queued_requests`), 5xx otherwise that a replica was lost: send it again, it may be.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        runtime: RuntimeConfig | None = None,
        adapter: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        max_image_bytes: int = _MOST_BYTES,
        batch_wait_seconds: float = _WAIT_SECONDS,
        warmup: bool = True,
    ) -> None:
        """Args:
        model, adapter, revision: as `VisionEncoder.from_pretrained` takes them.
        runtime: device, dtype and the other choices of one; None: the defaults.
        max_image_bytes: of a request; a longer one is answered with 413.
        batch_wait_seconds: how long a batch waits to be filled.
        warmup: record CUDA graphs before the replica counts as ready.
        """
        runtime = runtime or RuntimeConfig()
        checkpoint = open_run_model(model, runtime, adapter, revision)
        limit_memory()
        self._encoder = VisionEncoder.from_checkpoint(checkpoint, runtime)
        if warmup:
            self._encoder.warmup()
        self._stages = self._encoder.stages().preparing(lambda image: image)
        self._most_bytes = max_image_bytes
        self._decoders = ThreadPoolExecutor(default_workers(), "vitrt-decode")
        self._device = ThreadPoolExecutor(2, "vitrt-device")  # one runs, one copies and waits
        self._broken: Exception | None = None
        self._images = self._batches = self._largest = 0
        self._run_batch.set_max_batch_size(self._stages.max_batch_patches)
        self._run_batch.set_batch_wait_timeout_s(batch_wait_seconds)

    def check_health(self) -> None:
        """Serve replaces the replica once this raises: after a CUDA error none of its calls end."""
        if self._broken is not None:
            raise RuntimeError("the last forward failed") from self._broken

    def stats(self) -> dict[str, int]:
        """This replica's images and batches so far, images of its largest batch, and process id."""
        counts = {"images": self._images, "batches": self._batches, "largest": self._largest}
        return counts | {"pid": os.getpid()}

    async def __call__(self, request: Request) -> Response:
        name = request.query_params.get("name", "")[:_LONGEST_NAME] or "the image"
        try:
            pool = request.query_params.get("pool", "none")
            if pool not in _POOLS:
                raise _RefusedError(400, f"{name}: pool is {pool!r}, not one of {list(_POOLS)}")
            if request.method != "POST":
                raise _RefusedError(405, f"POST the bytes of an image, not {request.method}")
            content = await self._body(request, name)
            image = await self._prepare(content, name)
            result = await self._run_batch(_Queued(image, min(image.num_patches, self._budget)))
        except _RefusedError as error:
            return JSONResponse({"error": str(error)}, error.status)
        if isinstance(result, Exception):  # its own, such as more patches than the device takes
            return JSONResponse({"error": f"{name}: {result}"}, 413)
        content = await _in(self._decoders, lambda: _to_content(result, pool))
        return Response(content, media_type="application/octet-stream")

    @property
    def _budget(self) -> int:
        return self._stages.max_batch_patches

    async def _body(self, request: Request, name: str) -> bytes:
        """At most so many bytes: a longer body is refused before it is all here."""
        content = bytearray()
        async for piece in request.stream():
            content += piece
            if len(content) > self._most_bytes:
                raise _RefusedError(413, f"{name}: it has more than {self._most_bytes} bytes")
        return bytes(content)

    async def _prepare(self, content: bytes, name: str) -> Prepared:
        try:
            return await _in(
                self._decoders, lambda: self._encoder.processor.prepare(content, name=name)
            )
        except ImageError as error:
            raise _RefusedError(400, str(error)) from error

    @serve.batch(batch_size_fn=_cost, max_concurrent_batches=2)
    async def _run_batch(self, queued: list[_Queued]) -> list[ImageFeatures | Exception]:
        """Features on the CPU, or an image's own error; what breaks a whole batch is raised."""
        self._batches += 1
        self._images += len(queued)
        self._largest = max(self._largest, len(queued))
        images = [each.image for each in queued]
        try:
            return await _in(self._device, partial(self._encode, images))
        except Exception as error:
            self._broken = error
            logger.exception("a batch of %s failed", counted(len(images), "image"))
            raise

    def _encode(self, images: Sequence[Prepared]) -> list[ImageFeatures | Exception]:
        results = stream_features(
            self._stages, images, failed=lambda error: error, full_batches=True, workers=1
        )
        return [
            each if isinstance(each, Exception) else each.mapped(Tensor.cpu) for each in results
        ]


def _to_content(features: ImageFeatures, pool: str) -> bytes:
    if pool == "none":
        return to_bytes(features)
    row = features.pooled()[None]
    return to_bytes(ImageFeatures(row, None, features.grid_thw, features.merge_size), pooled=True)


async def _in(executor: ThreadPoolExecutor, call: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(executor, call)
