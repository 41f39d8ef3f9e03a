"""`vitrt verify`: how far every way to run a tower here is from transformers, in numbers.

The reference is transformers' own image processor and tower in float32. What a dtype costs by
itself is measured on transformers' tower in that dtype: vitrt may be 1.05 times as far from the
reference, and in float32 1e-5 (relative L2).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product

import torch
from PIL.Image import Image
from PIL.Image import open as open_image
from PIL.ImageOps import exif_transpose
from torch import Tensor

from vitrt.attention import AutoBackend, resolve_attention, usable, window
from vitrt.checkpoint.opened import Checkpoint
from vitrt.compare.errors import Errors, Output, compare, cosines, full_precision, output_of
from vitrt.compare.reference import NamedModel, build_tower
from vitrt.compare.verify_table import Row, Verification
from vitrt.config import RuntimeConfig
from vitrt.encoder import VisionEncoder
from vitrt.engine.batch import PixelBatch
from vitrt.engine.batcher import pack
from vitrt.engine.device import check_precision, dtype_name, resolve_device, resolve_dtype
from vitrt.engine.engine import Engine
from vitrt.images.decode import name_of
from vitrt.images.levels import patches_reference
from vitrt.images.prepared import Prepared

logger = logging.getLogger(__name__)

_RUNS = 3  # of a batch with graphs: the second one records, the third one replays


@dataclass(frozen=True, slots=True)
class _Sample:
    """An image as vitrt takes it, and as transformers' processor made it."""

    prepared: Prepared
    pixel_values: Tensor  # float32 [T, P]
    name: str
    equal: bool  # to what vitrt makes of it, bit by bit


def verify(
    checkpoint: Checkpoint, runtime: RuntimeConfig, images: Sequence[str | Image]
) -> Verification:
    """Run `images` (paths or PIL images) in every way that this machine has.

    `runtime` gives device, pixel limits and dtype, where "auto" is float32 and bfloat16; its
    precision "fp8" adds rows, and every image's cosine. Raises ValueError where transformers is not
    installed or fp8 cannot run, ImageError for an image that cannot be used.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(
            "vitrt verify compares with transformers, which is not installed: pip install "
            "'vitrt[transformers]'"
        )
    device = resolve_device(runtime.device)
    dtypes = _dtypes(runtime.dtype, device)
    check_precision(runtime.precision, device, dtypes[-1])
    plain, has_fp8 = replace(runtime, precision="auto"), runtime.precision == "fp8"
    with full_precision(), torch.inference_mode():
        encoder = VisionEncoder.from_checkpoint(checkpoint, replace(plain, dtype="float32"))
        samples = _samples(checkpoint, encoder, images)
        sizes = [sample.prepared.num_patches for sample in samples]
        batches = pack(samples, encoder.max_batch_tokens, lambda s: s.prepared.num_patches)
        del encoder
        differing = [sample.name for sample in samples if not sample.equal]
        result = Verification(checkpoint.name, device, len(samples), sum(sizes), differing)
        tokens: list[int] = []
        if has_fp8:
            inside = [sample for batch in batches for sample in batch]
            result.names = [sample.name for sample in inside]
            unit = checkpoint.vision_config().merge_unit
            tokens = [sample.prepared.num_patches // unit for sample in inside]
        exact = _transformers(checkpoint, batches, device, torch.float32)
        for dtype in dtypes:
            peer = None
            if dtype != torch.float32:
                peer = _measure_peer(result, checkpoint, batches, exact, dtype, tokens)
            here = replace(plain, dtype=dtype_name(dtype))
            runtimes = [here]
            if has_fp8 and dtype == torch.bfloat16:
                runtimes.append(replace(here, precision="fp8"))
            for each in runtimes:
                encoder = VisionEncoder.from_checkpoint(checkpoint, each)
                _measure(result, encoder, batches, exact, peer, tokens)
                del encoder
    return result


def _dtypes(name: str, device: torch.device) -> list[torch.dtype]:
    if name != "auto":
        return [resolve_dtype(name, device)]
    half = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return [torch.float32, torch.bfloat16] if half else [torch.float32]


def _samples(
    checkpoint: Checkpoint, encoder: VisionEncoder, images: Sequence[str | Image]
) -> list[_Sample]:
    """Every image twice: by `encoder`'s processor, and by transformers' own from its own files."""
    from transformers import AutoImageProcessor

    theirs = AutoImageProcessor.from_pretrained(checkpoint.folder, backend="pil")
    ours, config = encoder.processor, encoder.config
    limits = {"shortest_edge": ours.min_pixels, "longest_edge": ours.max_pixels}
    table = encoder.table.cpu().numpy()
    samples = []
    for image in images:
        prepared = ours.prepare(image)
        with nullcontext(image) if isinstance(image, Image) else open_image(image) as opened:
            inputs = theirs(images=[exif_transpose(opened)], return_tensors="pt", size=limits)
        grid = tuple(inputs["image_grid_thw"][0].tolist())
        if grid != prepared.grid_thw:
            raise ValueError(
                f"{name_of(image)}: vitrt makes a grid of {prepared.grid_thw} patches of it, "
                f"transformers one of {grid}; please report this"
            )
        sizes = config.patch_size, config.temporal_patch_size, config.spatial_merge_size
        values = torch.from_numpy(patches_reference(prepared, table, *sizes))
        equal = torch.equal(values, inputs["pixel_values"])
        samples.append(_Sample(prepared, inputs["pixel_values"], name_of(image), equal))
    return samples


def _transformers(
    checkpoint: Checkpoint,
    batches: Sequence[Sequence[_Sample]],
    device: torch.device,
    dtype: torch.dtype,
) -> Output:
    """What transformers' own tower makes of all images, on the CPU."""
    logger.info("transformers in %s", dtype_name(dtype))
    source = NamedModel(checkpoint.name, checkpoint.vision_config(), checkpoint)
    tower = build_tower(source, device=device, dtype=dtype)
    parts: list[Output] = []
    for batch in batches:
        values = torch.cat([sample.pixel_values for sample in batch]).to(device, dtype)
        grids = torch.tensor([sample.prepared.grid_thw for sample in batch], device=device)
        embeddings, levels = output_of(tower(values, grid_thw=grids))
        parts.append((embeddings.cpu(), [level.cpu() for level in levels]))
    return _joined(parts)


def _measure_peer(
    result: Verification,
    checkpoint: Checkpoint,
    batches: Sequence[Sequence[_Sample]],
    exact: Output,
    dtype: torch.dtype,
    tokens: Sequence[int],
) -> Errors:
    """A row for transformers' own tower in a lower precision; its errors."""
    theirs = _transformers(checkpoint, batches, result.device, dtype)
    errors = compare(theirs, exact)
    row = Row(dtype, "transformers", False, errors, errors, ours=False)
    result.rows.append(_with_cosines(row, theirs, exact, tokens))
    return errors


def _measure(
    result: Verification,
    encoder: VisionEncoder,
    batches: Sequence[Sequence[_Sample]],
    exact: Output,
    peer: Errors | None,
    tokens: Sequence[int],
) -> None:
    """A row for each backend and mode that `encoder`'s tower can run with."""
    dtype, precision = encoder.dtype, encoder.runtime.precision
    modes = (False, True) if encoder.device.type == "cuda" else (False,)
    for name, graphs in product(_backends(result, encoder), modes):
        row = Row(dtype, name, graphs, None, peer, precision=precision)
        logger.info("vitrt in %s, %s%s", row.label, name, ", CUDA graphs" * graphs)
        runtime = replace(encoder.runtime, attention=name, cuda_graphs=graphs)
        try:
            output, note = _run(encoder, runtime, batches)
            row = replace(row, errors=compare(output, exact), note=note)
            row = _with_cosines(row, output, exact, tokens)
        except Exception as error:  # a backend's failure is its result
            logger.debug("", exc_info=True)
            lines = str(error).strip().splitlines() or [type(error).__name__]
            row = replace(row, note=f"failed: {lines[0]}")
        result.rows.append(row)


def _with_cosines(row: Row, output: Output, exact: Output, tokens: Sequence[int]) -> Row:
    """The row with every image's cosine where fp8 is measured, but for float32's: they are 1."""
    if not tokens or row.dtype == torch.float32:
        return row
    return replace(row, cosines=cosines(output, exact, tokens))


def _backends(result: Verification, encoder: VisionEncoder) -> list[str]:
    """The names to run; those that cannot are noted in `result`."""
    device, dtype, head_dim = encoder.device, encoder.dtype, encoder.config.head_dim
    window_patches = encoder.tower.window_patches
    names = []
    for name, reason in usable(device, dtype, head_dim, window_patches):
        if reason is not None:
            dtypes = result.unusable.setdefault((name, reason), [])
            dtypes += [dtype] if dtype not in dtypes else []  # seen once more for fp8
        elif name != window.SPEC.name:  # a part of "auto"
            names.append(name)
    choice = resolve_attention(
        "auto", device=device, dtype=dtype, head_dim=head_dim, window_patches=window_patches
    )
    is_mixed = isinstance(choice.full, AutoBackend) or choice.full.name != choice.window.name
    return ["auto", *names] if is_mixed else names


def _run(
    encoder: VisionEncoder, runtime: RuntimeConfig, batches: Sequence[Sequence[_Sample]]
) -> tuple[Output, str]:
    """The features of all images by the same tower, run as `runtime` says; and a note."""
    engine = Engine(encoder.tower, runtime)
    graphs = runtime.cuda_graphs is True
    parts: list[Output] = []
    for batch in batches:
        pixels = [sample.prepared.pixels for sample in batch]
        grids = [sample.prepared.grid_thw for sample in batch]
        for _ in range(_RUNS if graphs else 1):
            output = engine.run(PixelBatch(pixels, grids, encoder.table))
        levels = () if output.deepstack is None else output.deepstack.cpu().unbind(0)
        parts.append((output.embeddings.cpu(), levels))
    note = ""
    if graphs and not engine.stats().hits:
        note = f"no graph replayed: {', '.join(engine.stats().eager)}"
    return _joined(parts), note


def _joined(parts: Sequence[Output]) -> Output:
    levels = list(map(torch.cat, zip(*(levels for _, levels in parts), strict=True)))
    return torch.cat([embeddings for embeddings, _ in parts]), levels
