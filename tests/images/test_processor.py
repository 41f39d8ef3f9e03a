"""Preprocessing against transformers: its PIL backend itself, and its torchvision backend's steps.

We do not depend on torchvision, so `torchvision_steps` repeats what that backend does (resize of
contiguous channels-first uint8, then normalisation with the rescaling folded in). Where it is
installed all the same, the backend itself is compared as well.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    smart_resize as transformers_smart_resize,
)

from vitrt.images.levels import normalisation_table, patches_reference
from vitrt.images.prepared import PreparedImage
from vitrt.images.processor import ImageProcessor
from vitrt.images.resize import smart_resize

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALVES = (0.5, 0.5, 0.5)
LEVELS = np.tile(np.arange(256, dtype=np.float32), (3, 1))  # a table that changes nothing
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
PHOTOS = sorted(
    path
    for path in (Path(skimage.__file__).parent / "data").iterdir()
    if path.suffix in {".png", ".jpg", ".gif", ".tif"}
    and path.name != "multipage_rgb.tif"  # float64 pixels, which Pillow does not read
)
MODES = [
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBX",
    "RGBa",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "I;16",
    "I;16L",
    "I;16B",
    "F",
    "P+index",
    "P+alphas",
    "L+index",
    "RGB+colour",
]


def pil_backend(
    image: np.ndarray, processor: ImageProcessor, mean, std, levels: bool = False
) -> np.ndarray:
    """`pixel_values` of transformers' PIL backend; with `levels` those of its uint8 stage."""
    reference = Qwen2VLImageProcessorPil(
        patch_size=processor.patch_size,
        merge_size=processor.merge_size,
        temporal_patch_size=processor.temporal_patch_size,
        min_pixels=processor.min_pixels,
        max_pixels=processor.max_pixels,
        image_mean=list(mean),
        image_std=list(std),
        do_rescale=not levels,
        do_normalize=not levels,
    )
    features = reference(images=[image], return_tensors="np", input_data_format="channels_last")
    return np.asarray(features["pixel_values"])


def torchvision_steps(
    image: np.ndarray, processor: ImageProcessor, mean, std, levels: bool = False
) -> np.ndarray:
    """The same of transformers' torchvision backend, step by step (its `_preprocess`)."""
    height, width = image.shape[:2]
    factor = processor.patch_size * processor.merge_size
    size = transformers_smart_resize(
        height, width, factor, processor.min_pixels, processor.max_pixels
    )
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous()[None]
    if (height, width) != size:
        pixels = torch.nn.functional.interpolate(
            pixels, size=size, mode="bicubic", align_corners=False, antialias=True
        )
    pixels = pixels.to(torch.float32)
    if not levels:
        scale = 1.0 / (1 / 255)
        pixels.sub_((torch.tensor(mean) * scale).view(-1, 1, 1))
        pixels.div_((torch.tensor(std) * scale).view(-1, 1, 1))
    p, m = processor.patch_size, processor.merge_size
    grid_h, grid_w = size[0] // p, size[1] // p
    patches = pixels.reshape(1, 3, grid_h // m, m, p, grid_w // m, m, p)
    patches = patches.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    patches = patches.expand(-1, -1, -1, -1, -1, -1, processor.temporal_patch_size, -1, -1)
    return patches.reshape(grid_h * grid_w, -1).numpy()


def torchvision_backend(image, processor, mean, std) -> np.ndarray:
    from transformers import Qwen2VLImageProcessor

    reference = Qwen2VLImageProcessor(
        patch_size=processor.patch_size,
        merge_size=processor.merge_size,
        min_pixels=processor.min_pixels,
        max_pixels=processor.max_pixels,
        image_mean=list(mean),
        image_std=list(std),
    )
    features = reference(images=[image], return_tensors="pt", input_data_format="channels_last")
    return features["pixel_values"].numpy()


REFERENCES: dict[str, Callable[..., np.ndarray]] = {
    "pillow": pil_backend,
    "torch": torchvision_steps,
}


def rgb_of(image: Image.Image) -> np.ndarray:
    """The upright RGB pixels that transformers' processors make of an image."""
    image = ImageOps.exif_transpose(image)
    if Version(transformers.__version__) >= Version("5.23"):
        return convert_to_rgb(image, return_numpy=True)
    if "A" in image.getbands() or "transparency" in image.info:  # older ones dropped it
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def our_patches(prepared: PreparedImage, processor: ImageProcessor, table: np.ndarray):
    return patches_reference(
        prepared,
        table,
        processor.patch_size,
        processor.temporal_patch_size,
        processor.merge_size,
    )


def assert_equal_to_transformers(source, rgb: np.ndarray, processor, mean, std):
    """`source` prepared by us against `rgb` (what transformers loads it as) processed by it."""
    reference = REFERENCES[processor.resize]
    prepared = processor.prepare(source)
    assert prepared.pixels.dtype == np.uint8
    assert prepared.pixels.flags.c_contiguous
    assert prepared.pixels.flags.writeable
    levels = our_patches(prepared, processor, LEVELS)
    np.testing.assert_array_equal(levels, reference(rgb, processor, mean, std, levels=True))
    ours = our_patches(prepared, processor, normalisation_table(mean, std, processor.resize))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, reference(rgb, processor, mean, std))
    if processor.resize == "torch" and HAS_TORCHVISION:
        np.testing.assert_array_equal(ours, torchvision_backend(rgb, processor, mean, std))


def random_image(mode: str, height: int, width: int, seed: int, extreme: bool) -> Image.Image:
    """Noise, or (`extreme`) only 0 and 255, where bicubic overshoots and must be clamped."""
    rng = np.random.default_rng(seed)
    base, _, transparency = mode.partition("+")

    def noise(channels: int) -> np.ndarray:
        values = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        return np.where(values > 127, 255, 0).astype(np.uint8) if extreme else values

    if base == "1":
        return Image.fromarray(noise(1)[..., 0]).convert("1")
    if base in ("P", "PA"):
        image = Image.fromarray(noise(1)[..., 0]).convert("P")
        image.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        image = image.convert(base)
    elif base.startswith("I;16"):
        values = rng.integers(0, 600, (height, width), dtype=np.uint16)
        image = Image.frombytes(
            base, (width, height), values.astype(">u2" if base == "I;16B" else "<u2").tobytes()
        )
    elif base == "I":
        image = Image.fromarray(rng.integers(-200, 600, (height, width), dtype=np.int32))
    elif base == "F":
        image = Image.fromarray(rng.uniform(-200, 600, (height, width)).astype(np.float32))
    else:
        data = noise(len(Image.new(base, (1, 1)).tobytes()))
        image = Image.frombytes(base, (width, height), data.tobytes())
    kinds = {"index": 3, "alphas": bytes(range(256)), "colour": (1, 2, 3)}
    if transparency:
        image.info["transparency"] = kinds[transparency]
    return image


@st.composite
def processors(draw, resize: str) -> ImageProcessor:
    patch = draw(st.sampled_from([14, 16]))
    least = (2 * patch) ** 2
    min_pixels = draw(st.integers(1, 8 * least))
    max_pixels = draw(st.integers(max(least, min_pixels), 20 * least))
    return ImageProcessor(patch, 2, 2, min_pixels, max_pixels, resize)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # transformers' conversion
@pytest.mark.parametrize("resize", ["pillow", "torch"])
def test_300_random_images_equal_transformers(resize: str) -> None:
    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(
        processor=processors(resize),
        mode=st.sampled_from([*MODES, "array"]),
        height=st.integers(1, 150),
        width=st.integers(1, 150),
        seed=st.integers(0, 2**32 - 1),
        extreme=st.booleans(),
        mean_std=st.sampled_from([(CLIP_MEAN, CLIP_STD), (HALVES, HALVES)]),
    )
    def check(processor, mode, height, width, seed, extreme, mean_std) -> None:
        image = random_image("RGB" if mode == "array" else mode, height, width, seed, extreme)
        if mode == "array":
            array = np.asarray(image)
            assert_equal_to_transformers(array, array, processor, *mean_std)
        else:
            before = dict(image.info)
            assert_equal_to_transformers(image, rgb_of(image), processor, *mean_std)
            assert image.info == before  # the caller's image is left as it was
            assert image.mode == mode.partition("+")[0]

    check()


@pytest.mark.parametrize("resize", ["pillow", "torch"])
@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.name)
def test_photographs_equal_transformers(path: Path, resize: str) -> None:
    processor = ImageProcessor(16, 2, 2, 65536, 600_000, resize)
    assert_equal_to_transformers(path, rgb_of(Image.open(path)), processor, HALVES, HALVES)


@pytest.mark.parametrize("backend", ["pillow", "torch"])
@pytest.mark.parametrize(("mean", "std"), [(CLIP_MEAN, CLIP_STD), (HALVES, HALVES)])
def test_normalisation_table_equals_transformers_at_every_level(mean, std, backend: str) -> None:
    # One patch row of 2 x 2 tokens holds each level once in every channel: no resize involved.
    levels = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=-1)
    image = np.tile(levels, (2, 2, 1))
    processor = ImageProcessor(16, 2, 2, 1, 1 << 20, backend)
    ours = normalisation_table(mean, std, backend)
    theirs = REFERENCES[backend](image, processor, mean, std)
    expected = theirs[0].reshape(3, 2, 256)[:, 0]
    assert ours.shape == (3, 256)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, expected)
    other = normalisation_table(mean, std, "torch" if backend == "pillow" else "pillow")
    assert np.abs(ours - other).max() <= 2.4e-7
    assert torch.equal(torch.from_numpy(ours).bfloat16(), torch.from_numpy(other).bfloat16())


@settings(max_examples=500, deadline=None)
@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    factor=st.sampled_from([28, 32]),
    min_pixels=st.integers(1, 200_000),
    room=st.integers(0, 10_000_000),
)
@example(height=10, width=1000, factor=28, min_pixels=3136, room=10_000_000)  # rounds to 0 first
@example(height=14, width=42, factor=28, min_pixels=1, room=10_000_000)  # both are ties
@example(height=20, width=4000, factor=28, min_pixels=3136, room=0)  # the ratio of 200 is allowed
@example(height=20, width=4001, factor=28, min_pixels=3136, room=0)
def test_smart_resize_equals_transformers(height, width, factor, min_pixels, room) -> None:
    max_pixels = max(factor**2, min_pixels) + room
    limits = {"factor": factor, "min_pixels": min_pixels, "max_pixels": max_pixels}
    try:
        expected = transformers_smart_resize(height, width, **limits)
    except ValueError:
        with pytest.raises(ValueError, match=f"{height} x {width}.*aspect ratio.*200"):
            smart_resize(height, width, **limits)
        return
    assert smart_resize(height, width, **limits) == expected


def test_smart_resize_may_round_a_short_side_to_nothing() -> None:
    assert smart_resize(10, 1000, factor=28, min_pixels=3136, max_pixels=12845056) == (28, 560)


@pytest.mark.parametrize(("patch_size", "expected"), [(14, (1, 8, 14)), (16, (1, 6, 12))])
def test_the_factor_is_patch_times_merge(patch_size: int, expected: tuple[int, int, int]) -> None:
    """Resizing Qwen3-VL's images to multiples of 28, as some runtimes did, moves every patch."""
    processor = ImageProcessor(patch_size, 2, 2, 1, 1 << 20)
    assert processor.grid(100, 200) == expected
    assert processor.prepare(np.zeros((100, 200, 3), np.uint8)).grid_thw == expected


@pytest.mark.parametrize("resize", ["pillow", "torch"])
def test_an_image_is_resized_once(resize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    resize_image, interpolate = Image.Image.resize, torch.nn.functional.interpolate
    monkeypatch.setattr(
        Image.Image, "resize", lambda *a, **k: (sizes.append(a[1]), resize_image(*a, **k))[1]
    )
    monkeypatch.setattr(
        torch.nn.functional,
        "interpolate",
        lambda *a, **k: (sizes.append(k["size"][::-1]), interpolate(*a, **k))[1],
    )
    processor = ImageProcessor(14, 2, 2, 56 * 56, 28 * 28 * 20, resize)
    prepared = processor.prepare(Image.new("RGB", (1111, 333)))
    height, width = smart_resize(333, 1111, factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 20)
    assert sizes == [(width, height)]
    assert prepared.pixels.shape == (1, height, width, 3)
