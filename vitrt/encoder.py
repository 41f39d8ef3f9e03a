"""VisionEncoder: images in, features out; the facade over processor, pipeline and engine.

Shapes: T patches, M merged tokens, O output width, L deepstack levels.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from vitrt.checkpoint.opened import Checkpoint, open_checkpoint
from vitrt.config import RuntimeConfig, VisionConfig, is_integer
from vitrt.engine.batch import PixelBatch, PixelValues
from vitrt.engine.device import dtype_name
from vitrt.engine.eager_runner import RunnerStats
from vitrt.engine.engine import Engine
from vitrt.engine.feature_stream import features_of, raise_it, stream_features
from vitrt.engine.group import Run, in_group
from vitrt.engine.outside_compiler import outside_compiler
from vitrt.engine.per_image import split_by_image
from vitrt.engine.request import TOKENS, Request
from vitrt.engine.shares import Piece, PieceFeatures, encode_share, encode_together
from vitrt.engine.stages import Stages
from vitrt.features import EncoderOutput, ImageFeatures, join, join_pooled
from vitrt.images.config import PreprocessorConfig
from vitrt.images.decode import check_images
from vitrt.images.inputs import ImageError, ImageInput
from vitrt.images.levels import level_tables
from vitrt.images.prepared import Prepared
from vitrt.images.processor import ImageProcessor
from vitrt.models.tower import VisionTower
from vitrt.parallel.context import SINGLE, ParallelContext

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
        tables = level_tables(preprocessor, self.processor.resize)
        self.table = torch.from_numpy(tables).to(engine.device)  # float32 [2, 3, 256]

    def __repr__(self) -> str:
        what = f"{self.config.model_type}, {dtype_name(self.dtype)} on {self.device}"
        return f"VisionEncoder({self.name or 'no name'!r}, {what})"

    def __reduce__(self) -> tuple[Any, ...]:
        return VisionEncoder, (self.engine, self.preprocessor, self.name)

    # Properties of the engine

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
        """The most patches of one forward: patches, though the public name says tokens."""
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
        video_min_pixels: int | None = None,
        video_max_pixels: int | None = None,
        fps: float | None = None,
        num_frames: int | None = None,
        min_frames: int | None = None,
        max_frames: int | None = None,
        frames: Literal["first", "all"] = "first",
        max_batch_tokens: int | None = None,
        resize: Literal["pillow", "torch"] = "pillow",
        graph_memory_mib: float = RuntimeConfig().graph_memory_mib,
        precision: Literal["auto", "fp8"] = "auto",
        fp8_skip_blocks: int = RuntimeConfig().fp8_skip_blocks,
        batch_invariant: bool = False,
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
            min_pixels, max_pixels: bounds of a resized image's area; None: the checkpoint's. They
                bound a clip's frames, too, where the next two say nothing.
            video_min_pixels, video_max_pixels: bounds of a clip, instead of the checkpoint's video
                processor's: of a frame's area in Qwen2-VL and Qwen2.5-VL, of frames x height x
                width in newer families.
            fps, num_frames: frames of a video that are looked at, a second or in all; None: as the
                checkpoint says, else 2 a second.
            min_frames, max_frames: bounds of what `fps` gives; None: the checkpoint's, else 4, 768.
            frames: of an animated GIF, WebP or PNG, the "first" frame, or "all" as a clip.
            max_batch_tokens: patches per forward; None: chosen from free memory.
            resize: "pillow" or "torch": which of transformers' backends to be bit-equal to.
            graph_memory_mib: how much device memory recorded graphs may take.
            precision: "fp8" runs the large products of the blocks on e4m3 operands where a batch
                has enough rows: faster, and coarser; `vitrt verify --precision fp8` measures it.
            fp8_skip_blocks: first blocks that "fp8" leaves in `dtype`.
            batch_invariant: an image's features are the same bits alone, in any batch, with graphs
                or without: one kernel and tile a product and one attention, whatever the batch.
            adapter: a PEFT LoRA, a folder or a hub id, merged into the tower as it is loaded.
            revision, cache_dir, token, local_files_only: as huggingface_hub takes them.
            parallel: this process's place among several GPUs.

        Raises:
            CheckpointError: a checkpoint that is missing, incomplete or of another kind.
            ValueError: a choice that cannot be had here, with those that can.
        """
        given = locals()  # the arguments, while there is nothing else
        runtime = RuntimeConfig(
            **{field.name: given[field.name] for field in fields(RuntimeConfig)}
            | {"device": str(device), "dtype": dtype_name(dtype)}
        )
        checkpoint = open_checkpoint(
            model,
            adapter=adapter,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )
        return cls.from_checkpoint(checkpoint, runtime, parallel)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, runtime: RuntimeConfig, parallel: ParallelContext = SINGLE
    ) -> VisionEncoder:
        """Load the vision tower of an opened checkpoint."""
        preprocessor = checkpoint.preprocessor_config()
        config, tensors = checkpoint.vision_config(), checkpoint.tower_tensors()
        engine = Engine.load(config, tensors, runtime, parallel)
        logger.info("%s: %.0f MiB of weights", checkpoint.name, checkpoint.num_bytes / 2**20)
        return cls(engine, preprocessor, checkpoint.name)

    # Encoding

    @outside_compiler
    def encode(
        self, images: Iterable[ImageInput], *, layers: Iterable[int] = (), merged: bool = True
    ) -> list[ImageFeatures]:
        """Features of every image, in input order.

        Those of one batch are views of one tensor on the encoder's device: `clone()` what is kept
        or saved without the others.

        Args:
            images: paths, file: and data: URLs, PIL images, the bytes of image files, open files,
                uint8 arrays [H, W, 3], or [F, H, W, 3] for a clip, datasets' {"bytes", "path"}, and
                uint8 tensors, whose axes `vitrt.Pixels` names.
            layers: also give the hidden states after these layers, counted from 0 or, as -1, from
                the last: [layers, t, h, w, hidden_size], patches in raster order. Only those of the
                last layer, if alone, go through CUDA graphs.
            merged: False gives the hidden states alone: embeddings are [0, out_hidden], deepstack
                is None, and no layer past the last one asked for runs.

        Raises:
            ImageError: naming the first image that cannot be used. A ValueError.
            DeviceMemoryError: naming an image that alone exceeds the device's memory. Another.
            ValueError: a layer that the tower does not have; what is no list of images.

        With data-parallel ranks every rank gives the same images, encodes its share of their frames
        and gets all features, but not hidden states; see vitrt/engine/shares.py.
        """
        check_images(images)
        images, request = list(images), self._request(layers, merged)
        if self.parallel.dp_size == 1:
            return features_of(self.stages(request), images)
        if request != TOKENS:
            raise ValueError(
                f"layers={layers} with {self.parallel.dp_size} data-parallel ranks: encode "
                "does not exchange hidden states; give each rank its own images by stream"
            )
        return encode_together(self.engine, *self._shared(images))

    def encode_share(self, images: Iterable[ImageInput]) -> list[PieceFeatures]:
        """The features of this data-parallel rank's part of `images`, frame by frame.

        Every rank gives the same images; nothing is communicated.
        """
        check_images(images)
        return encode_share(self.engine, *self._shared(list(images)))

    @overload
    def stream(
        self,
        images: Iterable[ImageInput],
        *,
        workers: int | None = None,
        layers: Iterable[int] = (),
        merged: bool = True,
        on_error: Literal["raise"] = "raise",
    ) -> Iterator[ImageFeatures]: ...
    @overload
    def stream(
        self,
        images: Iterable[ImageInput],
        *,
        workers: int | None = None,
        layers: Iterable[int] = (),
        merged: bool = True,
        on_error: Literal["yield"],
    ) -> Iterator[ImageFeatures | ImageError]: ...
    def stream(
        self,
        images: Iterable[ImageInput],
        *,
        workers: int | None = None,
        layers: Iterable[int] = (),
        merged: bool = True,
        on_error: Literal["raise", "yield"] = "raise",
    ) -> Iterator[ImageFeatures] | Iterator[ImageFeatures | ImageError]:
        """`encode` in bounded memory: threads decode a window of the images ahead of the device.

        Features that are kept hold their whole batch in memory: keep their `clone()`.

        Args:
            images, layers, merged: as in `encode`; the images may come one by one.
            workers: threads that decode; None: as cores permit.
            on_error: what an image raises comes after the features of all before it. "raise" ends
                the stream with it; "yield" gives the ImageError in the image's place and goes on.
                What the iterable itself raises always ends the stream.
        """
        check_images(images)
        if on_error not in ("raise", "yield"):
            raise ValueError(f"on_error is {on_error!r}; it must be 'raise' or 'yield'")
        if workers is not None and (not is_integer(workers) or workers < 1):
            raise ValueError(f"workers is {workers!r}; it must be a number of threads, at least 1")
        return stream_features(
            self.stages(self._request(layers, merged)),
            images,
            failed=raise_it if on_error == "raise" else ImageError.of,
            # Ranks that share a tower must make the same batches, however fast each decodes.
            full_batches=self.parallel.tp_size > 1,
            workers=workers,
        )

    @outside_compiler
    def encode_prepared(
        self, images: Sequence[Prepared], *, layers: Iterable[int] = (), merged: bool = True
    ) -> list[ImageFeatures]:
        """Features of images that `processor.prepare` made ready, as one batch."""
        return self.run_prepared(images, self._request(layers, merged))

    def run_prepared(self, images: Sequence[Prepared], request: Request) -> list[ImageFeatures]:
        """`encode_prepared` for a request."""
        if not images:
            return []
        grids = [image.grid_thw for image in images]
        batch = PixelBatch([image.pixels for image in images], grids, self.table)
        output = self.engine.run(batch, request)
        return split_by_image(output, images, self.config.spatial_merge_size, request)

    def stages(self, request: Request = TOKENS) -> Stages[ImageInput]:
        """What a pipeline does to images so that `request` is answered."""
        budget = self.engine.patches_for(request)
        run: Run = partial(self.run_prepared, request=request)
        if self.parallel.tp_size > 1:
            run = in_group(run, self.parallel, self.device, budget)
        joined = join_pooled if request.pool else join
        return Stages(self.processor.prepare, run, budget, self.device, joined)

    def _request(self, layers: Iterable[int], merged: bool) -> Request:
        return Request.of(layers, merged=merged, depth=self.config.depth)

    def _shared(
        self, images: Sequence[ImageInput]
    ) -> tuple[Stages[Piece], list[tuple[int, int, int]]]:
        """What data-parallel ranks share: how to prepare a piece of an image, and their grids."""

        def prepare(piece: Piece) -> Prepared:
            span = piece.start, piece.stop
            return self.processor.prepare(images[piece.index], span=span)

        def grid_of(image: ImageInput) -> tuple[int, int, int]:
            try:
                return self.processor.grid_of(image)
            except Exception:  # the rank that prepares the image reports it
                return 1, self.config.spatial_merge_size, self.config.spatial_merge_size

        return self.stages().preparing(prepare), [grid_of(image) for image in images]

    @outside_compiler
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

    # Warm-up and statistics

    def warmup(self, buckets: Sequence[int] | None = None) -> None:
        """Record CUDA graphs now instead of during requests, of all buckets or of `buckets`.

        A bucket is a number of patches; ValueError for one that graphs do not go up to. Does
        nothing where the encoder uses no graphs.
        """
        self.engine.warmup(buckets)

    def stats(self) -> RunnerStats:
        """Graph replays by bucket, eager forwards by reason, padding share, graph memory."""
        return self.engine.stats()
