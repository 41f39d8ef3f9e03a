"""VisionEncoder: images in, features out. Wires the rest together and knows no layer's insides.

Shapes: T patches, M merged tokens, O output width, L deepstack levels.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vitrt.checkpoint.opened import Checkpoint, open_checkpoint
from vitrt.config import PreprocessorConfig, RuntimeConfig, VisionConfig
from vitrt.engine.arguments import check_several
from vitrt.engine.batch import PixelBatch, PixelValues
from vitrt.engine.batching import encode_in_order, stream_in_order
from vitrt.engine.dense import AnyEncoder, DenseEncoder
from vitrt.engine.device import check_precision, dtype_name, resolve_device, resolve_dtype
from vitrt.engine.eager_runner import RunnerStats
from vitrt.engine.engine import Engine
from vitrt.engine.loader import load_tower
from vitrt.engine.per_image import split_by_image
from vitrt.engine.request import TOKENS, Request
from vitrt.engine.sharding import encode_together
from vitrt.features import EncoderOutput, ImageFeatures
from vitrt.images.processor import ImageInput, ImageProcessor, PreparedImage, normalisation_table
from vitrt.models.tower import VisionTower
from vitrt.parallel.context import SINGLE, ParallelContext

__all__ = ["EncoderOutput", "ImageFeatures", "VisionEncoder"]

logger = logging.getLogger(__name__)


class VisionEncoder:
    """The vision tower of one checkpoint, ready to encode.

    Make one with `from_pretrained`. Methods may be called from several threads; forwards are
    launched one after the other. Where another thread draws random numbers on the same device, call
    `warmup` first: torch refuses them while a graph is recorded.
    """

    def __init__(self, engine: Engine, preprocessor: PreprocessorConfig, name: str = "") -> None:
        """`preprocessor` says how images become the patches that `engine` takes."""
        self.engine = engine
        self.preprocessor = preprocessor
        self.name = name
        self.processor = ImageProcessor.from_configs(preprocessor, engine.runtime)
        table = normalisation_table(
            preprocessor.image_mean, preprocessor.image_std, self.processor.resize
        )
        # float32 [3, 256], the normalised levels
        self.table = torch.from_numpy(table).to(engine.device)

    # What the engine says of itself

    @property
    def tower(self) -> VisionTower:
        return self.engine.tower

    @property
    def config(self) -> VisionConfig:
        return self.engine.config

    @property
    def runtime(self) -> RuntimeConfig:
        return self.engine.runtime

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        return self.engine.dtype

    @property
    def parallel(self) -> ParallelContext:
        return self.engine.parallel

    @property
    def max_batch_tokens(self) -> int:
        """Patches of one forward. The name says tokens for as long as it has been an argument."""
        return self.engine.max_batch_patches

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        attention: str = "auto",
        cuda_graphs: Literal["auto"] | bool = "auto",
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_batch_tokens: int | None = None,
        resize: Literal["pillow", "torch"] = "pillow",
        graph_memory_mib: float = RuntimeConfig().graph_memory_mib,
        precision: Literal["auto", "fp8"] = "auto",
        fp8_skip_blocks: int = RuntimeConfig().fp8_skip_blocks,
        adapter: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool | None = None,
        parallel: ParallelContext = SINGLE,
    ) -> VisionEncoder:
        """Load the vision tower of a checkpoint: a folder, or a hub id.

        Args:
            device: "auto" is "cuda" where there is one, else "cpu".
            dtype: "auto" is bfloat16 on a GPU and float32 on a CPU.
            attention: "auto", or a registered backend, which is an error where it cannot run.
            cuda_graphs: "auto" records graphs up to the size where they stop paying, True at any.
            min_pixels, max_pixels: bounds of a resized image's area; None: the checkpoint's.
            max_batch_tokens: patches per forward; None: chosen from free memory.
            resize: "pillow" or "torch": which of transformers' backends to be bit-equal to.
            graph_memory_mib: how much device memory recorded graphs may take.
            precision: "fp8" runs the large products of the blocks on e4m3 operands where a batch
                has enough rows: faster, and coarser; `vitrt verify --precision fp8` measures it.
            fp8_skip_blocks: first blocks that "fp8" leaves in `dtype`.
            adapter: a PEFT LoRA, a folder or a hub id, merged into the tower as it is loaded.
            revision, cache_dir, token, local_files_only: as huggingface_hub takes them.
            parallel: this process's place among several GPUs.

        Raises:
            CheckpointError: a checkpoint that is missing, incomplete or of another kind.
            ValueError: a choice that cannot be had here, with those that can.
        """
        checkpoint = open_checkpoint(
            str(model) if not isinstance(model, Path) else model,
            adapter=adapter,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        runtime = RuntimeConfig(
            device=str(device),
            dtype=dtype_name(dtype),
            attention=attention,
            cuda_graphs=cuda_graphs,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            max_batch_tokens=max_batch_tokens,
            resize=resize,
            graph_memory_mib=graph_memory_mib,
            precision=precision,
            fp8_skip_blocks=fp8_skip_blocks,
        )
        return cls.from_checkpoint(checkpoint, runtime, parallel)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, runtime: RuntimeConfig, parallel: ParallelContext = SINGLE
    ) -> VisionEncoder:
        """The same from an opened checkpoint."""
        device = resolve_device(runtime.device)
        dtype = resolve_dtype(runtime.dtype, device)
        check_precision(runtime.precision, device, dtype)
        preprocessor = checkpoint.preprocessor_config()
        tower = load_tower(
            checkpoint.vision_config(),
            checkpoint.tower_tensors(),
            device=device,
            dtype=dtype,
            parallel=parallel,
        )
        logger.info("%s: %.0f MiB of weights", checkpoint.name, checkpoint.num_bytes / 2**20)
        if runtime.precision == "fp8":
            tower.use_float8(runtime.fp8_skip_blocks)
            tower.prepare()
        engine = Engine(tower, runtime, parallel)
        if device.type == "cuda":
            engine.load_kernels()
        return cls(engine, preprocessor, checkpoint.name)

    # Encoding

    def encode(
        self, images: Iterable[ImageInput], *, layers: Iterable[int] = (), merged: bool = True
    ) -> list[ImageFeatures]:
        """Features of every image, in input order.

        An image is a path, a PIL image, the bytes of an image file, or a uint8 array [H, W, 3]; an
        array [F, H, W, 3] is a clip. The features of one batch are views of one tensor on the
        encoder's device. Raises ImageError (a ValueError) naming the first image that cannot be
        used.

        Args:
            layers: also give the hidden states after these layers, counted from 0 or, as -1, from
                the last: [layers, t, h, w, hidden_size], patches in raster order. ValueError for
                one that the tower does not have. Such forwards do not use CUDA graphs.
            merged: False gives the hidden states alone: embeddings are [0, out_hidden], deepstack
                is None, and no layer past the last one asked for runs.

        With data-parallel ranks every rank gives the same images, encodes its share of their frames
        and gets all features; see vitrt/engine/sharding.py. They do not exchange hidden states.
        """
        check_several(images)
        encoder = self._asked_for(layers, merged)
        if self.parallel.dp_size > 1:
            if encoder is not self:
                raise ValueError(
                    f"layers={layers} with {self.parallel.dp_size} data-parallel ranks: encode "
                    "does not exchange hidden states; give each rank its own images by stream"
                )
            return encode_together(self, list(images))
        return encode_in_order(encoder, list(images))

    def stream(
        self,
        images: Iterable[ImageInput],
        *,
        workers: int | None = None,
        layers: Iterable[int] = (),
        merged: bool = True,
    ) -> Iterator[ImageFeatures]:
        """`encode` in bounded memory: `workers` threads decode a window ahead of the device.

        What an image, or the iterable itself, raises comes after the features of all before it.
        """
        check_several(images)
        return stream_in_order(self._asked_for(layers, merged), images, workers=workers)

    def encode_prepared(
        self, images: Sequence[PreparedImage], *, layers: Iterable[int] = (), merged: bool = True
    ) -> list[ImageFeatures]:
        """Features of images that `processor.prepare` made ready, as one batch."""
        return self.run_prepared(images, Request.of(layers, merged=merged, depth=self.config.depth))

    def run_prepared(
        self, images: Sequence[PreparedImage], request: Request
    ) -> list[ImageFeatures]:
        """The same with what is wanted as one value."""
        if not images:
            return []
        grids = [image.grid_thw for image in images]
        batch = PixelBatch([image.pixels for image in images], grids, self.table)
        output = self.engine.run(batch, request)
        return split_by_image(output, grids, self.config.spatial_merge_size, request)

    def _asked_for(self, layers: Iterable[int], merged: bool) -> AnyEncoder:
        request = Request.of(layers, merged=merged, depth=self.config.depth)
        return self if request == TOKENS else DenseEncoder(self, request)

    def __call__(
        self,
        pixel_values: Tensor,
        grid_thw: Tensor | Sequence[Sequence[int]],
        *,
        return_hidden: bool = False,
    ) -> EncoderOutput:
        """Features of patches cut by a transformers processor: the same inputs as its `visual`.

        `pixel_values` is [T, P] in any float dtype, on any device; page-locked memory is copied
        while this returns, so leave it alone until the features are there. `grid_thw` [images, 3]
        is in patches, and on a GPU costs a synchronisation. ValueError where the two do not belong
        together.
        """
        batch = PixelValues(pixel_values, grid_thw)
        request = Request((self.config.depth - 1,)) if return_hidden else TOKENS
        output = self.engine.run(batch, request)
        grids = torch.tensor(batch.grids, dtype=torch.int64, device="cpu")
        hidden = output.hidden[0] if return_hidden else None
        return EncoderOutput(output.embeddings, output.deepstack, grids, hidden)

    # What runs how

    def warmup(self, buckets: Sequence[int] | None = None) -> None:
        """Record CUDA graphs now instead of during requests, of all buckets or of `buckets`.

        A bucket is a number of patches; ValueError for one that graphs do not go up to. Does
        nothing where the encoder uses no graphs.
        """
        self.engine.warmup(buckets)

    def stats(self) -> RunnerStats:
        """Graph replays by bucket, eager forwards by reason, padding share, graph memory."""
        return self.engine.stats()
