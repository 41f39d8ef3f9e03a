"""VisionEncoder: images in, features out. Wires the rest together and knows no layer's insides.

Shapes: T patches, M merged tokens, O output width, L deepstack levels.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vitrt.attention import resolve
from vitrt.checkpoint.opened import Checkpoint, open_checkpoint
from vitrt.config import PreprocessorConfig, RuntimeConfig, VisionConfig
from vitrt.engine.arguments import check_pixel_values, check_several
from vitrt.engine.batch import PixelsFeed, ValuesFeed
from vitrt.engine.batching import encode_in_order, stream_in_order
from vitrt.engine.device import budget_from_memory, dtype_name, resolve_device, resolve_dtype
from vitrt.engine.eager_runner import EagerRunner, RunnerStats
from vitrt.engine.graph_runner import AUTO_MAX_PATCHES, GraphRunner
from vitrt.engine.loader import load_weights
from vitrt.engine.request import DenseEncoder, check_layers, to_raster
from vitrt.engine.sharding import encode_together
from vitrt.engine.upload import PixelUploader
from vitrt.features import EncoderOutput, ImageFeatures
from vitrt.images.processor import ImageInput, ImageProcessor, PreparedImage, normalisation_table
from vitrt.kernels.dispatch import HAVE_TRITON
from vitrt.models import build_tower
from vitrt.models.plan import ForwardPlan
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

    def __init__(
        self,
        tower: VisionTower,
        preprocessor: PreprocessorConfig,
        runtime: RuntimeConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        parallel: ParallelContext = SINGLE,
        name: str = "",
    ) -> None:
        """`tower` holds its weights on `device` in `dtype`; `runtime` says how to run it."""
        self.tower = tower
        self.config: VisionConfig = tower.config
        self.preprocessor = preprocessor
        self.runtime = runtime
        self.device = device
        self.dtype = dtype
        self.parallel = parallel
        self.name = name
        self.processor = ImageProcessor.from_configs(preprocessor, runtime)
        self.attention = resolve(
            runtime.attention,
            device=device,
            dtype=dtype,
            head_dim=self.config.head_dim,
            window_patches=tower.window_patches,
        )
        self.runner = self._make_runner()
        table = normalisation_table(
            preprocessor.image_mean, preprocessor.image_std, self.processor.resize
        )
        self.table = torch.from_numpy(table).to(device)  # float32 [3, 256], the normalised levels
        self._uploader = PixelUploader(device)
        budget = runtime.max_batch_tokens or budget_from_memory(tower, device, dtype)
        # Ranks that share a tower must pack the same batches, whatever memory each has free.
        self.max_batch_tokens: int = parallel.agree_min(budget)

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
            revision, cache_dir, token, local_files_only: as huggingface_hub takes them.
            parallel: this process's place among several GPUs.

        Raises:
            CheckpointError: a checkpoint that is missing, incomplete or of another kind.
            ValueError: a choice that cannot be had here, with those that can.
        """
        checkpoint = open_checkpoint(
            str(model) if not isinstance(model, Path) else model,
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
        )
        return cls.from_checkpoint(checkpoint, runtime, parallel)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, runtime: RuntimeConfig, parallel: ParallelContext = SINGLE
    ) -> VisionEncoder:
        """The same from an opened checkpoint."""
        device = resolve_device(runtime.device)
        dtype = resolve_dtype(runtime.dtype, device)
        preprocessor = checkpoint.preprocessor_config()
        with torch.device("meta"):
            tower = build_tower(checkpoint.vision_config(), parallel)
        tower.place(lambda meta: torch.empty(meta.shape, dtype=dtype, device=device))
        load_weights(tower, checkpoint)
        tower.prepare()
        encoder = cls(
            tower.eval(),
            preprocessor,
            runtime,
            device=device,
            dtype=dtype,
            parallel=parallel,
            name=checkpoint.name,
        )
        if device.type == "cuda":
            encoder._load_kernels()
        return encoder

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
        keep = check_layers(layers, self.config.depth, merged=merged)
        if not images:
            return []
        grids = [image.grid_thw for image in images]
        plan = self.tower.plan(grids)
        with self._own_settings():
            return self._encode_pixels(images, plan, keep, merged)

    def _asked_for(self, layers: Iterable[int], merged: bool) -> VisionEncoder | DenseEncoder:
        layers = tuple(layers)
        return DenseEncoder(self, layers, merged=merged) if layers or not merged else self

    def _encode_pixels(
        self,
        images: Sequence[PreparedImage],
        plan: ForwardPlan,
        keep: tuple[int, ...],
        merged: bool,
    ) -> list[ImageFeatures]:
        pixels = self._uploader.upload([image.pixels for image in images])
        frames = [image.pixels.shape[0] for image in images]
        feed = PixelsFeed(pixels, frames, self.table, self.config)
        output = self.runner.run(plan, feed, keep, merged=merged)
        embeddings = output.embeddings.split(plan.tokens if merged else [0] * len(images))
        levels: Sequence[Tensor | None] = [None] * len(images)
        if output.deepstack is not None:
            levels = output.deepstack.split(plan.tokens, dim=1)
        merge = self.config.spatial_merge_size
        hidden: Sequence[Tensor | None] = [None] * len(images)
        if keep:
            hidden = to_raster(output.hidden, plan.grids, merge)
        return [
            ImageFeatures(embedding, deepstack, grid, merge, states, keep)
            for embedding, deepstack, grid, states in zip(
                embeddings, levels, plan.grids, hidden, strict=True
            )
        ]

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
        rows = grid_thw.tolist() if isinstance(grid_thw, Tensor) else grid_thw
        plan = self.tower.plan(rows)
        check_pixel_values(pixel_values, plan.num_patches, self.config.patch_dim)
        feed = ValuesFeed(pixel_values, reordered=plan.order is not None)
        keep = (self.config.depth - 1,) if return_hidden else ()
        with self._own_settings():
            output = self.runner.run(plan, feed, keep)
        grids = torch.tensor(plan.grids, dtype=torch.int64, device="cpu")
        hidden = output.hidden[0] if return_hidden else None
        return EncoderOutput(output.embeddings, output.deepstack, grids, hidden)

    # What runs how

    def warmup(self, buckets: Sequence[int] | None = None) -> None:
        """Record CUDA graphs now instead of during requests, of all buckets or of `buckets`.

        A bucket is a number of patches; ValueError for one that graphs do not go up to. Does
        nothing where the encoder uses no graphs.
        """
        if isinstance(self.runner, GraphRunner):
            with self._own_settings():
                self.runner.warmup(buckets)

    def _load_kernels(self) -> None:
        """Run black images that between them use every kernel, so that no call waits for one.

        What a forward compiles and loads at first use costs seconds. A small image and a larger one
        may go to different backends, and one that the backend schedules to further kernels.
        """
        merge, patch = self.config.spatial_merge_size, self.config.patch_size
        larger = range(16 * merge, 32 * merge, merge)  # at most 3844 patches
        grids = ([(1, side, side)] for side in larger)
        plans = (self.tower.plan(grid) for grid in grids)
        scheduled = [p.grids[0][1] for p in plans if self.runner.attention_for(p).schedule]
        for side in (merge, larger[0], *scheduled[:1]):
            plan = self.tower.plan([(1, side, side)])
            with self._own_settings():
                pixels = torch.zeros(3 * (side * patch) ** 2, dtype=torch.uint8, device=self.device)
                feed = PixelsFeed(pixels, [1], self.table, self.config)
                self.runner.run_eager(plan, feed, "to load kernels")
        self.runner.stats.eager.clear()

    def stats(self) -> RunnerStats:
        """Graph replays by bucket, eager forwards by reason, padding share, graph memory."""
        return self.runner.stats

    @contextmanager
    def _own_settings(self) -> Iterator[None]:
        """The encoder's device, since Triton launches on the current one, and no autocast, which
        would change products and stay in what is recorded.
        """
        kind = self.device.type
        device = torch.cuda.device(self.device) if kind == "cuda" else nullcontext()
        autocast = torch.is_autocast_enabled(kind)
        with device, torch.autocast(kind, enabled=False) if autocast else nullcontext():
            yield

    def _make_runner(self) -> EagerRunner:
        arguments = (self.tower, self.attention, self.device, self.dtype)
        wanted = self.runtime.cuda_graphs
        if wanted is True and self.device.type != "cuda":
            raise ValueError(
                f"cuda_graphs=True needs a CUDA device, and this encoder is on {self.device}"
            )
        if wanted is False or self.device.type != "cuda":
            return EagerRunner(*arguments)
        if not HAVE_TRITON:
            if wanted is True:
                raise ValueError("cuda_graphs=True needs Triton, which is not installed")
            return EagerRunner(*arguments)  # without it some functions ask the device for a number
        limit = int(self.runtime.graph_memory_mib * (1 << 20))
        largest = 1 << 16 if wanted is True else AUTO_MAX_PATCHES
        return GraphRunner(
            *arguments, limit_bytes=limit, max_patches=largest, parallel=self.parallel
        )
