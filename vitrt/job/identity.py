"""What decides the features that a run writes: what it asks for, its model and its settings."""

from __future__ import annotations

from dataclasses import replace

from vitrt.checkpoint.fingerprint import fingerprint
from vitrt.checkpoint.opened import Checkpoint
from vitrt.config import RuntimeConfig
from vitrt.engine.device import dtype_name, resolve_device, resolve_dtype
from vitrt.engine.request import Request
from vitrt.images.config import PreprocessorConfig
from vitrt.images.processor import ImageProcessor
from vitrt.job.options import EncodeOptions
from vitrt.store.run_identity import RunIdentity, layers_text


def request_of(options: EncodeOptions, depth: int) -> Request:
    """What `options` ask of a tower of `depth` layers. ValueError for layers that it has not."""
    request = Request.of(options.layers, merged=options.merged, depth=depth)
    return replace(request, pool=options.pool == "mean")


def run_identity(
    checkpoint: Checkpoint, runtime: RuntimeConfig, options: EncodeOptions
) -> RunIdentity:
    """What decides the features of an image, apart from the image."""
    dtype = resolve_dtype(runtime.dtype, resolve_device(runtime.device))
    config, preprocessor = checkpoint.vision_config(), checkpoint.preprocessor_config()
    precision: str = runtime.precision
    if precision != "auto":
        precision = f"{precision}, {runtime.fp8_skip_blocks} blocks skipped"
    return RunIdentity(
        model=checkpoint.name,
        model_type=config.model_type,
        weights=fingerprint(checkpoint),
        dtype=dtype_name(dtype),
        min_pixels=runtime.min_pixels or preprocessor.min_pixels,
        max_pixels=runtime.max_pixels or preprocessor.max_pixels,
        resize=runtime.resize,
        video=_video_text(preprocessor, runtime),
        pool=options.pool,
        layers=layers_text(request_of(options, config.depth).layers),
        merged=options.merged,
        precision=precision,
        batch_invariant=runtime.batch_invariant,
    )


def _video_text(preprocessor: PreprocessorConfig, runtime: RuntimeConfig) -> str:
    """What decides the frames of a video and their size."""
    processor = ImageProcessor.from_configs(preprocessor, runtime)
    limits = processor.frame_min_pixels, processor.frame_max_pixels
    return f"{processor.video}, frames of {limits}, {processor.frames} of animations"
